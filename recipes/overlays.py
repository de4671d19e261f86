"""The YAML overlays: list them, show one, for ``python my_train.py fit --config mine.yaml --config overlay.yaml``."""

from __future__ import annotations

import argparse
from importlib.resources import files

from lightning_peft.recipes import RUNS


def overlays() -> dict[str, str]:
    """Return the text of every overlay by name."""
    folder = files("lightning_peft.recipes") / "configs"
    found = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in folder.iterdir()}
    return dict(sorted(found.items()))


def sentence(text: str) -> str:
    """Return what an overlay says of itself: its first line.

    >>> sentence("# Train the head alone.")
    'Train the head alone.'
    """
    return text.splitlines()[0].lstrip("# ")


def main(args: list[str] | None = None) -> None:
    """List all recipes, or print an overlay."""
    known = overlays()
    parser = argparse.ArgumentParser(
        "lightning-peft recipes",
        description="List the recipes; or print one as YAML, to be saved, edited and given to your own LightningCLI: "
        "lightning-peft recipes show head_first > head_first.yaml; "
        "python my_train.py fit --config mine.yaml --config head_first.yaml",
    )
    show = parser.add_subparsers(dest="action", metavar="[show NAME]").add_parser("show", help="print an overlay")
    show.add_argument("name", choices=known, metavar="NAME", help=", ".join(known))
    parsed = parser.parse_args(args)
    if parsed.action == "show":
        print(known[parsed.name], end="")
        return
    print("Runs, lightning-peft NAME:")
    for name, said in RUNS.items():
        print(f"  {name:<20} {said}")
    print("Overlays for your own LightningCLI, lightning-peft recipes show NAME:")
    for name, text in known.items():
        print(f"  {name:<20} {sentence(text)}")

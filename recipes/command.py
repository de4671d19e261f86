"""The command ``lightning-peft``: the first word names a recipe or a tool."""

from __future__ import annotations

import argparse
import importlib

from lightning_peft.recipes import RUNS

COMMANDS = {
    **{name: (f"lightning_peft.recipes.{name}", sentence) for name, sentence in RUNS.items()},
    "recipes": ("lightning_peft.recipes.overlays", "List the recipes; show one as a YAML overlay for your project."),
    "inspect": (
        "lightning_peft.recipes.inspection",
        "Show a network's layers, the globs that select them, and what LoRA adapts.",
    ),
}


def main(args: list[str] | None = None) -> None:
    """Hand over to the command that is named first; the rest of the line is its own."""
    listing = "\n".join(f"  {name:<12} {sentence}" for name, (_, sentence) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "lightning-peft",
        description=f"Commands:\n{listing}\n\nlightning-peft COMMAND --help tells its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the command")
    parsed = parser.parse_args(args)
    importlib.import_module(COMMANDS[parsed.command][0]).main(parsed.options)

"""The command ``lightning-peft``: one name, one recipe."""

from __future__ import annotations

import argparse
import importlib

RECIPES = {"sentiment": "learn sentiment with MiniLM and keep what it could do before"}


def main(args: list[str] | None = None) -> None:
    """Hand over to the recipe that is named first; the rest of the line is its own."""
    listing = "\n".join(f"  {name:<12} {sentence}" for name, sentence in RECIPES.items())
    parser = argparse.ArgumentParser(
        "lightning-peft",
        description=f"Recipes:\n{listing}\n\nlightning-peft RECIPE --help tells its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the recipe")
    parsed = parser.parse_args(args)
    importlib.import_module(f"lightning_peft.recipes.{parsed.recipe}").main(parsed.options)

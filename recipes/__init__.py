"""Whole runs, as commands: ``lightning-peft NAME`` or ``python -m lightning_peft.recipes.NAME``."""

if __name__ == "recipes":
    raise ImportError("import lightning_peft.recipes, not recipes: the bare name would make every class twice")

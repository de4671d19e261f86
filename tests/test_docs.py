"""Every mixin and callback has its card, and what a card claims to be logged is a key of the grammar."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest

import lightning_peft.callbacks
import lightning_peft.mixins
from lightning_peft.logging import FAMILIES

CARDS = Path(__file__).parents[1] / "docs" / "methods"
KINDS = {
    name: kind
    for package in (lightning_peft.mixins, lightning_peft.callbacks)
    for name, kind in vars(package).items()
    if isinstance(kind, type) and issubclass(kind, pl.Callback | pl.LightningModule)
}
PARTS = ("What it does", "In TensorBoard", "Values", "When not", "Source")


def snake(name: str) -> str:
    for word in ("LoRA", "DER", "KL", "FOMAML", "MAML", "ANIL", "SGD"):
        name = name.replace(word, word.capitalize())
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize("name", KINDS)
def test_every_method_has_a_card_with_all_its_parts(name):
    text = (CARDS / f"{snake(name)}.md").read_text()
    assert text.startswith(f"# {name}")
    assert [part for part in PARTS if f"| {part} |" not in text] == []
    assert "```python" in text


def test_no_card_is_without_its_method_and_the_list_names_all():
    cards = {file.stem for file in CARDS.glob("*.md")} - {"README"}
    assert cards == {snake(name) for name in KINDS}
    assert cards == set(re.findall(r"\((\w+)\.md\)", (CARDS / "README.md").read_text()))


@pytest.mark.parametrize("card", sorted(CARDS.glob("*_*.md")), ids=lambda card: card.stem)
def test_the_keys_that_a_card_names_belong_to_a_family(card):
    shown = next(line for line in card.read_text().splitlines() if line.startswith("| In TensorBoard"))
    assert {key.split("/")[0] for key in re.findall(r"`(\w+/[^`]*)`", shown)} <= set(FAMILIES)

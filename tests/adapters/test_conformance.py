"""Every cell of our column in docs/adapters.md, made anew."""

import itertools
import re

import pytest

from tests.adapters.conformance import LAYERS, METHODS, PROPERTIES, Ours, Peft, applies, layer_applies, see, shown
from tests.adapters.zoo import ZOO
from tests.composition import ROOT

CELLS = [pair for pair in itertools.product(METHODS, PROPERTIES) if applies(METHODS[pair[0]], pair[1])]
LAYER_CELLS = [pair for pair in itertools.product(ZOO, LAYERS) if layer_applies(*pair)]


def told():
    """What docs/adapters.md says of ours and of PEFT, by (method, property)."""
    found = {}
    for part in (ROOT / "docs" / "adapters.md").read_text().split("\n### ")[1:]:
        title, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        found |= {(title, cells[0]): (cells[1], cells[2]) for cells in rows[1:]}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_ours_is_as_it_should_be(method):
    bad = {
        title: seen.says
        for title, check in PROPERTIES.items()
        if applies(METHODS[method], title) and not (seen := see(Ours(), METHODS[method], check)).ok
    }
    assert bad == {}


@pytest.mark.parametrize("case", ZOO)
def test_lora_is_as_it_should_be_on_every_kind_of_layer(case):
    bad = {
        title: seen.says
        for title, check in LAYERS.items()
        if layer_applies(case, title) and not (seen := see(Ours(), case, check)).ok
    }
    assert bad == {}


def test_the_page_has_every_cell_and_none_of_ours_is_bold():
    expected = {*CELLS, *((f"LoRA on layers: {case}", title) for case, title in LAYER_CELLS)}
    page = told()
    assert page.keys() == expected
    assert [key for key, (ours, peft) in page.items() if not ours or not peft or "**" in ours] == []


def test_what_is_wrong_is_bold():
    def broken(arm, method):
        raise ValueError("no | such")

    assert shown(see(Ours(), None, broken)) == "**ValueError: no / such**"


@pytest.mark.large
def test_peft_is_as_the_page_says():
    page = told()
    for method, title in CELLS:
        if METHODS[method].peft:
            seen, said = see(Peft(), METHODS[method], PROPERTIES[title]), page[method, title][1]
            assert seen.ok == (not re.fullmatch(r"\*\*.*\*\*", said)), f"{method}, {title}: {seen.says}"

"""A draft counts as a program only if something was written."""

import pytest

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers import PythonParses, PythonViability

PROMPT = 'def f(x):\n    """Say x."""\n'


@pytest.mark.parametrize("written", ["", "\n  \n", "    # later\n"])
def test_nothing_written_is_no_program_though_the_prompt_is_one(written):
    draft = Draft(written, prompt=PROMPT)
    assert PythonParses()([draft]).tolist() == [0]
    assert PythonViability().finished([draft]) == [False]
    assert PythonViability()([draft]).tolist() == [0]


def test_what_breaks_off_does_not_parse():
    texts = [Draft(written, prompt=PROMPT) for written in ("    return x", "    return (x", "    return x)")]
    assert PythonParses()(texts).tolist() == [1, 0, 0]
    assert PythonViability()(texts).tolist() == [0, 0, -float("inf")]


def test_the_same_text_is_judged_by_what_was_written_of_it():
    scorer = PythonParses()
    assert scorer([Draft("", prompt="x = 1"), Draft("x = 1")]).tolist() == [0, 1]


def test_the_completion_alone_can_be_judged():
    draft = Draft("x = 1", prompt="Set x to one: ")
    assert PythonParses(reads="completion")([draft]).tolist() == [1]
    assert PythonViability()([draft]).tolist() == [-float("inf")]

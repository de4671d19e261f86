"""A scorer is asked about each text once, and each answer is on its problem's account."""

import pytest
import torch

from lightning_peft.budget import Usage
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.judge import Judge
from tests.decoding.searched import EvenLength, Without


def test_answers_are_remembered_by_problem_and_text():
    scorer, usage = Without("x"), {0: Usage(), 1: Usage()}
    judge = Judge(scorer, usage)
    drafts = [Draft("a"), Draft("a"), Draft("a", problem=1), Draft("x")]
    assert judge.values(drafts) == [0, 0, 0, -float("inf")]
    assert judge.values(drafts[:1]) == [0]
    assert [(one.scorer_calls, one.cached) for one in usage.values()] == [(2, 2), (1, 0)]
    assert (scorer.calls, len(scorer.seen)) == (1, 3)


def test_what_would_be_asked_is_known_before():
    judge = Judge(EvenLength(), {0: Usage()})
    drafts = [Draft("a"), Draft("ab")]
    assert judge.coming(drafts, drafts[1:]).scorer_calls == 3
    judge.values(drafts)
    assert judge.coming(drafts, drafts[1:]).scorer_calls == 1
    assert judge.finished(drafts) == [False, True]
    assert judge.coming(drafts, drafts).scorer_calls == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "gave 1 values for 2 texts"),
        ([1.0, float("nan")], "gave NaN for 'b'"),
        ([[1.0], [2.0]], r"gave a tensor \(2, 1\) for 2 texts"),
        (1.0, r"gave a tensor \(\) for 2 texts"),
    ],
)
def test_a_scorer_s_mistake_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        Judge(lambda texts: torch.tensor(values), {0: Usage()}).values([Draft("a"), Draft("b")])

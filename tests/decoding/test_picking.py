"""What has ended comes before what was cut, where it is asked for; what a final scorer has judged before all."""

import torch

from lightning_peft.budget import Budget, Usage
from lightning_peft.decoding.beams import Hypothesis
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.picking import judged_by, settled
from lightning_peft.decoding.texts import Texts
from tests.prompts.language_nets import tokenizer


def found():
    """A cut text that ranks best, and two that have ended."""
    letters = tokenizer()("abc")["input_ids"][:1]
    ranks = [(-1.0, False), (-3.0, True), (-2.0, True)]
    return [Hypothesis(0, 0, (*letters, place), rank, ended, rank=rank) for place, (rank, ended) in enumerate(ranks)]


def test_ended_texts_come_first_only_where_that_is_asked_for():
    texts = Texts(tokenizer(), ["a"])
    assert [one.score for one in settled(found(), texts, ended_first=True)] == [-2.0, -3.0, -1.0]
    assert [one.score for one in settled(found(), texts, ended_first=False)] == [-1.0, -2.0, -3.0]


def test_a_dead_text_comes_last():
    dead = Hypothesis(0, 0, (5,), -0.1, ended=False, value=-float("inf"), rank=-float("inf"))
    last = settled([dead, *found()], Texts(tokenizer(), ["a"]), ended_first=True)[-1]
    assert (last.viable, last.finished) == (False, False)


def test_what_a_final_scorer_has_judged_comes_before_all():
    pool = settled(found(), Texts(tokenizer(), ["a"]), ended_first=False)
    judged = judged_by(Judge(lambda texts: torch.tensor([-50.0] * len(texts)), [Usage()]), pool, Budget())
    assert [(one.judged, one.finished) for one in judged] == [(True, True), (True, True), (False, False)]

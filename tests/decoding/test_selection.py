"""Selectors keep what they promise to keep, of one and the same pool."""

import pytest
import torch

from lightning_peft.budget import Budget, Usage
from lightning_peft.decoding import MBR, BestOfN, Sample, SelfConsistency
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.result import Candidate
from tests.decoding.searched import PROMPTS, model
from tests.prompts.language_nets import tokenizer


def candidate(text, score=0.0, finished=True):
    return Candidate(Draft(text, prompt="? "), score, score, finished, viable=True, ids=(1,))


def choose(decoder, pool):
    return decoder.select(pool, Judge(getattr(decoder, "final", None), {0: Usage()}))


def lengths(texts):
    return torch.tensor([float(len(text.completion)) for text in texts])


def test_all_draw_the_pool_that_sampling_draws():
    net = model(scale=2.0)
    drawn = Sample(n=4, max_new_tokens=6).decode(net, tokenizer(), PROMPTS)
    for kind in (BestOfN, SelfConsistency, MBR):
        pool = kind(n=4, max_new_tokens=6).decode(net, tokenizer(), PROMPTS).pool
        assert [{one.ids for one in found} for found in pool] == [{one.ids for one in found} for found in drawn.pool]


def test_the_best_is_the_scorer_s_and_what_was_cut_is_not_asked_about():
    pool = [candidate("longest of all", finished=False), candidate("ab", -3.0), candidate("abc", -9.0)]
    assert [one.text for one in choose(BestOfN(final=lengths), pool)] == ["abc", "ab", "longest of all"]


def test_without_a_scorer_the_best_is_the_likeliest():
    pool = [candidate("cut", -0.1, finished=False), candidate("a", -3.0), candidate("b", -2.0)]
    assert [one.text for one in choose(BestOfN(), pool)] == ["b", "a", "cut"]


def test_questions_are_counted_and_the_budget_kept():
    net = model(scale=4.0)
    result = BestOfN(n=6, final=lengths, budget=Budget(max_scorer_calls=2), max_new_tokens=12).decode(
        net, tokenizer(), PROMPTS
    )
    assert [one.scorer_calls for one in result.usage] == [
        min(2, len({one.text for one in pool if one.finished})) for pool in result.pool
    ]


def test_the_majority_s_first_text_wins_and_its_share_is_the_score():
    pool = [candidate("so 3"), candidate("I say 4"), candidate("4"), candidate("7"), candidate("9", finished=False)]
    best = choose(SelfConsistency(extract=lambda text: text.completion.split()[-1]), pool)[0]
    assert (best.text, best.score) == ("I say 4", 0.5)


def test_of_equal_votes_the_first_wins_and_none_is_no_vote():
    pool = [candidate("none"), candidate("none"), candidate("b"), candidate("a")]
    best = choose(SelfConsistency(extract=lambda text: None if text.completion == "none" else text.completion), pool)[0]
    assert (best.text, best.score) == ("b", 0.5)


def test_the_text_most_like_the_others_wins():
    pool = [
        candidate("a dog ran"),
        candidate("the cat sat"),
        candidate("the cat ran"),
        candidate("the cat ran off", finished=False),
    ]
    ranked = choose(MBR(), pool)
    assert [one.text for one in ranked] == ["the cat ran", "the cat sat", "a dog ran", "the cat ran off"]
    assert ranked[0].score == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert choose(MBR(utility=lambda text, other: -len(text)), pool)[0].text == "a dog ran"

"""Curves compare decoders at equal tokens, on one pool, with the estimates of the papers."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_peft.decoding import BeamSearch, BestOfN, Greedy, Sample, compute_curve, pass_at_k

from .test_beam_search import LETTERS, P
from .toy_language import Table


@pytest.mark.parametrize(("drawn", "right", "k"), [(5, 2, 1), (6, 3, 2), (7, 1, 7), (5, 0, 3), (5, 5, 1), (4, 2, 0)])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_text(drawn, right, k):
    texts = [True] * right + [False] * (drawn - right)
    share = np.mean([any(chosen) for chosen in itertools.combinations(texts, k)])
    assert math.isclose(pass_at_k(drawn, right, k), share)


def test_more_than_was_drawn_is_refused():
    with pytest.raises(ValueError, match="k=4"):
        pass_at_k(3, 1, 4)


class Verifier:
    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += [(t.problem, str(t)) for t in texts]
        return torch.tensor([float(t.completion.startswith("b")) for t in texts])


SAMPLE = Sample(n=8, max_new_tokens=4)
DECODERS = {
    "greedy": Greedy(max_new_tokens=4),
    "beam": BeamSearch(num_beams=2, max_new_tokens=4),
    "drawn": SAMPLE,
    "best": BestOfN(SAMPLE, final=Verifier()),
    "likeliest": BestOfN(SAMPLE),
}
BUDGETS = [2, 4, 8, 16]


@pytest.fixture(scope="module")
def measured():
    model, verifier = Table(P), Verifier()
    return compute_curve(DECODERS, ["a", "b", "c"], verifier, BUDGETS, model=model, tokenizer=LETTERS), verifier, model


def test_no_point_spends_more_than_its_budget(measured):
    curve, _, _ = measured
    assert [(p.decoder, p.budget) for p in curve.points] == list(itertools.product(DECODERS, BUDGETS))
    for point in curve.points:
        assert all(account.tokens <= point.budget for account in point.usage)
        assert all(c in (0.0, 1.0) for c in point.right)


def test_the_selectors_share_one_pool_and_every_text_is_verified_once(measured):
    curve, verifier, model = measured
    assert len(verifier.asked) == len(set(verifier.asked))
    best, drawn = curve.of("best"), curve.of("drawn")
    assert [p.covered for p in best] == [p.covered for p in drawn]
    before = model.positions
    compute_curve(
        {"drawn": SAMPLE, "best": DECODERS["best"]}, ["a"], Verifier(), BUDGETS, model=model, tokenizer=LETTERS
    )
    once = model.positions - before
    SAMPLE.decode(model, LETTERS, ["a"])
    assert model.positions - before == 2 * once


def test_the_verifier_as_scorer_reaches_what_was_bought(measured):
    curve, _, _ = measured
    pool = SAMPLE.decode(Table(P), LETTERS, ["a", "b", "c"]).pool
    for point in curve.of("best"):
        for texts, right in zip(pool, point.right, strict=True):
            spent, bought = 1, []
            for h in texts:
                spent += len(h.tokens) - 1
                if spent > point.budget:
                    break
                bought.append(h.draft.completion.startswith("b"))
            assert right == any(bought)


def test_a_paired_difference_has_an_interval_around_it(measured):
    curve, _, _ = measured
    gap, low, high = curve.difference("best", "likeliest", 16)
    a, b = curve.of("best")[-1].right, curve.of("likeliest")[-1].right
    assert math.isclose(gap, (sum(a) - sum(b)) / 3)
    assert low <= gap <= high
    assert curve.difference("best", "best", 16) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_mean_is_that_of_its_error():
    curve = compute_curve({"g": Greedy(max_new_tokens=1)}, ["a"], Verifier(), [4], model=Table(P), tokenizer=LETTERS)
    values = [1.0] * 50 + [0.0] * 50
    low, high = curve.interval(values)
    assert abs(low - (0.5 - 1.96 * 0.05)) < 0.02
    assert abs(high - (0.5 + 1.96 * 0.05)) < 0.02


def test_the_table_and_the_figure_show_every_decoder(measured):
    curve, _, _ = measured
    assert len(curve.table().rows) == len(curve.points)
    axes = curve.figure().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(DECODERS)


@pytest.mark.parametrize("budgets", [[], [0], [1.5]])
def test_budgets_are_whole_numbers(budgets):
    with pytest.raises(ValueError, match="whole numbers"):
        compute_curve(DECODERS, ["a"], Verifier(), budgets, model=Table(P), tokenizer=LETTERS)

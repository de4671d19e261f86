"""A curve compares decoders at equal budgets, on one pool, without bias."""

import itertools
import math

import pytest
import torch

from lightning_peft.budget import Budget
from lightning_peft.decoding import MBR, BeamSearch, BestOfN, Greedy, Sample, SelfConsistency, compute_curve
from lightning_peft.decoding.compute_curve import bootstrap_band, pass_at_k
from lightning_peft.decoding.draft import Draft
from tests.decoding.searched import MANY_ENDS, PROMPTS, Counting, model
from tests.prompts.language_nets import tokenizer


def has_letter(texts):
    return [bool(set("ae") & set(text.completion)) for text in texts]


def lengths(texts):
    return torch.tensor([float(len(text.completion)) for text in texts])


@pytest.mark.parametrize(("n", "correct"), [(4, 0), (4, 1), (5, 3), (5, 5)])
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one(n, correct):
    right = [place < correct for place in range(n)]
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(right, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
        assert pass_at_k(n, correct, k) == pytest.approx(1 - math.prod((n - correct - i) / (n - i) for i in range(k)))


def test_selectors_share_one_pool_that_is_drawn_once():
    net = Counting(model(scale=4.0))
    decoders = {
        "likely": BestOfN(n=6, max_new_tokens=8),
        "longest": BestOfN(n=6, final=lengths, max_new_tokens=8),
        "vote": SelfConsistency(n=6, max_new_tokens=8),
        "mbr": MBR(n=6, max_new_tokens=8),
    }
    curve = compute_curve(decoders, PROMPTS, has_letter, [8, 1000], model=net, tokenizer=tokenizer(), resamples=50)
    assert sum(width > 1 or rows == len(PROMPTS) for rows, width in net.shapes[:1]) == 1
    assert len(net.shapes) == 8  # one pool of eight tokens
    for budget in (8, 1000):
        rows = [row for row in curve.rows if row.budget == budget]
        assert len({(row.coverage, row.tokens) for row in rows}) == 1
        assert all(row.tokens <= budget for row in rows)
    assert {row.scorer_calls > 0 for row in curve.rows if row.decoder == "longest"} == {True}


def test_prompts_that_know_their_problem_keep_it():
    net, decoders = model(scale=4.0), {"longest": BestOfN(n=4, final=lengths, max_new_tokens=8)}
    drafts = [Draft("", prompt=prompt, problem=7 + place) for place, prompt in enumerate(PROMPTS)]
    shared, seen = {"model": net, "tokenizer": tokenizer()}, set()

    def verifier(texts):
        seen.update(text.problem for text in texts)
        return [True] * len(texts)

    (row,) = compute_curve(decoders, drafts, verifier, [1000], cut_counts=True, **shared).rows
    assert row.scorer_calls > 0
    assert seen == {7, 8, 9}


def test_with_all_samples_coverage_is_the_oracle_s_and_selected_never_more():
    net, sample = model(scale=2.0, ends=MANY_ENDS), Sample(n=6, max_new_tokens=8)
    pools = sample.decode(net, tokenizer(), PROMPTS).pool
    right = [[one.finished and bool(set("ae") & set(one.text)) for one in pool] for pool in pools]
    assert 0 < sum(map(sum, right)) < sum(map(len, right))
    decoders = {"first": sample, "likely": BestOfN(n=6, max_new_tokens=8)}
    rows = compute_curve(decoders, PROMPTS, has_letter, [10_000], model=net, tokenizer=tokenizer()).rows
    assert rows[0].selected == pytest.approx(sum(one[0] for one in right) / 3)
    assert rows[0].coverage == pytest.approx(sum(map(any, right)) / 3)
    assert all(row.selected <= row.coverage for row in rows)


def test_a_budget_pays_for_the_first_samples_and_coverage_is_pass_at_k_of_as_many():
    net, sample = model(scale=2.0), Sample(n=6, max_new_tokens=8)
    ((*pool,),) = sample.decode(net, tokenizer(), PROMPTS[:1]).pool
    budget = pool[0].tokens + pool[1].tokens
    paid = next(k for k in range(6, 0, -1) if sum(one.tokens for one in pool[:k]) <= budget)
    assert paid < 5

    def is_last(texts):
        return [text == pool[-1].draft for text in texts]

    shared = {"model": net, "tokenizer": tokenizer(), "cut_counts": True}
    (row,) = compute_curve({"s": sample}, PROMPTS[:1], is_last, [budget], **shared).rows
    # One of six is right, and not among those that are paid for: the chance is that of any so many of the six.
    assert row.coverage == pytest.approx(paid / 6)
    assert row.selected == 0
    assert row.tokens == sum(one.tokens for one in pool[:paid])


def test_a_search_is_held_to_each_budget_and_cut_texts_are_wrong_unless_they_count():
    net = model(scale=4.0, ends=[])
    decoders = {"beam": BeamSearch(num_beams=3, max_new_tokens=20), "greedy": Greedy(max_new_tokens=20)}
    shared = {"model": net, "tokenizer": tokenizer()}
    rows = compute_curve(decoders, PROMPTS, lambda texts: [True] * len(texts), [9, 30], **shared).rows
    assert all(0 < row.tokens <= row.budget for row in rows)
    assert {row.selected for row in rows} == {0.0}
    rows = compute_curve(decoders, PROMPTS, lambda texts: [True] * len(texts), [9, 30], cut_counts=True, **shared).rows
    assert {(row.selected, row.coverage) for row in rows} == {(1.0, 1.0)}


def test_a_band_is_that_of_resampled_means():
    values = torch.tensor([0.0, 1.0] * 50, dtype=torch.float64)
    low, high = bootstrap_band(values, 4000)
    # The mean of 100 fair coins has the standard error 0.05.
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_a_table_and_a_picture_show_every_row():
    curve = compute_curve(
        {"greedy": Greedy(max_new_tokens=4), "sample": Sample(n=2, max_new_tokens=4)},
        PROMPTS,
        has_letter,
        [4, 8],
        model=model(),
        tokenizer=tokenizer(),
        resamples=20,
    )
    assert [row[:2] for row in curve.table().rows] == [
        ("greedy", "4"), ("greedy", "8"), ("sample", "4"), ("sample", "8"),
    ]  # fmt: skip
    (axes,) = curve.figure().axes
    assert [line.get_label() for line in axes.lines[::2]] == ["greedy", "sample"]
    assert len(axes.collections) == 2


class Other:
    def decode(self, model, tokenizer, prompts):
        raise AssertionError


def test_what_cannot_be_compared_is_refused():
    shared = {"model": model(), "tokenizer": tokenizer()}
    with pytest.raises(ValueError, match="0 prompts"):
        compute_curve({"greedy": Greedy()}, [], has_letter, [4], **shared)
    with pytest.raises(ValueError, match="give a list of prompts"):
        compute_curve({"greedy": Greedy()}, "It is", has_letter, [4], **shared)
    with pytest.raises(ValueError, match="'other' is a Other without a budget"):
        compute_curve({"other": Other()}, PROMPTS, has_letter, [4], **shared)
    with pytest.raises(ValueError, match="k=3"):
        pass_at_k(2, 1, 3)
    assert Greedy().budget == Budget()

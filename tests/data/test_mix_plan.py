"""Plans of old and new rows: the share is exact after every step, every row has its turn, ranks split the same rows."""

import math
from collections import Counter
from fractions import Fraction

import pytest

from lightning_peft.data.beside_plan import BesidePlan
from lightning_peft.data.mix_plan import MixPlan
from lightning_peft.data.ratio import exact
from lightning_peft.data.streams import Stream, key, permutation, rank_slice

RATIOS = [Fraction(1, 100), Fraction(1, 20), Fraction(1, 5), Fraction(1, 4), Fraction(3, 10)]
BATCHES = [6, 8, 32]


def mix(new=97, memory=13, ratio=Fraction(1, 5), batch=8, **options) -> MixPlan:
    return MixPlan(new, Stream(memory, options.get("seed", 0)), ratio, batch, **options)


def beside(new=97, memory=13, ratio=Fraction(1, 5), batch=8, **options) -> BesidePlan:
    return BesidePlan(new, Stream(memory, options.get("seed", 0)), ratio, batch, **options)


def rows(plan: MixPlan, epochs: int = 1, start: int = 0) -> list[tuple[bool, int]]:
    return [row for epoch in range(start, start + epochs) for n in range(plan.steps) for row in plan.step(epoch, n)]


def drawn(plan: BesidePlan, epoch: int, number: int) -> list[int]:
    """What all ranks draw together, without the rows of weight 0."""
    shares = [plan.share(epoch, number, rank) for rank in range(plan.world)]
    return [row for own, weight in shares if weight for row in own]


def even(ratio: Fraction, k: int) -> int:
    """So many new rows that an epoch comes out even: with its old rows it has ``k * denominator`` rows."""
    return (ratio.denominator - ratio.numerator) * k


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_after_every_step_the_old_rows_are_the_ratio_of_all_rows_to_below_one(ratio, batch, drop_last, limit):
    plan = mix(ratio=ratio, batch=batch, drop_last=drop_last, limit=limit)
    old = total = 0
    for epoch in range(4):
        for number in range(plan.steps):
            step = plan.step(epoch, number)
            old, total = old + sum(is_old for is_old, _ in step), total + len(step)
            assert abs(old - ratio * total) < 1
            assert plan.old_before(total) == old
    assert total == 4 * plan.rows


@pytest.mark.parametrize("new", [16, 97, 120])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_an_epoch_is_one_pass_of_the_new_rows_rounded_up_or_down_with_drop_last(ratio, batch, new):
    passes = Fraction(new) / ((1 - ratio) * batch)
    assert mix(new, ratio=ratio, batch=batch).steps == math.ceil(passes)
    assert mix(new, ratio=ratio, batch=batch, drop_last=True).steps == math.floor(passes)


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_step_is_a_full_batch_except_a_last_one_that_drop_last_leaves_out(drop_last):
    plan = mix(new=97, drop_last=drop_last)  # 121.25 rows: 15 batches of 8 and a rest
    sizes = [len(plan.step(1, number)) for number in range(plan.steps)]
    assert sizes[:15] == [8] * 15
    assert sizes[15:] == ([] if drop_last else [2])


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_new_row_comes_exactly_once_an_epoch_when_it_comes_out_even(ratio):
    plan = mix(new=even(ratio, 3), ratio=ratio)
    for epoch in range(3):
        new = [index for old, index in rows(plan, start=epoch) if not old]
        assert sorted(new) == list(range(plan.new))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("new", [7, 50, 97])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_new_row_comes_at_least_once_and_at_most_one_per_process_comes_twice(ratio, new, world):
    plan = mix(new=new, ratio=ratio, world=world)
    for epoch in range(4):
        counts = Counter(index for old, index in rows(plan, start=epoch) if not old)
        assert set(counts) == set(range(new))
        assert set(counts.values()) <= {1, 2}
        assert counts.total() - new <= world


def test_every_pass_of_the_new_rows_has_an_order_of_its_own():
    plan = mix(new=64, ratio=Fraction(1, 5))
    orders = [[index for old, index in rows(plan, start=epoch) if not old] for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert sorted(orders[0]) not in orders


def test_without_shuffle_the_new_rows_keep_their_order_and_only_the_old_ones_are_shuffled():
    plan = mix(new=64, ratio=Fraction(1, 5), shuffle=False)
    assert [index for old, index in rows(plan, epochs=2) if not old] == [*range(64), *range(64)]
    assert [index for old, index in rows(plan) if old][:13] != list(range(13))


def test_without_shuffle_every_epoch_begins_with_the_first_row_also_where_it_does_not_come_out_even():
    plan = mix(new=97, ratio=Fraction(3, 10), shuffle=False)
    for epoch in range(4):
        new = [index for old, index in rows(plan, start=epoch) if not old]
        assert new[:97] == list(range(97))
        assert new[97:] in ([], [0])


def test_old_rows_come_once_a_pass_in_a_new_order_every_pass_also_across_epochs():
    plan = mix(new=40, memory=7, ratio=Fraction(1, 5))  # ten old rows an epoch: passes end inside epochs
    old = [index for is_old, index in rows(plan, epochs=7) if is_old]
    passes = [tuple(old[i : i + 7]) for i in range(0, 70, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len(set(passes)) == len(passes)


def test_a_seed_decides_both_orders():
    first, again, other = (rows(mix(new=64, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    for stream in (True, False):
        assert [row for row in first if row[0] is stream] != [row for row in other if row[0] is stream]


def test_streams_and_passes_share_no_order():
    orders = [
        tuple(permutation(30, seed, stream, n)) for seed in (0, 1) for stream in ("new", "memory") for n in (0, 1)
    ]
    assert len(set(orders)) == 8
    assert key(1, "new", 2) != key(1, "new2")


@pytest.mark.parametrize("ratio", RATIOS)
def test_any_number_of_processes_sees_the_same_rows_step_by_step(ratio):
    one = mix(new=even(ratio, 4), ratio=ratio, batch=8)
    for world in (2, 4):
        several = one.for_world(world, 8 // world)
        assert several.steps == one.steps
        for epoch in range(2):
            for number in range(one.steps):
                shares = [several.share(epoch, number, rank) for rank in range(world)]
                assert Counter(row for share in shares for row in share) == Counter(one.step(epoch, number))
                # Equal counts, or the loader of one process would run out before that of another.
                assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_process_has_full_batches_until_the_last_step(world):
    plan = mix(new=97, ratio=Fraction(3, 10), batch=8, world=world)
    sizes = {len(plan.share(0, number, rank)) for number in range(plan.steps - 1) for rank in range(world)}
    assert sizes == {8 // world}


def test_which_process_takes_which_part_changes_from_step_to_step():
    plan = mix(new=160, batch=8, world=2)  # 25 full steps
    first_half = {plan.share(0, n, 0) == plan.step(0, n)[:4] for n in range(plan.steps)}
    assert first_half == {True, False}


@pytest.mark.parametrize("turn", range(5))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", range(10))
def test_the_slices_of_all_ranks_cover_all_once_and_differ_by_at_most_one(count, world, turn):
    slices = [rank_slice(count, rank, world, turn) for rank in range(world)]
    parts = [list(range(count))[part] for part in slices]
    assert sorted(thing for part in parts for thing in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_cut_plan_begins_every_epoch_like_the_whole_one_but_counts_only_its_own_rows():
    whole = mix(new=64, ratio=Fraction(1, 4))
    cut = whole.cut_to(3)
    assert (cut.steps, cut.rows) == (3, 24)
    assert [cut.step(0, n) for n in range(3)] == [whole.step(0, n) for n in range(3)]
    assert len(cut.step(1, 0)) == 8


def test_a_plan_for_other_processes_is_not_cut_any_more():
    assert mix().cut_to(2).for_world(2, 4).steps == mix().for_world(2, 4).steps


@pytest.mark.parametrize("new", [16, 97])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_beside_the_old_rows_are_the_ratio_of_all_rows_to_below_one_after_every_step(ratio, batch, new):
    plan = beside(new=new, ratio=ratio, batch=batch)
    old = fresh = 0
    for epoch in range(4):
        for number in range(plan.steps):
            old += len(drawn(plan, epoch, number))
            fresh += min(batch, new - number * batch)
            assert abs(old - ratio * (old + fresh)) < 1
            assert plan.bounds(epoch, number)[1] == plan.bounds(epoch, number + 1)[0] == old
    assert fresh == 4 * new


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("ratio", RATIOS)
def test_beside_any_number_of_processes_draws_the_same_rows_and_splits_them_to_within_one(ratio, world):
    one, several = beside(ratio=ratio), beside(ratio=ratio, world=world)
    for epoch in range(2):
        for number in range(one.steps):
            assert sorted(drawn(several, epoch, number)) == sorted(drawn(one, epoch, number))
            counts = [
                len(own) if weight else 0 for own, weight in (several.share(epoch, number, r) for r in range(world))
            ]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("ratio", RATIOS)
def test_beside_the_average_of_weighted_rank_means_is_the_mean_over_all_rows(ratio, world):
    plan = beside(ratio=ratio, world=world)
    for number in range(plan.steps):
        shares = [plan.share(0, number, rank) for rank in range(world)]
        if not any(own for own, _ in shares):
            assert shares == [([], 0.0)] * world
            continue
        # Collective operations in the loss need every process to have a row, if one of weight 0.
        assert all(own for own, _ in shares)
        assert sum(weight for _, weight in shares) == pytest.approx(world, abs=1e-12)
        values = {row: row**2 + 1 for own, _ in shares for row in own}
        means = [weight * sum(values[row] for row in own) / len(own) for own, weight in shares]
        whole = drawn(plan, 0, number)
        assert sum(means) / world == pytest.approx(sum(values[row] for row in whole) / len(whole))


def test_beside_one_process_weighs_its_rows_with_one():
    plan = beside(ratio=Fraction(1, 2))
    assert {plan.share(0, number, 0)[1] for number in range(plan.steps)} == {1.0}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("ratio", [Fraction(1, 20), Fraction(1, 4)])
def test_beside_the_endless_batches_from_any_step_are_the_steps_that_have_rows(ratio, rank):
    plan = beside(ratio=ratio, world=2)
    places = [(epoch, number) for epoch in range(3) for number in range(plan.steps)]
    for start in (0, 5, plan.steps - 1, plan.steps, 2 * plan.steps - 1):
        expected = [own for place in places[start:] if (own := plan.share(*place, rank)[0])]
        batches = plan.batches(*places[start], rank)
        assert [next(batches) for _ in expected] == expected


@pytest.mark.parametrize(
    ("ratio", "fraction"),
    [(0.01, "1/100"), (0.05, "1/20"), (0.2, "1/5"), (0.3, "3/10"), (1 / 3, "1/3"), (Fraction(2, 7), "2/7")],
)
def test_a_ratio_is_the_fraction_that_was_meant(ratio, fraction):
    assert exact(ratio, "Owner") == Fraction(fraction)


@pytest.mark.parametrize("ratio", [1e-7, 1 - 1e-7, 5e-324])
def test_a_ratio_near_the_ends_stays_inside(ratio):
    assert 0 < exact(ratio, "Owner") < 1


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, -0.2, 20, float("nan"), float("inf"), "0.2", None, True])
def test_a_ratio_outside_is_refused_with_its_value_and_the_range(ratio):
    with pytest.raises(ValueError, match=r"Owner: ratio=.* must lie inside \(0, 1\)") as error:
        exact(ratio, "Owner")
    assert repr(ratio) in str(error.value)

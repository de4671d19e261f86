"""The mixed loader gives the plan's rows, and is otherwise the loader it replaces."""

from fractions import Fraction

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_peft.data.mix_loader import MixLoader, MixSampler, carried_options, row_count, shuffles
from lightning_peft.data.mix_plan import MixPlan
from lightning_peft.data.streams import Stream

NEW, OLD = list(range(40)), list(range(1000, 1007))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(NEW)


def plan(**options) -> MixPlan:
    return MixPlan(len(NEW), Stream(len(OLD), 0), **{"ratio": Fraction(1, 5), "batch": 8, **options})


def mixed(made: MixPlan, rank: int = 0, **options) -> MixLoader:
    return MixLoader(DataLoader(NEW, 8 // made.world, shuffle=True, **options), OLD, made, rank)


def batches(loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def values(rows: list[tuple[bool, int]]) -> list[int]:
    return [OLD[index] if old else NEW[index] for old, index in rows]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"ratio": Fraction(3, 10)}, {"drop_last": True, "ratio": Fraction(3, 10)}])
def test_batches_are_the_steps_of_the_plan_epoch_after_epoch(options, workers):
    made = plan(**options)
    loader = mixed(made, num_workers=workers)
    for epoch in range(2):
        loader.mix_sampler.set_epoch(epoch)
        assert batches(loader) == [values(made.step(epoch, number)) for number in range(made.steps)]
        assert len(loader) == made.steps


@pytest.mark.parametrize("ratio", [Fraction(1, 5), Fraction(3, 10)])
def test_the_batches_of_two_processes_are_their_shares(ratio):
    made = plan(world=2, ratio=ratio)
    loaders = [mixed(made, rank) for rank in (0, 1)]
    assert len(loaders[0]) == len(loaders[1]) == made.steps
    for number, pair in enumerate(zip(*map(batches, loaders), strict=True)):
        assert [values(made.share(0, number, rank)) for rank in (0, 1)] == list(pair)


@pytest.mark.parametrize("step", [0, 1, 4, 6])
def test_a_loader_sent_to_a_step_goes_on_there_and_begins_the_next_epoch_at_its_start(step):
    whole, resumed = mixed(plan()), mixed(plan())
    whole.mix_sampler.set_epoch(2)
    resumed.mix_sampler.go_to(2, step)
    assert batches(resumed) == batches(whole)[step:]
    for loader in (whole, resumed):
        loader.mix_sampler.set_epoch(3)
    assert batches(resumed) == batches(whole)


def test_the_loader_takes_no_number_from_the_generator_of_the_run():
    state = torch.get_rng_state()
    batches(mixed(plan()))
    assert torch.equal(torch.get_rng_state(), state)


def double(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows) * 2


def test_everything_else_is_as_in_the_loader_it_replaces():
    loader = DataLoader(
        NEW,
        8,
        True,
        collate_fn=double,
        num_workers=2,
        timeout=7,
        prefetch_factor=3,
        persistent_workers=True,
        pin_memory=True,
    )
    ours = MixLoader(loader, OLD, plan())
    assert carried_options(ours) == carried_options(loader)
    assert (ours.collate_fn, ours.num_workers, ours.timeout, ours.prefetch_factor) == (double, 2, 7, 3)
    assert ours.persistent_workers
    assert ours.pin_memory
    assert ours.batch_size == 8


def test_a_collate_function_of_the_users_own_sees_the_mixed_rows():
    made = plan()
    assert batches(mixed(made, collate_fn=double))[0] == [2 * value for value in values(made.step(0, 0))]


@pytest.mark.parametrize(
    ("loader", "answer"),
    [
        (DataLoader(NEW, 4, shuffle=True), True),
        (DataLoader(NEW, 4), False),
        (DataLoader(NEW, 4, sampler=DistributedSampler(NEW, 2, 0, shuffle=True)), True),
        (DataLoader(NEW, 4, sampler=DistributedSampler(NEW, 2, 0, shuffle=False)), False),
        (DataLoader(NEW, 4, sampler=RandomSampler(NEW)), True),
    ],
)
def test_whether_a_loader_shuffles_is_seen_from_its_sampler(loader, answer):
    assert shuffles(loader, "Owner") is answer


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(NEW, 4, sampler=WeightedRandomSampler([1.0] * 40, 40)),
        DataLoader(NEW, 4, sampler=SubsetRandomSampler(range(10))),
        DataLoader(NEW, 4, sampler=RandomSampler(NEW, replacement=True)),
        DataLoader(NEW, 4, sampler=RandomSampler(NEW, num_samples=12)),
        DataLoader(NEW, batch_sampler=BatchSampler(SequentialSampler(NEW), 4, drop_last=False)),
        DataLoader(NEW, batch_size=None),
    ],
    ids=["weighted", "subset", "replacement", "num_samples", "batch_sampler", "no batches"],
)
def test_an_order_of_the_users_own_is_not_silently_replaced(loader):
    with pytest.raises(ValueError, match=r"Owner: the training loader has a \w+Sampler .*shuffle=True or False"):
        shuffles(loader, "Owner")


def test_rows_are_counted():
    assert row_count(OLD, "Owner") == 7


@pytest.mark.parametrize(
    ("dataset", "message"), [([], "list is empty"), (Endless(), "Endless has no length"), (5, "int has no length")]
)
def test_data_without_rows_or_without_a_length_are_refused(dataset, message):
    with pytest.raises(ValueError, match=f"Owner: .*{message}"):
        row_count(dataset, "Owner")


def test_lightning_leaves_the_sampler_alone():
    assert isinstance(mixed(plan()).sampler, MixSampler)
    assert isinstance(mixed(plan()).sampler, DistributedSampler)

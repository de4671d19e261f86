"""A loader that mixes old rows into the batches of another loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from typing_extensions import override

from lightning_peft.data.beside_plan import BesidePlan
from lightning_peft.data.mix_plan import MixPlan
from lightning_peft.data.ratio import Curve

# What a user may pass as rows. Bare on purpose: of a ``Dataset[Any]`` in a signature jsonargparse makes a plain
# ``Dataset``, whatever class the YAML names.
Rows: TypeAlias = Dataset | DataLoader  # type: ignore[type-arg]

_CARRIED = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
)


def carried_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the options of a loader that a loader derived from it should have too."""
    return {name: getattr(loader, name) for name in _CARRIED}


def row_count(dataset: object, owner: str) -> int:
    """Return the length of a map-style dataset.

    Raises:
        ValueError: If it is iterable only, or empty.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(f"{owner}: {type(dataset).__name__} has no length; a map-style dataset is needed.")
    rows = len(dataset)
    if rows == 0:
        raise ValueError(f"{owner}: the {type(dataset).__name__} is empty; it needs at least one row.")
    return rows


def shuffles(loader: DataLoader[Any], owner: str) -> bool:
    """Return whether a loader shuffles.

    Raises:
        ValueError: If a sampler of the user's own decides the order, which mixing would silently replace.
    """
    sampler = loader.sampler
    known = isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler)
    partial = isinstance(sampler, RandomSampler) and (
        sampler.replacement or sampler.num_samples != len(cast("Any", loader.dataset))
    )
    if loader.batch_size is None or not known or partial:
        raise ValueError(
            f"{owner}: the training loader has a {type(sampler).__name__} (batch_size={loader.batch_size!r}), whose "
            "order mixing would replace. Use shuffle=True or False with a batch_size, or give the module a "
            "replay_step, which leaves the loader as it is."
        )
    return sampler.shuffle if isinstance(sampler, DistributedSampler) else isinstance(sampler, RandomSampler)


class Both(Dataset[Any]):
    """New rows, and behind them the old ones. Asks each dataset for many rows at once if it can give them."""

    def __init__(self, new: Any, old: Any) -> None:
        self.new, self.old, self.first_old = new, old, len(new)
        if hasattr(new, "__getitems__") or hasattr(old, "__getitems__"):
            self.__getitems__ = self._many  # torch looks for it on the instance

    def __len__(self) -> int:
        return self.first_old + len(self.old)

    def __getitem__(self, index: int) -> Any:
        return self.new[index] if index < self.first_old else self.old[index - self.first_old]

    def _many(self, indices: list[int]) -> list[Any]:
        first = self.first_old
        rows = {False: [i for i in indices if i < first], True: [i - first for i in indices if i >= first]}
        found = {
            old: iter(data.__getitems__(rows[old]) if hasattr(data, "__getitems__") else [data[i] for i in rows[old]])
            for old, data in ((False, self.new), (True, self.old))
        }
        return [next(found[index >= first]) for index in indices]


class MixSampler(DistributedSampler[Any]):
    """The rows of a :class:`MixPlan` for one process, one index after the other.

    Lightning leaves a ``DistributedSampler`` alone, and tells it the epoch.
    """

    block = 64
    """Steps that are planned at once."""

    def __init__(self, dataset: Dataset[Any], plan: MixPlan, rank: int) -> None:
        super().__init__(dataset, num_replicas=plan.world, rank=rank, seed=plan.seed)
        self.plan = plan
        self.resume_at: tuple[int, int] = (0, 0)
        """Epoch and step at which a resumed run goes on."""

    def go_to(self, epoch: int, step: int) -> None:
        """Let the next iteration begin at a step of an epoch."""
        self.resume_at = (epoch, step)
        self.set_epoch(epoch)

    @override
    def __iter__(self) -> Iterator[int]:
        plan = self.plan
        steps = (
            1 if isinstance(plan.ratio, Curve) else self.block
        )  # a ratio that is steered may change before the next step
        first = self.resume_at[1] if self.epoch == self.resume_at[0] else 0
        for begin in range(first, plan.steps, steps):
            end = min(begin + steps, plan.steps)
            old, index = plan.block(self.epoch, begin, end)
            index = index + plan.new * old
            for number in range(begin, end):
                step = index[(number - begin) * plan.batch : (number - begin + 1) * plan.batch]
                yield from step[plan.slice(self.epoch, number, len(step), self.rank)].tolist()

    @override
    def __len__(self) -> int:
        # Of the whole epoch: Lightning itself applies limit_train_batches to the length.
        return replace(self.plan, limit=None).rows // self.plan.world


class SameMixSampler(MixSampler, SequentialSampler):
    """The rows of the first epoch, again and again: what ``overfit_batches`` asks for.

    Lightning puts a ``SequentialSampler`` into such runs, unless one is there.
    """

    @override
    def set_epoch(self, epoch: int) -> None:
        """Stay in the first epoch."""


class MixLoader(DataLoader[Any]):
    """Batches of new and old rows after a plan; everything else is as in the loader it replaces.

    Args:
        loader: The loader of the new rows.
        memory: The old rows; they must collate with the new ones.
        plan: Which rows make up which batch.
        rank: Number of this process.
        same: Whether every epoch is the first one.
    """

    def __init__(
        self, loader: DataLoader[Any], memory: Dataset[Any], plan: MixPlan, rank: int = 0, *, same: bool = False
    ) -> None:
        dataset = Both(loader.dataset, memory)
        super().__init__(
            dataset,
            batch_size=plan.batch // plan.world,
            sampler=(SameMixSampler if same else MixSampler)(dataset, plan, rank),
            generator=torch.Generator().manual_seed(plan.seed),  # worker seeds: not from the run's generator
            **carried_options(loader),
        )

    @property
    def mix_sampler(self) -> MixSampler:
        """The sampler, with its type."""
        assert isinstance(self.sampler, MixSampler)
        return self.sampler

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that this loader resumes; the position itself is in the callback's state.

        A loader's own count runs ahead of training by the batches that were fetched but not used yet.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: see :meth:`state_dict`."""


class BesideSampler:
    """The replay batches of one process from a step on, without end, as a batch sampler.

    Args:
        plan: How many old rows come beside which step.
        epoch: Counted from 0.
        step: The first step within that epoch, counted from 0.
        rank: Number of this process.
    """

    def __init__(self, plan: BesidePlan, epoch: int, step: int, rank: int) -> None:
        self.start = plan, epoch, step, rank

    def __iter__(self) -> Iterator[list[int]]:
        plan, epoch, step, rank = self.start
        return plan.batches(epoch, step, rank)

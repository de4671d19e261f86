"""Old rows among the rows of an iterable dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from typing_extensions import override

from lightning_peft.data.mix_loader import carried_options
from lightning_peft.data.mix_plan import MixPlan


class MixStream(IterableDataset[Any]):
    """The rows of an iterable dataset, with old rows at the places that a plan gives them, until the new ones end.

    Each worker process makes every ``workers``-th batch, from new rows of its own: how an iterable dataset is divided over
    workers and processes is its own affair.

    Args:
        new: Gives the new rows.
        memory: The old rows.
        plan: Which rows of a step are old; its epoch 0 is the whole run.
        rank: Number of this process.
    """

    def __init__(self, new: IterableDataset[Any], memory: Dataset[Any], plan: MixPlan, rank: int) -> None:
        self.new, self.memory, self.plan, self.rank = new, memory, plan, rank
        self.first = 0
        """The step with which the next pass begins."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        step, stride = (self.first, 1) if info is None else (self.first + info.id, info.num_workers)
        rows = iter(self.new)
        while True:
            for old, index in self.plan.share(0, step, self.rank):
                if old:
                    yield self.memory[index]
                    continue
                try:
                    row = next(rows)
                except StopIteration:
                    return
                yield row
            step += stride


class MixStreamLoader(DataLoader[Any]):
    """Batches of new and old rows from an iterable dataset; everything else is as in the loader it replaces.

    Args:
        loader: The loader of the new rows.
        memory: The old rows; they must collate with the new ones.
        plan: Which rows of a step are old.
        rank: Number of this process.
    """

    def __init__(self, loader: DataLoader[Any], memory: Dataset[Any], plan: MixPlan, rank: int = 0) -> None:
        options = carried_options(loader) | {"persistent_workers": False}  # each pass tells the workers where it begins
        super().__init__(
            MixStream(loader.dataset, memory, plan, rank),  # type: ignore[arg-type]
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            generator=torch.Generator().manual_seed(plan.seed),
            **options,
        )

    @property
    def stream(self) -> MixStream:
        """The dataset, with its type."""
        assert isinstance(self.dataset, MixStream)
        return self.dataset

    @override
    def __len__(self) -> int:
        raise TypeError("MixStreamLoader: how many rows an iterable dataset has is not known.")

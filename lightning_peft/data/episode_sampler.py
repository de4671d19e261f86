"""Which rows make up which episode: a pure function of (seed, epoch, number), on any number of processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DistributedSampler
from typing_extensions import override

from lightning_peft.counts import check_counts
from lightning_peft.distributed import rank, world_size


class EpisodeKey(NamedTuple):
    """What an episode is drawn from."""

    seed: int
    epoch: int
    number: int

    def generator(self) -> np.random.Generator:
        """Return a generator of this episode's own."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self)))


class EpisodeRows(NamedTuple):
    """An episode as row numbers, class by class: the label of class ``c`` is its place in ``classes``."""

    support: tuple[tuple[int, ...], ...]
    query: tuple[tuple[int, ...], ...]
    classes: tuple[Hashable, ...]


class TaskSampler(DistributedSampler[EpisodeKey]):
    """Number the episodes of an epoch; process ``r`` of ``n`` gets numbers ``r``, ``r + n``, ...

    So the meta-step of all processes together holds the episodes that one process would have in it. Lightning leaves a
    ``DistributedSampler`` alone, and tells it the epoch.

    Args:
        episodes: Episodes of an epoch, over all processes.
        seed: Another seed gives other episodes.
        fixed: Whether every epoch has the same ones: for validation and test.

    Raises:
        ValueError: If there are none; when iterated, if the processes cannot have equally many.

    >>> [key.number for key in TaskSampler(3, seed=0)]
    [0, 1, 2]
    """

    def __init__(self, episodes: int, *, seed: int = 0, fixed: bool = False) -> None:
        if episodes < 1:
            raise ValueError(f"{type(self).__name__}: episodes={episodes!r} must be at least 1.")
        self.episodes, self.seed, self.fixed, self.epoch, self.skip = episodes, seed, fixed, 0, 0

    @override
    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.skip = 0
        self.epoch = epoch

    @override
    def __len__(self) -> int:
        processes = world_size()
        if self.episodes % processes:
            fewer = self.episodes - self.episodes % processes
            raise ValueError(
                f"{type(self).__name__}: episodes={self.episodes} cannot be shared equally by {processes} processes, and a process "
                f"with one less would be waited for for ever. Use {fewer or processes} or {fewer + processes}."
            )
        return self.episodes // processes

    @override
    def __iter__(self) -> Iterator[Any]:
        epoch, skip, self.skip = (0 if self.fixed else self.epoch), self.skip, 0
        for turn in range(skip // world_size(), len(self)):
            yield self.draw(EpisodeKey(self.seed, epoch, turn * world_size() + rank()))

    def draw(self, key: EpisodeKey) -> Any:
        """Return the episode of a key; here the key itself, from which a data set makes a task."""
        return key


class EpisodeSampler(TaskSampler):
    """Draw N-way K-shot episodes: classes, and of each support rows and other query rows, without replacement.

    Args:
        labels: The class of every row: numbers, texts, or a tensor of them.
        n_way: Classes of an episode, in random order.
        k_shot: Support rows of each.
        n_query: Query rows of each.
        episodes: Episodes of an epoch, over all processes.
        seed: Another seed gives other episodes.
        fixed: Whether every epoch has the same ones: for validation and test.

    Raises:
        ValueError: For sizes below 1, and if too few classes have enough rows.

    >>> sampler = EpisodeSampler(["a", "a", "b", "b", "c"], n_way=2, k_shot=1, n_query=1, episodes=4)
    >>> sorted(next(iter(sampler)).classes)
    ['a', 'b']
    """

    def __init__(
        self,
        labels: Sequence[Hashable] | Tensor,
        n_way: int = 5,
        k_shot: int = 1,
        n_query: int = 15,
        *,
        episodes: int = 1000,
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(episodes, seed=seed, fixed=fixed)
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        check_counts(self, "n_way", "k_shot", "n_query")
        rows: dict[Hashable, list[int]] = defaultdict(list)
        for row, label in enumerate(labels):
            # A tensor is equal to no other as a key.
            rows[label.item() if hasattr(label, "item") else label].append(row)
        need = k_shot + n_query
        self.rows = {label: found for label, found in rows.items() if len(found) >= need}
        if len(self.rows) < n_way:
            raise ValueError(
                f"EpisodeSampler: n_way={n_way} classes with k_shot + n_query = {need} rows each are needed; {len(self.rows)} of "
                f"{len(rows)} classes have so many, the largest {max(map(len, rows.values()), default=0)}. Ask for less."
            )

    @override
    def draw(self, key: EpisodeKey) -> EpisodeRows:
        generator, labels = key.generator(), list(self.rows)
        classes = [labels[i] for i in generator.choice(len(labels), self.n_way, replace=False)]
        support, query = [], []
        for label in classes:
            rows = self.rows[label]
            drawn = [rows[i] for i in generator.choice(len(rows), self.k_shot + self.n_query, replace=False)]
            support.append(tuple(drawn[: self.k_shot]))
            query.append(tuple(drawn[self.k_shot :]))
        return EpisodeRows(tuple(support), tuple(query), tuple(classes))

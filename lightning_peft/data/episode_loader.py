"""Episodes from a data set of rows, stacked to batches of tasks, by a loader that goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate
from typing_extensions import override

from lightning_peft.data.episode_sampler import EpisodeRows, TaskSampler
from lightning_peft.distributed import world_size
from lightning_peft.meta.episode import Episode

Rows = list[tuple[Any, int]]
"""Rows of one set and their labels within the episode."""


class EpisodeDataset(Dataset[tuple[Rows, Rows]]):
    """The rows of a map-style data set, an episode at a time.

    Args:
        rows: What to take rows from.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, episode: EpisodeRows) -> tuple[Rows, Rows]:
        if not isinstance(episode, EpisodeRows):
            raise TypeError(
                f"EpisodeDataset: index {episode!r} is no episode. Its loader needs an EpisodeSampler; overfit_batches= replaces "
                "samplers: use limit_train_batches= instead."
            )
        support, query = (
            [(self.rows[row], label) for label, rows in enumerate(side) for row in rows]
            for side in (episode.support, episode.query)
        )
        return support, query


class EpisodeCollate:
    """Stack the rows of several episodes to ``(tasks, rows, ...)``, with labels ``0 .. n_way - 1`` of each episode's own.

    Args:
        label: Key of the label in rows that are mappings; in other rows the label is the last entry.
        collate: Makes a batch of rows: pads and tokenises texts, for instance. Support and query rows of all tasks are padded
            alike, each set on its own.

    >>> collate = EpisodeCollate()
    >>> batch = collate([([((1.0, 7), 0), ((2.0, 9), 1)], [((3.0, 7), 0)])])
    >>> batch.support
    [tensor([[1., 2.]], dtype=torch.float64), tensor([[0, 1]])]
    """

    def __init__(self, label: str = "label", collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.label, self.collate = label, collate

    def __call__(self, episodes: Sequence[tuple[Rows, Rows]]) -> Episode:
        """Return the episodes as one batch."""
        return Episode(*(self._stacked([episode[side] for episode in episodes]) for side in (0, 1)))

    def _stacked(self, sets: Sequence[Rows]) -> Any:
        batch = self.collate([self._relabelled(row, label) for rows in sets for row, label in rows])
        total = sum(map(len, sets))

        def split(tensor: Tensor) -> Tensor:
            if not tensor.ndim or len(tensor) != total:
                raise ValueError(
                    f"EpisodeCollate: collate= made a tensor of shape {tuple(tensor.shape)} of {total} rows. Its first dimension "
                    "must be the rows."
                )
            return tensor.view(len(sets), -1, *tensor.shape[1:])

        # Not tree_map_only on a BatchEncoding: to pytrees it is a leaf.
        plain = dict(batch) if isinstance(batch, Mapping) else batch
        found = pytree.tree_leaves(plain)
        if any(isinstance(leaf, str) for leaf in found) and sum(isinstance(leaf, Tensor) for leaf in found) < 2:
            raise ValueError(
                "EpisodeCollate: beside labels the rows hold text alone, which cannot be split by task. Give collate= a function "
                "that makes tensors of it."
            )
        return pytree.tree_map_only(Tensor, split, plain)

    def label_of(self, row: Any) -> Any:
        """Return the label of a row.

        Raises:
            ValueError: If it has none.
        """
        if isinstance(row, Mapping):
            if self.label not in row:
                raise ValueError(
                    f"EpisodeCollate: a row has no {self.label!r}, but {sorted(map(str, row))}. Pass label=."
                )
            return row[self.label]
        if isinstance(row, tuple | list) and len(row) > 1:
            return row[-1]
        raise ValueError(
            f"EpisodeCollate: a row of {type(row).__name__} has no label. Give (inputs, label) or a mapping."
        )

    def _relabelled(self, row: Any, label: int) -> Any:
        self.label_of(row)
        return {**row, self.label: label} if isinstance(row, Mapping) else (*row[:-1], label)


class EpisodeLoader(DataLoader[Any]):
    """A loader over a :class:`TaskSampler` that keeps its place: a run that resumes within an epoch gets the next episode.

    Lightning saves and restores it, and the number of processes may change in between.
    """

    _used = 0

    def state_dict(self) -> dict[str, Any]:
        """Return how far the epoch is, in episodes of all processes."""
        sampler = self._sampler()
        return {"epoch": sampler.epoch, "episodes": self._used * self._meta_batch()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next pass behind the episodes that were used already."""
        sampler = self._sampler()
        sampler.epoch, sampler.skip = state["epoch"], state["episodes"] % sampler.episodes
        self._used = sampler.skip // self._meta_batch()

    def _meta_batch(self) -> int:
        size: int = getattr(self.batch_sampler, "batch_size", self.batch_size or 1)
        return size * world_size()

    def _sampler(self) -> TaskSampler:
        # In prediction Lightning wraps the batch sampler, and the loader's own sampler means nothing.
        for sampler in (self.sampler, getattr(self.batch_sampler, "sampler", None)):
            if isinstance(sampler, TaskSampler):
                return sampler
        raise TypeError(
            f"EpisodeLoader: sampler={type(self.sampler).__name__} must be an EpisodeSampler or TaskSampler. overfit_batches= "
            "replaces samplers: use limit_train_batches= instead."
        )

    @override
    def __iter__(self) -> Any:
        sampler = self._sampler()
        self._used = sampler.skip // self._meta_batch()
        for batch in super().__iter__():
            self._used += 1
            yield batch

"""What one step of meta-learning sees: support sets to adapt on, query sets to be judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class Episode(NamedTuple):
    """The support and query sets of some tasks: batches whose tensors have the tasks for their first dimension.

    >>> import torch
    >>> Episode(torch.zeros(4, 5, 2), torch.zeros(4, 15, 2)).tasks
    4
    """

    support: Any
    """What a task adapts on: tensors ``(tasks, rows, ...)``."""
    query: Any
    """What it is judged on, of the same tasks in the same order."""
    ragged: bool = False
    """Whether both are lists with a batch for each task instead, for tasks of different sizes."""

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return len(self.support) if self.ragged else leading_size(self.support)

    def chunks(self, size: int) -> Iterator[Episode]:
        """Yield the tasks in order, at most ``size`` at a time, views all."""
        tasks = self.tasks
        if size >= tasks:
            yield self
            return
        for start in range(0, tasks, size):
            yield self._each(slice(start, start + size), ragged=self.ragged)

    def only(self) -> Episode:
        """Return a single task without the dimension of tasks."""
        return self._each(0, ragged=False)

    def _each(self, part: int | slice, *, ragged: bool) -> Episode:
        support, query = (
            side[part] if self.ragged else over_tensors(side, lambda tensor: tensor[part])
            for side in (self.support, self.query)
        )
        return Episode(support, query, ragged)


def over_tensors(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return a batch with every tensor changed."""
    return pytree.tree_map_only(Tensor, change, batch)


def leading_size(batch: Any) -> int:
    """Return the size of the first dimension, which all tensors of a batch share.

    Raises:
        ValueError: If there is no tensor, or they disagree.
    """
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or 0 in sizes:
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        raise ValueError(
            f"Episode: tensors of shapes {shapes} do not share a first dimension of tasks. Stack support and query sets to "
            "(tasks, rows, ...), as EpisodeCollate does, or give a list with a batch per task."
        )
    return sizes.pop()


def as_episode(batch: Any, owner: str) -> Episode:
    """Return a batch as an episode: one already, ``{"support": ..., "query": ...}``, or a pair of the two.

    Raises:
        TypeError: For anything else, and for a pair of tensors, which may as well be inputs and targets.
    """
    if isinstance(batch, Episode):
        return batch
    if isinstance(batch, Mapping) and {"support", "query"} <= batch.keys():
        return Episode(batch["support"], batch["query"])
    if isinstance(batch, Sequence) and len(batch) == 2 and not any(isinstance(side, Tensor) for side in batch):
        return Episode(*batch)
    raise TypeError(
        f"{owner}: a batch of {type(batch).__name__} is no episode. Give Episode(support, query), a mapping with both, or a pair "
        "(EpisodicDataModule makes them), or define split_episode(self, batch)."
    )

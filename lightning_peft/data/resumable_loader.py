"""Loaders that go on where they stopped: the same rows in the same order, from the first one that was not used yet."""

from __future__ import annotations

import copy
import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_peft.randomness import RandomState, random_state, set_random_state


def goes_on_by_itself(loader: object) -> bool:
    """Whether a loader keeps its own position, by the protocol that Lightning saves and restores."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def can_go_on(loader: object) -> bool:
    """Whether :func:`resumable` can make a loader go on.

    It must be a torch ``DataLoader`` over a map-style dataset, with a length (Lightning fetches ahead otherwise), that gives its
    batches in order, of a class that yields a batch for each index of its sampler: one with an ``__iter__`` of its own may not.
    Its samplers must draw from generators whose state can be taken: torch's.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if not getattr(loader, "in_order", True) or any(map(_draws_by_others, _owners(loader))):
        return False
    try:
        len(loader)
    except TypeError:
        return False
    return type(loader).__iter__ is DataLoader.__iter__


class LoaderPosition:
    """Where a loader is in its pass over the data, and what it takes to get there again.

    The order of a pass follows from the state of the random generators when it began; so that state is kept instead of the
    order. A checksum over the indices tells whether the way back led to the same place.

    Args:
        device: The CUDA device whose generator counts too.
        reload: Load the rows that were used already once more, instead of passing over their indices. Workers that transform
            rows at random then go on exactly too.
    """

    def __init__(self, device: torch.device | None = None, *, reload: bool = False) -> None:
        self.device, self.reload = device, reload
        self._start: RandomState | None = None
        self._own: list[torch.Generator] = []
        self._generators: list[torch.Tensor] = []
        self._used, self._skip, self._checksum, self._passes = 0, 0, 0, 0
        self._rewind: tuple[RandomState, list[torch.Tensor]] | None = None
        self._sums: list[int] = []
        self._present: RandomState | None = None

    def state_dict(self, *, at_the_end: bool = False) -> dict[str, Any]:
        """Return what a checkpoint keeps.

        Args:
            at_the_end: Whether the pass is over, also if it has rows left.
        """
        if at_the_end or not self._used:
            generators = [generator.get_state() for generator in self._own]
            return {"used": 0, "start": None, "generators": generators, "checksum": 0, "passes": self._passes}
        checksum = self._sums[self._used - 1]
        kept = {"used": self._used, "start": self._start, "generators": self._generators, "checksum": checksum}
        return kept | {"passes": self._passes - 1}  # this one begins again

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass begin where a checkpoint was taken."""
        self._used, self._start, self._checksum = state["used"], state["start"], state["checksum"]
        self._generators, self._sums = state["generators"], [self._checksum] * self._used
        self._passes = state["passes"]

    def batches(self, loader: DataLoader[Any], make: Callable[[], Iterator[Any]], *, resumed: bool) -> Iterator[Any]:
        """Yield the batches of a pass, or the rest of one.

        Args:
            loader: Whose generators count.
            make: Starts the pass.
            resumed: Whether this is the rest of the pass that a checkpoint was taken in.
        """
        self._skip, self._own = (self._used if resumed else 0), _generators(loader)
        if resumed:
            for generator, state in zip(self._own, self._generators, strict=False):
                generator.set_state(state)
        if self._skip and self._start is not None:
            self._present = random_state(self.device)
            set_random_state(self._start, self.device)
        else:
            self._start = random_state(self.device)
            self._generators = [generator.get_state() for generator in self._own]
        self._used, self._sums, self._passes = self._skip, [], self._passes + 1
        # Kept workers begin a later pass without drawing a seed; those of a new process draw one, which is taken back.
        kept = loader.persistent_workers and self._passes > 1
        self._rewind = (random_state(self.device), [one.get_state() for one in self._own]) if kept else None
        batches = make()
        if self.reload:
            for _ in range(self._skip):
                next(batches, None)
            self._arrive()
        for batch in batches:
            self._used += 1
            yield batch

    def indices(self, sampler: Iterable[Any]) -> Iterator[Any]:
        """Yield the indices of a pass, without those whose rows were used already."""
        if self._rewind is not None:
            set_random_state(self._rewind[0], self.device)
            for generator, state in zip(self._own, self._rewind[1], strict=True):
                generator.set_state(state)
        indices = iter(sampler)
        if not self.reload:
            for index in itertools.islice(indices, self._skip):
                self._add(index)
            self._arrive()
        for index in indices:
            self._add(index)
            yield index

    def _add(self, index: Any) -> None:
        self._sums.append(zlib.crc32(repr(index).encode(), self._sums[-1] if self._sums else 0))

    def _arrive(self) -> None:
        """Go back to the present, and tell if the way led astray."""
        if self._present is None:
            return
        set_random_state(self._present, self.device)
        self._present = None
        if self._sums[self._skip - 1 : self._skip] != [self._checksum]:
            rank_zero_warn(
                f"ExactResume: after {self._skip} batches the training loader is not where the checkpoint was taken: its dataset, "
                "batch size or sampler is another, or the sampler draws from a generator of its own. Some rows come twice in "
                "this epoch, others not at all. Give such a sampler or loader state_dict and load_state_dict."
            )


class _Watched:
    """A sampler whose indices pass through a position."""

    def __init__(self, sampler: Any, position: LoaderPosition) -> None:
        self._sampler, self._position = sampler, position

    def __iter__(self) -> Iterator[Any]:
        return self._position.indices(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


def resumable(
    loader: DataLoader[Any], position: LoaderPosition, resumes: Callable[[], bool] = lambda: False
) -> DataLoader[Any]:
    """Return a copy of a loader that keeps its position and can go on from it.

    The copy is of a subclass of the loader's class, so that Lightning may make it anew with another sampler. Nothing happens
    before its first row is asked for.

    Args:
        loader: A loader for which :func:`can_go_on` holds.
        position: What keeps the position; it outlives the loader.
        resumes: Asked as each pass begins: whether it is the rest of the pass that a checkpoint was taken in.

    >>> position = LoaderPosition()
    >>> loader = resumable(DataLoader(list(range(6)), 2, shuffle=True), position)
    >>> batches = [batch.tolist() for batch, _ in zip(loader, range(1))] + [(saved := position.state_dict())["used"]]
    """
    kind = type(loader)

    class Resumable(kind):  # type: ignore[valid-type,misc]
        """A loader that goes on where it stopped."""

        def state_dict(self) -> dict[str, Any]:
            """Say to Lightning that the loader goes on; where, each process keeps for itself."""
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Take what ``state_dict`` gave."""

        @property
        def _index_sampler(self) -> Any:  # torch asks it for what to load next
            return _Watched(super()._index_sampler, position)

        @override
        def __iter__(self) -> Iterator[Any]:
            yield from position.batches(self, super().__iter__, resumed=resumes())

    Resumable.__name__, Resumable.__qualname__ = kind.__name__, kind.__qualname__
    copied = copy.copy(loader)
    vars(copied)["_iterator"] = None  # kept workers are the original's
    copied.__class__ = Resumable
    return copied


def _owners(loader: DataLoader[Any]) -> list[Any]:
    return [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]


def _attributes(owner: Any) -> list[Any]:
    return list(getattr(owner, "__dict__", {}).values())


def _draws_by_others(owner: Any) -> bool:
    """Whether a sampler keeps a generator of numpy's or Python's."""
    kinds = np.random.Generator | np.random.RandomState | random.Random
    return any(isinstance(found, kinds) for found in _attributes(owner))


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """List the generators of a loader and its samplers, under whatever name, each once."""
    found = [value for owner in _owners(loader) for value in _attributes(owner)]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())

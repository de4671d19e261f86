"""Which rows make up which batch, when old rows are mixed among new ones: a pure function of (seed, step).

Number the rows of the whole run ``q = 0, 1, ...``. Row ``q`` is old if ``floor((q + 1) r) > floor(q r)``, with the
ratio ``r`` as an exact fraction: after any number of rows, fewer than one row too many or too few were old. No state is
kept, so a resumed run and a run on another number of processes see the same rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import torch


def key(seed: int, *words: object) -> int:
    """Derive a seed from words, so that streams of one run never share their order with another run's.

    >>> key(0, "memory", 1) == key(1, "memory", 0)
    False
    """
    return int.from_bytes(hashlib.blake2s(repr((seed, *words)).encode(), digest_size=7).digest(), "little")


@lru_cache(maxsize=8)
def permutation(rows: int, seed: int, stream: str, number: int) -> list[int]:
    """Return the order of a stream's pass ``number``; every pass has its own."""
    generator = torch.Generator().manual_seed(key(seed, stream, number))
    return torch.randperm(rows, generator=generator).tolist()


def exact(ratio: float, owner: str) -> Fraction:
    """Return a ratio as the simple fraction that was meant.

    Raises:
        ValueError: If it does not lie inside (0, 1).

    >>> exact(0.2, "ReplayMixing")
    Fraction(1, 5)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction) or not 0 < ratio < 1:
        raise ValueError(
            f"{owner}: ratio={ratio!r} must lie inside (0, 1): the share of old rows among all rows of a step."
        )
    meant = Fraction(ratio).limit_denominator(100_000)
    return meant if 0 < meant < 1 else Fraction(ratio)


@dataclass(frozen=True)
class MemoryStream:
    """Endless draws from the old rows: each once per pass, every pass in an order of its own."""

    rows: int
    seed: int

    def draw(self, i: int) -> int:
        """Return the index of draw ``i``, counted from 0 over the whole run."""
        number, position = divmod(i, self.rows)
        return permutation(self.rows, self.seed, "memory", number)[position]


def rank_slice(count: int, rank: int, world: int, turn: int) -> slice:
    """Return the part of ``count`` things that a rank takes; ``turn`` rotates who gets the odd ones.

    >>> [rank_slice(5, rank, 2, turn=0) for rank in (0, 1)]
    [slice(0, 2, None), slice(2, 5, None)]
    """
    place = (rank + turn) % world
    return slice(place * count // world, (place + 1) * count // world)


@dataclass(frozen=True)
class MixPlan:
    """Old rows among the new ones of each batch; the batch size stays what it was.

    An epoch is one pass of the new rows, ``ceil(new / ((1 - ratio) * batch))`` steps (floor with ``drop_last``). Where
    that does not come out even, up to one row per process is drawn twice, so that all processes have equally many.

    Args:
        new: Number of new rows.
        memory: The old rows.
        ratio: Share of old rows among all rows.
        batch: Rows of a step over all processes.
        world: Number of processes; must divide ``batch``.
        seed: Seed of both orders.
        shuffle: Whether the new rows are shuffled.
        drop_last: Whether a last, smaller batch is left out.
        limit: Steps after which an epoch is cut short, if any.
    """

    new: int
    memory: MemoryStream
    ratio: Fraction
    batch: int
    world: int = 1
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    limit: int | None = None

    @property
    def rows(self) -> int:
        """Rows of an epoch, old and new."""
        whole = self.new / (1 - self.ratio)
        if self.drop_last:
            rows = math.floor(whole / self.batch) * self.batch
        else:
            rows = math.ceil(whole / self.world) * self.world
        return rows if self.limit is None else min(rows, self.limit * self.batch)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.rows / self.batch)

    def for_world(self, world: int, batch: int) -> MixPlan:
        """Return this plan, not cut, for ``world`` processes with ``batch`` rows each."""
        return replace(self, world=world, batch=batch * world, limit=None)

    def cut_to(self, steps: int) -> MixPlan:
        """Return this plan with epochs of at most ``steps`` steps."""
        return replace(self, limit=steps)

    def old_before(self, row: int) -> int:
        """Count the old rows among the first ``row`` rows of the run."""
        return math.floor(row * self.ratio)

    def step(self, epoch: int, number: int) -> list[tuple[bool, int]]:
        """Return the rows of one step over all processes, as (old?, index) pairs.

        Args:
            epoch: Counted from 0.
            number: The step within the epoch, counted from 0.
        """
        start = epoch * self.rows
        first, last = start + number * self.batch, min(start + (number + 1) * self.batch, start + self.rows)
        new_before = start - self.old_before(start)
        order = permutation(self.new, self.seed, "new", epoch) if self.shuffle else range(self.new)
        rows = []
        for row in range(first, last):
            old = self.old_before(row)
            if self.old_before(row + 1) > old:
                rows.append((True, self.memory.draw(old)))
            else:
                rows.append((False, order[(row - old - new_before) % self.new]))
        return rows

    def share(self, epoch: int, number: int, rank: int) -> list[tuple[bool, int]]:
        """Return the rows of one step that one process takes."""
        rows = self.step(epoch, number)
        return rows[rank_slice(len(rows), rank, self.world, key(self.seed, "turn", epoch, number))]


@dataclass(frozen=True)
class BesidePlan:
    """Batches of old rows beside unchanged batches of new ones, as many as make up the ratio.

    After ``N`` new rows ``floor(N r / (1 - r))`` old ones were drawn, so the share is exact to below one row.

    Args:
        new: New rows of an epoch over all processes.
        memory: The old rows.
        ratio: Share of old rows among old and new ones.
        batch: New rows of a step over all processes; the last step of an epoch may have fewer.
        world: Number of processes.
        seed: Seed of the order.
    """

    new: int
    memory: MemoryStream
    ratio: Fraction
    batch: int
    world: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.new / self.batch)

    def bounds(self, epoch: int, number: int) -> tuple[int, int]:
        """Return how many old rows were drawn before and after a step."""
        first = epoch * self.new + min(number * self.batch, self.new)
        last = epoch * self.new + min((number + 1) * self.batch, self.new)
        factor = self.ratio / (1 - self.ratio)
        return math.floor(first * factor), math.floor(last * factor)

    def share(self, epoch: int, number: int, rank: int) -> tuple[list[int], float]:
        """Return the old rows of one process in one step, and the weight of their mean loss.

        Under DDP the ranks' losses are averaged; the weight ``world * own rows / all rows`` makes that average the
        mean over all rows. A process without a row of its own gets one with weight 0, so that collective operations
        in the loss stay matched. No rows at all: an empty list, on every process.
        """
        first, last = self.bounds(epoch, number)
        count = last - first
        if count == 0:
            return [], 0.0
        own = range(first, last)[rank_slice(count, rank, self.world, key(self.seed, "turn", epoch, number))]
        return [self.memory.draw(i) for i in own or [first]], self.world * len(own) / count

    def batches(self, epoch: int, number: int, rank: int) -> Iterator[list[int]]:
        """Yield one process's non-empty lists of old rows from a step on, without end."""
        while True:
            if rows := self.share(epoch, number, rank)[0]:
                yield rows
            number += 1
            if number == self.steps:
                epoch, number = epoch + 1, 0

"""How many old rows come beside each batch of new ones: a pure function of (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from lightning_peft.data.ratio import UNIT, Curve
from lightning_peft.data.streams import Stream, key, rank_slice


@dataclass(frozen=True)
class BesidePlan:
    """Batches of old rows beside unchanged batches of new ones, as many as make up the ratio.

    After ``N`` new rows ``floor(N r / (1 - r))`` old ones were drawn, so the share is exact to below one row; where the
    ratio changes, ``r / (1 - r)`` is summed over the new rows.

    Args:
        new: New rows of an epoch over all processes.
        memory: The old rows.
        ratio: Share of old rows among old and new ones.
        batch: New rows of a step over all processes; the last step of an epoch may have fewer.
        world: Number of processes.
        seed: Seed of the order.
    """

    new: int
    memory: Stream
    ratio: Fraction | Curve
    batch: int
    world: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.new / self.batch)

    def drawn(self, epoch: int, number: int) -> int:
        """Count the old rows before a step."""
        if isinstance(self.ratio, Fraction):
            rows = epoch * self.new + min(number * self.batch, self.new)
            return math.floor(rows * self.ratio / (1 - self.ratio))
        missing = self.steps * self.batch - self.new  # rows by which the last step of an epoch is short
        ends = range(self.steps - 1, epoch * self.steps + number, self.steps) if missing else ()
        short = sum(self.ratio.at(step, odds=True) for step in ends)
        return (self.ratio.upto(epoch * self.steps + number, odds=True) * self.batch - short * missing) // UNIT

    def bounds(self, epoch: int, number: int) -> tuple[int, int]:
        """Return how many old rows were drawn before and after a step."""
        return self.drawn(epoch, number), self.drawn(epoch, number + 1)

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

"""Which rows make up which batch, when old rows are mixed among new ones: a pure function of (seed, step).

Number the rows of the whole run ``q = 0, 1, ...``. Row ``q`` is old if ``floor((q + 1) r) > floor(q r)``, with the
ratio ``r`` as an exact fraction: after any number of rows, fewer than one row too many or too few were old. No state is
kept, so a resumed run and a run on another number of processes see the same rows. A ratio that changes from step to step
takes the place of ``q r`` by the sum of the ratios of the rows before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from lightning_peft.data.ratio import UNIT, Curve
from lightning_peft.data.streams import Indices, Stream, key, rank_slice


@dataclass(frozen=True)
class MixPlan:
    """Old rows among the new ones of each batch; the batch size stays what it was.

    With a constant ratio an epoch is one pass of the new rows, ``ceil(new / ((1 - ratio) * batch))`` steps (floor with
    ``drop_last``); where that does not come out even, up to one row per process is drawn twice, so that all processes have
    equally many. With a ratio that changes an epoch has as many steps as without replay, and the next one goes on with the
    new rows that are left.

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
    memory: Stream
    ratio: Fraction | Curve
    batch: int
    world: int = 1
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    limit: int | None = None

    @property
    def rows(self) -> int:
        """Rows of an epoch, old and new."""
        if isinstance(self.ratio, Curve):
            steps = self.new // self.batch if self.drop_last else math.ceil(self.new / self.batch)
            rows = steps * self.batch
        elif self.drop_last:
            rows = math.floor(self.new / (1 - self.ratio) / self.batch) * self.batch
        else:
            rows = math.ceil(self.new / (1 - self.ratio) / self.world) * self.world
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
        if isinstance(self.ratio, Fraction):
            return row * self.ratio.numerator // self.ratio.denominator
        step, position = divmod(row, self.batch)
        return (self.ratio.upto(step) * self.batch + (self.ratio.at(step) * position if position else 0)) // UNIT

    def _old_before(self, first: int, last: int) -> Indices:
        """Count the old rows before each row from ``first`` to ``last``, both included."""
        if isinstance(self.ratio, Fraction):
            rows = np.arange(first, last + 1)
            whole, part = divmod(rows, self.ratio.denominator)  # or products would leave 64 bits in long runs
            counts: Indices = whole * self.ratio.numerator + part * self.ratio.numerator // self.ratio.denominator
            return counts
        return np.array([self.old_before(row) for row in range(first, last + 1)])

    def block(self, epoch: int, first: int, last: int) -> tuple[Indices, Indices]:
        """Return which rows of the steps from ``first`` to before ``last`` are old, and the index of each.

        Args:
            epoch: Counted from 0.
            first: A step within the epoch, counted from 0.
            last: A later one.
        """
        start = epoch * self.rows
        begin, end = start + first * self.batch, min(start + last * self.batch, start + self.rows)
        counts = self._old_before(begin, end)
        old = np.diff(counts)
        index = np.empty(end - begin, np.int64)
        old_rows, drawn = old == 1, int(counts[0])
        index[old_rows] = self.memory.draws(drawn, int(counts[-1]) - drawn)
        count = len(old) - (int(counts[-1]) - drawn)
        new = Stream(self.new, self.seed, "new", self.shuffle)
        if isinstance(self.ratio, Curve):
            index[~old_rows] = new.draws(begin - drawn, count)
        else:  # each epoch begins with a pass of its own, and its last rows may come twice
            position = begin - drawn - (start - self.old_before(start))
            within = np.arange(position, position + count) % self.new
            index[~old_rows] = new.draws(epoch * self.new, self.new)[within] if self.shuffle else within
        return old, index

    def step(self, epoch: int, number: int) -> list[tuple[bool, int]]:
        """Return the rows of one step over all processes, as (old?, index) pairs."""
        old, index = self.block(epoch, number, number + 1)
        return list(zip(old.astype(bool).tolist(), index.tolist(), strict=True))

    def share(self, epoch: int, number: int, rank: int) -> list[tuple[bool, int]]:
        """Return the rows of one step that one process takes."""
        rows = self.step(epoch, number)
        return rows[self.slice(epoch, number, len(rows), rank)]

    def slice(self, epoch: int, number: int, rows: int, rank: int) -> slice:
        """Return which of the rows of a step one process takes."""
        return rank_slice(rows, rank, self.world, key(self.seed, "turn", epoch, number) if self.world > 1 else 0)

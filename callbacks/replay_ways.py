"""The three ways in which old rows come to a step: mixed into map-style rows, into a stream of rows, or beside the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import DataLoader

from lightning_peft.data.beside_plan import BesidePlan
from lightning_peft.data.mix_loader import MixLoader, SameMixSampler
from lightning_peft.data.mix_stream import MixStreamLoader


class Way(Protocol):
    """How old rows come to a step."""

    @property
    def steps(self) -> int | None:
        """Steps of an epoch, or None if it ends when the rows do; steps then count over the run."""

    @property
    def ahead(self) -> int:
        """Steps whose rows are chosen before the coming one is taken."""

    def drawn(self, epoch: int, step: int) -> tuple[int, int]:
        """Return how many old rows, and how many in all, were drawn before a step."""

    def go_to(self, epoch: int, step: int) -> None:
        """Let the next pass begin at a step."""


def _ahead(loader: DataLoader[Any]) -> int:
    return loader.num_workers * (loader.prefetch_factor or 0)


@dataclass
class Mixed:
    """Among the rows of a map-style dataset."""

    loader: MixLoader

    @property
    def steps(self) -> int | None:
        """Of an epoch."""
        return self.loader.mix_sampler.plan.steps

    @property
    def ahead(self) -> int:
        """What the workers have been told."""
        return _ahead(self.loader)

    def drawn(self, epoch: int, step: int) -> tuple[int, int]:
        """Count from the plan."""
        plan = self.loader.mix_sampler.plan
        rows = min(step * plan.batch, plan.rows)
        if isinstance(self.loader.mix_sampler, SameMixSampler):
            return epoch * plan.old_before(plan.rows) + plan.old_before(rows), epoch * plan.rows + rows
        return plan.old_before(epoch * plan.rows + rows), epoch * plan.rows + rows

    def go_to(self, epoch: int, step: int) -> None:
        """Tell the sampler."""
        self.loader.mix_sampler.go_to(epoch, step)


@dataclass
class Streamed:
    """Among the rows of an iterable dataset."""

    loader: MixStreamLoader
    steps: int | None = None

    @property
    def ahead(self) -> int:
        """What the workers have begun: they read the ratio as it was when the pass began, so it must not change in a pass."""
        return _ahead(self.loader)

    def drawn(self, epoch: int, step: int) -> tuple[int, int]:
        """Count full batches; the last one of a pass may have had fewer rows."""
        plan = self.loader.stream.plan
        return plan.old_before(step * plan.batch), step * plan.batch

    def go_to(self, epoch: int, step: int) -> None:
        """Tell the stream."""
        self.loader.stream.first = step


@dataclass
class Beside:
    """In batches of their own."""

    plan: BesidePlan
    batches: Iterator[Any]
    ahead: int = 0  # the plan tells what comes when; a ratio that changes has no workers

    @property
    def steps(self) -> int | None:
        """Of an epoch."""
        return self.plan.steps

    def drawn(self, epoch: int, step: int) -> tuple[int, int]:
        """Count from the plan."""
        plan, old = self.plan, self.plan.drawn(epoch, step)
        return old, old + epoch * plan.new + min(step * plan.batch, plan.new)

    def go_to(self, epoch: int, step: int) -> None:
        """Do nothing: the batches are begun where the run is."""

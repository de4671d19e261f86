"""Which phase of a schedule it is: what ends one, and what a checkpoint must keep to go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_peft.callbacks.phases import Phase, Plateau
from lightning_peft.distributed import any_rank


class PhaseClock:
    """Count through the phases of a schedule, the same on every rank.

    Args:
        phases: The phases in order; the last one stays, whatever it says.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = phases
        self.number, self.began_epoch, self.began_step = 0, 0, 0
        self.history: list[tuple[int, int]] = []
        self.over = False
        self.stepped, self._step_seen = True, 0

    @property
    def phase(self) -> Phase:
        """The phase that it is."""
        return self.phases[self.number]

    @property
    def _last(self) -> bool:
        return self.number == len(self.phases) - 1

    def begin(self, number: int, epoch: int, step: int) -> None:
        """Go to a phase, which begins in that epoch and after so many optimizer steps."""
        self.number, self.began_epoch, self.began_step, self.over = number, epoch, step, False
        if isinstance(until := self.phase.until, Plateau):
            until.start()

    def note(self, step: int) -> None:
        """Put the phase into the history, as it begins to train."""
        if not self.history or self.history[-1][0] != self.number:
            self.history.append((self.number, step))

    def start(self, trainer: pl.Trainer) -> None:
        """Take up counting where a run begins or goes on."""
        self.stepped, self._step_seen = True, trainer.global_step

    def count_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note after a batch whether the optimizer took a step; after one, ask the phase whether it is over."""
        self.stepped, self._step_seen = trainer.global_step != self._step_seen, trainer.global_step
        until = self.phase.until
        if self.stepped and not self._last and until is not None and not isinstance(until, Plateau):
            self.over = any_rank(bool(until(trainer, pl_module)))

    def look(self, trainer: pl.Trainer, after: str) -> None:
        """Look at the metric of a phase that ends on a plateau, after a ``"validation"`` or an ``"epoch"``."""
        until = self.phase.until
        if isinstance(until, Plateau) and until.each == after and not self._last:
            self.over = until.look(trainer) or self.over

    def advance(self, trainer: pl.Trainer, *, in_epoch: int) -> bool:
        """Move on to the phase that is due now; return whether that is another one.

        Args:
            trainer: The trainer, at an optimizer-step boundary.
            in_epoch: The epoch of the next batch.
        """
        before = self.number
        while not self._last:
            if self.phase.steps is not None:
                if trainer.global_step < self.began_step + self.phase.steps:
                    break
                self.begin(self.number + 1, in_epoch, self.began_step + self.phase.steps)
            elif self.phase.epochs is not None:
                if trainer.current_epoch < self.began_epoch + self.phase.epochs:
                    break
                self.begin(self.number + 1, self.began_epoch + self.phase.epochs, trainer.global_step)
            elif self.over:
                self.begin(self.number + 1, in_epoch, trainer.global_step)
            else:
                break
        return self.number != before

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        until = self.phase.until
        seen = {"best": until.best, "bad_checks": until.bad_checks} if isinstance(until, Plateau) else {}
        began = {"began_epoch": self.began_epoch, "began_step": self.began_step}
        history = [list(entry) for entry in self.history]
        return {"number": self.number, **began, "over": self.over, "plateau": seen, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.begin(state["number"], state["began_epoch"], state["began_step"])
        # Checkpoints of version 0.1 have neither.
        self.over = state.get("over", False)
        self.history = [(number, step) for number, step in state.get("history", [])]
        if isinstance(until := self.phase.until, Plateau) and (seen := state.get("plateau")):
            until.best, until.bad_checks = seen["best"], seen["bad_checks"]

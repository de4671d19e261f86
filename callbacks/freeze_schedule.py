"""What trains when: phases that free and freeze parameters, right under DDP and exact on resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_peft.distributed import refuse_unsupported, rewrap
from lightning_peft.freezing import record_trained, set_trainable, trainable_count, trainable_names
from lightning_peft.logging import log_values, register_chart
from lightning_peft.matching import match_names
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "FreezeSchedule"


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which only some parameters train.

    Args:
        train: Globs over the parameter names of the LightningModule; ``*`` crosses dots.
        epochs: Length in epochs. A phase that begins in mid-epoch counts the rest of it as its first.
        steps: Length in optimizer steps. The last phase of a schedule may have neither and lasts to the end.
        thaw_base: Let the globs also free parameters that were frozen when the run began, such as the base under a
            LoRA.

    Raises:
        ValueError: If no glob is given, or both lengths are, or a length is not positive.

    >>> Phase(train=["head.*"], steps=30)
    Phase(train=['head.*'], epochs=None, steps=30, thaw_base=False)
    """

    train: list[str]
    epochs: int | None = None
    steps: int | None = None
    thaw_base: bool = False

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        if isinstance(self.train, str) or not self.train:
            raise ValueError(f"Phase: train={self.train!r} must be a list of at least one glob over parameter names.")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"Phase: epochs={self.epochs!r} and steps={self.steps!r} exclude each other; give one.")
        for unit, length in (("epochs", self.epochs), ("steps", self.steps)):
            if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
                raise ValueError(f"Phase: {unit}={length!r} must be a whole number of at least 1.")

    @property
    def endless(self) -> bool:
        """Whether the phase lasts to the end of the run."""
        return self.epochs is None and self.steps is None


class FreezeSchedule(pl.Callback):
    """Train some parameters first and others later.

    A phase chooses among the parameters that were trainable when the run began: ``"*"`` under a LoRA means the adapter
    and the head, never the base, unless the phase says ``thaw_base=True``. The optimizers hold every parameter from
    the start, so LR schedulers work; a frozen parameter has no gradient and is not moved by momentum or weight decay.
    The first freeze comes after ``configure_optimizers``, which may thus filter by ``requires_grad``. Under DDP each
    change re-wraps the module, so that the gradients of what was freed are averaged.

    Howard & Ruder 2018, arXiv:1801.06146 (gradual unfreezing); Kumar et al. 2022, arXiv:2202.10054 (head first).

    **The trap:** freezing is not ``lr = 0``: Adam's moments would fill up meanwhile.

    Args:
        phases: What trains, in order. Phases end at the step or epoch that completes them.

    Raises:
        ValueError: For an empty schedule or an endless phase before the last; before training, for a glob that matches
            no parameter or only frozen ones, a parameter that no optimizer holds, or an unsupported strategy.

    >>> FreezeSchedule([Phase(train=["head.*"], epochs=1), Phase(train=["*"])]).phases[1].train
    ['*']
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = list(phases)
        if not self.phases:
            raise ValueError(f"{_OWNER}: phases={phases!r} is empty; give at least one Phase.")
        for number, phase in enumerate(self.phases):
            if not isinstance(phase, Phase):
                raise ValueError(f"{_OWNER}: phase {number} is {phase!r}; write it as Phase(train=[...], steps=...).")
        for number, phase in enumerate(self.phases[:-1]):
            if phase.endless:
                raise ValueError(f"{_OWNER}: phase {number} ({phase}) needs epochs= or steps=: another follows it.")
        self.number, self.began_epoch, self.began_step = 0, 0, 0
        self._found: list[str] = []

    @classmethod
    def head_first(cls, head: str = "head", *, steps: int | None = None, epochs: int | None = None) -> FreezeSchedule:
        """Train the head alone for a while, then all that was trainable.

        Args:
            head: Dotted name of the head inside the LightningModule.
            steps: Length of the first phase in optimizer steps.
            epochs: Length of the first phase in epochs.
        """
        return cls([Phase([f"{head}.*"], epochs=epochs, steps=steps), Phase(["*"])])

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage != "fit":
            return
        refuse_unsupported(trainer, _OWNER)
        register_chart(trainer, "What trains", "parameters", ["schedule/trainable_parameters"])
        register_chart(trainer, "What trains", "phase", ["schedule/phase"])
        if not self._found:
            self.number, self.began_epoch, self.began_step = 0, trainer.current_epoch, trainer.global_step
        thawing = [phase for phase in self.phases if phase.thaw_base]
        if thawing:
            pl_module.configure_model()  # the adapter comes now, so that thawed weights are free when optimizers look
            self._found = self._found or trainable_names(pl_module)
            names = [name for name, _ in pl_module.named_parameters()]
            freed = {name for phase in thawing for name in match_names(names, phase.train, owner=_OWNER)}
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name in freed)
            record_trained(pl_module)  # every checkpoint of the run brings them, also one from before they train

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._found = self._found or trainable_names(pl_module)
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(pl_module.named_parameters())
        for number, phase in enumerate(self.phases):
            without = [name for name in self._chosen(number, pl_module) if id(parameters[name]) not in held]
            if without:
                raise ValueError(
                    f"{_OWNER}: phase {number} trains {len(without)} parameters that no optimizer holds, first "
                    f"{without[:3]}. Give configure_optimizers every parameter that a phase trains ({phase.train})."
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The first hook at which every strategy has restored loops and callbacks. A checkpoint of an epoch's last
        # batch resumes into the next epoch without its on_train_epoch_start: what is due is due here too.
        self._advance(trainer)
        self._apply(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._move_on(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # global_step moves with the optimizer only, so a steps phase never ends among accumulated gradients.
        if self.phases[self.number].steps is not None:
            self._move_on(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, self.number)  # the last tread of the staircase is as long as its phase

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._give_back(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._give_back(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "began_epoch": self.began_epoch, "began_step": self.began_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["number"] >= len(self.phases):
            raise ValueError(
                f"{_OWNER}: the checkpoint is in phase {state_dict['number']}, but this schedule has "
                f"{len(self.phases)} phases. Resume with the schedule that the run was started with."
            )
        self.number = state_dict["number"]
        self.began_epoch, self.began_step = state_dict["began_epoch"], state_dict["began_step"]

    def _chosen(self, number: int, pl_module: pl.LightningModule) -> list[str]:
        """Return the names of the parameters that a phase trains."""
        phase = self.phases[number]
        names = [name for name, _ in pl_module.named_parameters()]
        matched = match_names(names, phase.train, owner=f"{_OWNER}: phase {number}", kind="parameter")
        allowed = set(names if phase.thaw_base else self._found)
        chosen = [name for name in matched if name in allowed]
        if not chosen:
            raise ValueError(
                f"{_OWNER}: phase {number} ({phase.train}) matches {len(matched)} parameters, all of them frozen when "
                f"the run began, first {matched[:3]}. Write Phase(..., thaw_base=True) to free them."
            )
        return chosen

    def _advance(self, trainer: pl.Trainer) -> bool:
        """Move on to the phase that is due now; return whether that is another one."""
        before = self.number
        while self.number < len(self.phases) - 1:
            phase = self.phases[self.number]
            if phase.steps is not None:
                if trainer.global_step < self.began_step + phase.steps:
                    break
                # At an epoch's last batch the next phase begins with the next epoch.
                self.began_epoch = trainer.current_epoch + int(trainer.is_last_batch)
                self.began_step += phase.steps
            else:
                assert phase.epochs is not None
                if trainer.current_epoch < self.began_epoch + phase.epochs:
                    break
                self.began_epoch, self.began_step = self.began_epoch + phase.epochs, trainer.global_step
            self.number += 1
        return self.number != before

    def _move_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = self.number
        if self._advance(trainer):
            self._log(trainer, pl_module, before, trainer.global_step - 1)  # the riser of the staircase
            self._apply(trainer, pl_module)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if set_trainable(pl_module, self._chosen(self.number, pl_module)):
            rewrap(trainer, pl_module)
        count = trainable_count(pl_module)
        rank_zero_info(f"{_OWNER}: phase {self.number} at step {trainer.global_step}: {count:,} numbers train.")
        self._log(trainer, pl_module, self.number)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, number: int, step: int | None = None) -> None:
        count = trainable_count(pl_module)
        log_values(trainer, {"schedule/phase": number, "schedule/trainable_parameters": count}, step=step)

    def _give_back(self, pl_module: pl.LightningModule) -> None:
        """Leave the flags as they were found, so that the next fit chooses among the same parameters."""
        if self._found:
            set_trainable(pl_module, self._found)
            self._found = []

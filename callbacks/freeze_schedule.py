"""What trains when: phases that free and freeze parameters, right under DDP and exact on resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import LBFGS
from typing_extensions import override

from lightning_peft.blocks import block_of
from lightning_peft.callbacks.phase_clock import PhaseClock
from lightning_peft.callbacks.phase_parameters import PhaseParameters
from lightning_peft.callbacks.phase_timeline import draw_timeline
from lightning_peft.callbacks.phases import Phase, Plateau
from lightning_peft.callbacks.step_rates import StepRates
from lightning_peft.distributed import (
    check_first_gradients,
    expect_state_of,
    names_with_state,
    refuse_unsupported,
    rewrap,
)
from lightning_peft.freezing import (
    StillLayers,
    drop_frozen_state,
    forget_directions,
    record_trained,
    set_trainable,
    trainable_count,
    trainable_names,
)
from lightning_peft.logging import log_figure, log_values, register_chart
from lightning_peft.matching import match_names
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "FreezeSchedule"


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
                raise ValueError(
                    f"{_OWNER}: phase {number} ({phase}) needs epochs=, steps= or until=: another follows it."
                )
        self.clock = PhaseClock(self.phases)
        self._found: list[str] = []
        self._still = StillLayers()
        self._rates = StepRates()
        self._parameters: PhaseParameters | None = None
        self._checked: set[int] = set()

    @property
    def number(self) -> int:
        """Number of the phase that it is, from 0."""
        return self.clock.number

    @classmethod
    def head_first(cls, head: str = "head", *, steps: int | None = None, epochs: int | None = None) -> FreezeSchedule:
        """Train the head alone for a while, then all that was trainable.

        Args:
            head: Dotted name of the head inside the LightningModule.
            steps: Length of the first phase in optimizer steps.
            epochs: Length of the first phase in epochs.
        """
        return cls([Phase([f"{head}.*"], epochs=epochs, steps=steps), Phase(["*"])])

    @classmethod
    def gradual(cls, blocks: Sequence[str], *, epochs: int = 1) -> FreezeSchedule:
        """Free one block more at a time, from the top down, then all that was trainable.

        Howard & Ruder 2018, arXiv:1801.06146, section 3.3.

        Args:
            blocks: Globs over parameter names, the head first.
            epochs: Length of each phase but the last.

        >>> [phase.train for phase in FreezeSchedule.gradual(["head.*", "encoder.layer.1.*"]).phases]
        [['head.*'], ['head.*', 'encoder.layer.1.*'], ['*']]
        """
        blocks = list(blocks)
        return cls([*(Phase(blocks[: count + 1], epochs=epochs) for count in range(len(blocks))), Phase(["*"])])

    @classmethod
    def chain_thaw(cls, blocks: Sequence[str], *, epochs: int = 1) -> FreezeSchedule:
        """Train one block at a time, each alone, then all that was trainable.

        Felbo et al. 2017, arXiv:1708.00524, section 3.3.

        Args:
            blocks: Globs over parameter names in their order: the new layers, then the network from the bottom up.
            epochs: Length of each phase but the last.
        """
        return cls([*(Phase([block], epochs=epochs) for block in blocks), Phase(["*"])])

    @classmethod
    def alternate(
        cls, a: Sequence[str], b: Sequence[str], *, rounds: int, steps: int | None = None, epochs: int | None = None
    ) -> FreezeSchedule:
        """Train two parts by turns; the last turn lasts to the end of the run.

        Args:
            a: Globs of the part that comes first.
            b: Globs of the other one.
            rounds: How often both have their turn.
            steps: Length of a turn in optimizer steps.
            epochs: Length of a turn in epochs.

        Raises:
            ValueError: If no length is given, or there is no round.
        """
        if rounds < 1 or (steps is None and epochs is None):
            raise ValueError(f"{_OWNER}.alternate: rounds={rounds!r} must be at least 1, and steps= or epochs= given.")
        turns = [Phase(list(part), steps=steps, epochs=epochs) for _ in range(rounds) for part in (a, b)]
        return cls([*turns[:-1], Phase(list(b))])

    @classmethod
    def surgical(cls, *blocks: str) -> FreezeSchedule:
        """Train some blocks only, from the first step to the last.

        Lee et al. 2022, arXiv:2210.11466: which block helps depends on how the data shifted.

        Args:
            blocks: Globs over parameter names, as ``"encoder.layer.0.*"``.
        """
        return cls([Phase(list(blocks))])

    def describe(self, module: pl.LightningModule) -> Table:
        """Print the phases with what trains in each, and return the table.

        Call it before training; a module that builds its network in ``configure_model`` builds it now.

        Args:
            module: What will be trained.

        Raises:
            ValueError: For globs that match no parameter, or only frozen ones.
        """
        module.configure_model()
        parameters = PhaseParameters(self.phases, module, self._found or trainable_names(module), _OWNER)
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        rates = ["learning rate"] if any(phase.rate != "as set" for phase in self.phases) else []
        table = Table("phase", "trains", "until", *rates, "tensors", "numbers", "of all", title=_OWNER)
        for number, (phase, names) in enumerate(zip(self.phases, parameters.chosen, strict=True)):
            count = sum(sizes[name] for name in names)
            share = f"{count / sum(sizes.values()):.1%}"
            row = [str(number), ", ".join(phase.train), phase.end, phase.rate, str(len(names)), f"{count:,}", share]
            table.add_row(*(row if rates else [*row[:3], *row[4:]]))
        Console().print(table)
        return table

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage != "fit":
            return
        refuse_unsupported(trainer, _OWNER)
        register_chart(trainer, "What trains", "parameters", ["schedule/trainable_parameters"])
        register_chart(trainer, "What trains", "phase", ["schedule/phase"])
        if not self._found:
            self.clock.begin(0, trainer.current_epoch, trainer.global_step)
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
        self._parameters = PhaseParameters(self.phases, pl_module, self._found, _OWNER)
        for number, (phase, names) in enumerate(zip(self.phases, self._parameters.chosen, strict=True)):
            if without := [name for name in names if id(parameters[name]) not in held]:
                raise ValueError(
                    f"{_OWNER}: phase {number} trains {len(without)} parameters that no optimizer holds, first "
                    f"{without[:3]}. Give configure_optimizers every parameter that a phase trains ({phase.train})."
                )
        uneven = [phase for phase in self.phases if phase.warmup_steps or isinstance(phase.lr_scale, dict)]
        if uneven and any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ValueError(
                f"{_OWNER}: LBFGS has one learning rate for all, but {uneven[0]} gives parts their own. Write lr_scale as one "
                "number, without warmup_steps."
            )
        if any(phase.lr_scale != 1 or phase.warmup_steps for phase in self.phases):
            self._rates.attach(trainer.optimizers, self._factor_now(trainer, pl_module))
            for block in dict.fromkeys(map(block_of, self._parameters.names)):
                register_chart(trainer, "What trains", "learning rates, scaled", [f"schedule/lr/{block}"])
        expect_state_of(trainer, pl_module, self.state_key)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The first hook at which every strategy has restored loops and callbacks.
        plateaus = [phase.until for phase in self.phases if isinstance(phase.until, Plateau)]
        if not trainer.enable_validation and (blind := [one for one in plateaus if one.each == "validation"]):
            raise ValueError(
                f"{_OWNER}: {blind[0]} needs validations, and the run has none. Write Plateau(..., each='epoch')."
            )
        self.clock.start(trainer)
        self._apply(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._move_on(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A validation in mid-epoch may have ended the phase; a run may resume into an epoch without its on_train_epoch_start.
        if self.clock.stepped:  # not among accumulated gradients
            self._move_on(trainer, pl_module)
        self._still.keep(pl_module)  # somebody may have called train()
        every = cast("Any", trainer).log_every_n_steps
        if self._rates.attached and every and trainer.global_step % every == 0:
            rates = self._rates.present(trainer.optimizers, pl_module)
            log_values(trainer, {f"schedule/lr/{block}": rate for block, rate in rates.items()})

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if id(optimizer) not in self._checked:
            self._checked.add(id(optimizer))
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            named = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None and id(p) in held]
            check_first_gradients(trainer, named)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._rates.give_back()  # of a step that broke and was caught
        # global_step moves with the optimizer only, so a phase never ends among accumulated gradients.
        self.clock.count_batch(trainer, pl_module)
        if self.clock.stepped and (self.clock.phase.steps is not None or self.clock.over):
            # At an epoch's last batch the next phase begins with the next epoch.
            self._move_on(trainer, pl_module, in_epoch=trainer.current_epoch + int(trainer.is_last_batch))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.clock.look(trainer, "validation")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock.look(trainer, "epoch")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, self.number)  # the last tread of the staircase is as long as its phase
        assert self._parameters is not None
        timeline = draw_timeline(self.clock.history, trainer.global_step, self._parameters.shares(pl_module))
        log_figure(trainer, "schedule/timeline", timeline)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._give_back(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._give_back(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.clock.state_dict()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["callbacks"][self.state_key]["with_state"] = names_with_state(trainer, pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["number"] >= len(self.phases):
            raise ValueError(
                f"{_OWNER}: the checkpoint is in phase {state_dict['number']}, but this schedule has "
                f"{len(self.phases)} phases. Resume with the schedule that the run was started with."
            )
        self.clock.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: a copy begins anew."""
        return {**vars(self), "_found": [], "_checked": set(), "_parameters": None}

    def _factor_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[Tensor], float]:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        parameters, clock = self._parameters, self.clock
        assert parameters is not None

        def factor(parameter: Tensor) -> float:
            return parameters.factor(clock.number, names.get(id(parameter), ""), trainer.global_step - clock.began_step)

        return factor

    def _move_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, in_epoch: int | None = None) -> None:
        before = self.number
        if self.clock.advance(trainer, in_epoch=trainer.current_epoch if in_epoch is None else in_epoch):
            self._log(trainer, pl_module, before, trainer.global_step - 1)  # the riser of the staircase
            forget_directions(trainer.optimizers)
            self._apply(trainer, pl_module)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._parameters is not None
        if set_trainable(pl_module, self._parameters.chosen[self.number]):
            rewrap(trainer, pl_module)
        if self.clock.phase.frozen_state == "reset":
            drop_frozen_state(trainer.optimizers)
        self.clock.note(trainer.global_step)
        self._checked.clear()
        self._still.choose(pl_module, dropout=not self.clock.phase.frozen_dropout)
        count = trainable_count(pl_module)
        rank_zero_info(f"{_OWNER}: phase {self.number} at step {trainer.global_step}: {count:,} numbers train.")
        self._log(trainer, pl_module, self.number)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, number: int, step: int | None = None) -> None:
        count = trainable_count(pl_module)
        log_values(trainer, {"schedule/phase": number, "schedule/trainable_parameters": count}, step=step)

    def _give_back(self, pl_module: pl.LightningModule) -> None:
        """Leave flags and rates as they were found, so that the next fit chooses among the same parameters."""
        self._rates.detach()
        if self._found:
            set_trainable(pl_module, self._found)
            self._found = []
            self._still.release(pl_module)

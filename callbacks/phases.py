"""Phases of training: what trains, for how long, and what ends them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_peft.distributed import mean_over_ranks

Until = Callable[[pl.Trainer, pl.LightningModule], bool]


@dataclass
class Plateau:
    """End a phase when a metric has not become better for a while.

    The metric counts as better once it passes the best value of the phase by more than ``min_delta``; ranks take the mean of
    their values, so that all end the phase together. The rule is that of ``ReduceLROnPlateau`` with an absolute threshold.

    Args:
        monitor: Name under which the metric is logged.
        patience: Checks without progress after which the phase ends.
        mode: Whether less or more is better.
        min_delta: Progress that counts, in units of the metric.
        each: When to look: after every validation, or at the end of every training epoch.

    Raises:
        ValueError: For values that cannot be; in training, for a metric that nobody logs or that is not finite.

    >>> plateau = Plateau("val_loss", patience=2)
    >>> [plateau.passed(loss) for loss in (1.0, 0.8, 0.9, 0.8)]
    [False, False, False, True]
    """

    monitor: str
    patience: int = 3
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0
    each: Literal["validation", "epoch"] = "validation"
    best: float | None = field(default=None, init=False, repr=False, compare=False)
    bad_checks: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what can be known without a run."""
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"Plateau: patience={self.patience!r} must be a whole number of at least 1.")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise ValueError(f"Plateau: min_delta={self.min_delta!r} must be finite and not negative.")
        for name, value, known in (("mode", self.mode, ("min", "max")), ("each", self.each, ("validation", "epoch"))):
            if value not in known:
                raise ValueError(f"Plateau: {name}={value!r} is unknown; take one of {', '.join(known)}.")

    def start(self) -> None:
        """Forget what an earlier phase saw."""
        self.best, self.bad_checks = None, 0

    def passed(self, value: float) -> bool:
        """Take one more value; return whether the phase is over."""
        sign = 1 if self.mode == "min" else -1
        if self.best is None or sign * (self.best - value) > self.min_delta:
            self.best, self.bad_checks = value, 0
        else:
            self.bad_checks += 1
        return self.bad_checks >= self.patience

    def look(self, trainer: pl.Trainer) -> bool:
        """Read the metric from the trainer, the same on every rank; return whether the phase is over."""
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"Plateau: monitor={self.monitor!r} was not logged by the {self.each} that just ended; these were: "
                f"{sorted(metrics)}. A metric of training_step needs each='epoch'."
            )
        value = mean_over_ranks(float(metrics[self.monitor]))
        if not math.isfinite(value):
            raise ValueError(
                f"Plateau: {self.monitor!r} is {value} in epoch {trainer.current_epoch}; training diverged."
            )
        return self.passed(value)


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which only some parameters train.

    Args:
        train: Globs over the parameter names of the LightningModule; ``*`` crosses dots.
        epochs: Length in epochs. A phase that begins in mid-epoch counts the rest of it as its first.
        steps: Length in optimizer steps. The last phase of a schedule may have no end and lasts to that of the run.
        until: What else ends the phase: a :class:`Plateau`, or a function of trainer and module that is asked after every
            optimizer step and returns whether to go on to the next phase.
        lr_scale: Factor of the learning rate that the optimizer and its LR schedulers say: one for all, or factors by glob, of
            which the first that matches a parameter counts (none: 1).
        warmup_steps: Optimizer steps in which the rate of what this phase frees rises linearly: step k of n takes k/n of it.
        thaw_base: Let the globs also free parameters that were frozen when the run began, such as the base under a
            LoRA.
        frozen_dropout: Whether dropout stays on in modules of which nothing trains.
        frozen_state: What becomes of the optimizer's state (momentum, Adam's moments) of what does not train in this phase:
            ``"keep"`` it for later, or ``"reset"`` it, which gives back its memory. What never trained has none yet.

    Raises:
        ValueError: If no glob is given, or more than one end is, or a number is out of its range.

    >>> Phase(train=["head.*"], steps=30).steps
    30
    """

    train: list[str]
    epochs: int | None = None
    steps: int | None = None
    until: Plateau | Until | None = None
    lr_scale: float | dict[str, float] = 1.0
    warmup_steps: int = 0
    thaw_base: bool = False
    frozen_dropout: bool = True
    frozen_state: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        if isinstance(self.train, str) or not self.train:
            raise ValueError(f"Phase: train={self.train!r} must be a list of at least one glob over parameter names.")
        ends: dict[str, Any] = {"epochs": self.epochs, "steps": self.steps, "until": self.until}
        if len(given := [f"{name}={end!r}" for name, end in ends.items() if end is not None]) > 1:
            raise ValueError(f"Phase: {' and '.join(given)} exclude each other; give one.")
        for unit, length in (("epochs", self.epochs), ("steps", self.steps)):
            if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
                raise ValueError(f"Phase: {unit}={length!r} must be a whole number of at least 1.")
        if self.until is not None and not callable(self.until) and not isinstance(self.until, Plateau):
            raise ValueError(f"Phase: until={self.until!r} must be a Plateau or a function of trainer and module.")
        for factor in self.lr_scale.values() if isinstance(self.lr_scale, Mapping) else [self.lr_scale]:
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise ValueError(
                    f"Phase: lr_scale={self.lr_scale!r} must be finite and above 0; what should not move is left out of train."
                )
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"Phase: warmup_steps={self.warmup_steps!r} must be a whole number, 0 for none.")
        if self.frozen_state not in ("keep", "reset"):
            raise ValueError(f"Phase: frozen_state={self.frozen_state!r} is unknown; take one of keep, reset.")

    @property
    def rate(self) -> str:
        """What becomes of the learning rate, in words."""
        scales = self.lr_scale if isinstance(self.lr_scale, Mapping) else {"": self.lr_scale}
        words = [f"{f'{glob} ' if glob else ''}x {factor:g}" for glob, factor in scales.items() if factor != 1 or glob]
        return ", ".join([*words, *([f"warm-up {self.warmup_steps}"] if self.warmup_steps else [])]) or "as set"

    @property
    def endless(self) -> bool:
        """Whether the phase lasts to the end of the run."""
        return self.epochs is None and self.steps is None and self.until is None

    @property
    def end(self) -> str:
        """What ends the phase, in words."""
        for unit, length in (("epoch", self.epochs), ("step", self.steps)):
            if length is not None:
                return f"{length} {unit}{'s' if length > 1 else ''}"
        if isinstance(self.until, Plateau):
            return f"{self.until.monitor} flat for {self.until.patience}"
        return "end of the run" if self.until is None else getattr(self.until, "__name__", type(self.until).__name__)

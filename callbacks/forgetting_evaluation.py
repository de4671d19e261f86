"""Measure old tasks while a new one is learned, without touching the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from typing_extensions import override

from lightning_peft.logging import log_values, register_chart
from lightning_peft.old_task import OldTask, evaluate
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "ForgettingEvaluation"


class ForgettingEvaluation(pl.Callback):
    """Log how much of each old task is left, and how much is lost.

    ``retained/<name>`` is the task's value; ``forgetting/<name>`` is the drop since before training, ``before - after``
    (``after - before`` where lower is better), never clipped: below zero the task has improved. Measured before the
    first step, every so many epochs or steps, and after the last. Training is bit-identical with and without it. Once a
    ``WeightAveraging`` callback has begun to average the weights, the averaged ones are measured: they are what remains.
    The last value is always of the weights that training ends with.

    Args:
        tasks: Old tasks by name.
        every_n_epochs: Measure at the end of every so many epochs.
        every_n_steps: Measure after every so many optimizer steps.

    Raises:
        ValueError: For no task, or for both intervals; before training, for a task that cannot be measured.
    """

    def __init__(
        self, tasks: Mapping[str, OldTask], *, every_n_epochs: int | None = None, every_n_steps: int | None = None
    ) -> None:
        if not tasks or "" in tasks:
            raise ValueError(f"{_OWNER}: tasks={tasks!r} must be at least one OldTask, each with a name.")
        for name, task in tasks.items():
            if not isinstance(task, OldTask):
                raise ValueError(
                    f"{_OWNER}: {name!r} is a {type(task).__name__}; wrap it as OldTask(data, metric, step)."
                )
        if every_n_epochs is not None and every_n_steps is not None:
            raise ValueError(f"{_OWNER}: every_n_epochs and every_n_steps exclude each other; give one.")
        for unit, every in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if every is not None and (not isinstance(every, int) or every < 1):
                raise ValueError(f"{_OWNER}: {unit}={every!r} must be a whole number of at least 1.")
        self.tasks = dict(tasks)
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._measured_at = -1

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; two callbacks with different tasks may stand side by side."""
        return self._generate_state_key(tasks=sorted(self.tasks))

    @property
    def forgetting(self) -> dict[str, float]:
        """The drop of each task since before training, in the metric's own unit."""
        return {name: task.sign * (self.before[name] - self.after[name]) for name, task in self.tasks.items()}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            _come_first(trainer, self)
            for family in ("forgetting", "retained"):
                register_chart(trainer, "Old tasks", family, [f"{family}/{name}" for name in self.tasks])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.before or trainer.global_step == 0:  # a resumed run keeps the baseline of its first start
            self.before = {}
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps
        if every and trainer.global_step % every == 0 and trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._measured_at or _movers(trainer):  # which put other weights in, just before this
            self._measure(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self.before), "after": dict(self.after), "measured_at": self._measured_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = dict(state_dict["before"]), dict(state_dict["after"])
        self._measured_at = state_dict["measured_at"]

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with _averaged(trainer, pl_module), _forward_context(trainer):
            self.after = {
                name: evaluate(
                    pl_module,
                    task,
                    name=name,
                    to_device=lambda batch: trainer.strategy.batch_to_device(
                        trainer.precision_plugin.convert_input(batch)
                    ),
                    progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
                )
                for name, task in self.tasks.items()
            }
        self.before = self.before or dict(self.after)
        self._measured_at = trainer.global_step
        values = {f"retained/{name}": value for name, value in self.after.items()}
        values |= {f"forgetting/{name}": drop for name, drop in self.forgetting.items()}
        log_values(trainer, values)


def _forward_context(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Return the precision context of the trainer's own forwards (autocast and the like)."""
    plugin = trainer.precision_plugin
    return cast("AbstractContextManager[Any]", plugin.forward_context()) if plugin is not None else nullcontext()


def _come_first(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Put a callback before those that look at its values, such as EarlyStopping, and behind those that move weights."""
    found, movers = cast("Any", trainer), _movers(trainer)
    others = [other for other in found.callbacks if other is not callback and other not in movers]
    found.callbacks = [*movers, callback, *others]


def _movers(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks that end training with other weights than its last step's."""
    kinds = WeightAveraging, StochasticWeightAveraging
    return [callback for callback in cast("Any", trainer).callbacks if isinstance(callback, kinds)]


@contextmanager
def _averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Put averaged weights into the module for a while, where a callback has begun to average them."""
    begun = [
        callback
        for callback in cast("Any", trainer).callbacks
        if isinstance(callback, WeightAveraging) and cast("Any", callback)._average_model.n_averaged > 0
    ]
    for callback in begun:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in begun:
            callback._swap_models(pl_module)

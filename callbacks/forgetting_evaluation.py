"""Measure old tasks while a new one is learned, without touching the training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_peft.adapters import adapter_disabled
from lightning_peft.callbacks.forgetting_report import draw_learned, write_summary
from lightning_peft.callbacks.measuring import check_intervals, check_tasks, come_first, measure, movers
from lightning_peft.callbacks.time_share import TimeShare
from lightning_peft.distillation import adapted_networks
from lightning_peft.logging import log_figure, log_values, register_chart
from lightning_peft.old_task import OldTask
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "ForgettingEvaluation"


class ForgettingEvaluation(pl.Callback):
    """Log how much of each old task is left, and how much is lost.

    ``retained/<name>`` is the task's value; ``forgetting/<name>`` is the drop since before training, ``before - after``
    (``after - before`` where lower is better), never clipped: below zero the task has improved. Measured before the
    first step, every so many epochs or steps, and after the last. Training is bit-identical with and without it. Once a
    ``WeightAveraging`` callback has begun to average the weights, the averaged ones are measured: they are what remains.
    The last value is always of the weights that training ends with.

    After the run the summary is in ``forgetting.json`` in the logger's folder, and a picture of what was learned against what
    was forgotten in TensorBoard.

    Args:
        tasks: Old tasks by name.
        every_n_epochs: Measure at the end of every so many epochs.
        every_n_steps: Measure after every so many optimizer steps.
        max_fraction_of_time: Leave a measurement out where it would take more than this part of the time since the last one;
            those before the first step and after the last are always made.
        adapter_off: Measure with the network's adapters off, too: ``retained/<name>/adapter_off``.
        learned: A key of ``callback_metrics`` that says how well the new task goes, for the picture.

    Raises:
        ValueError: For no task, for both intervals, or a fraction outside (0, 1]; before training, for a task that cannot be
            measured, and for ``adapter_off`` of a network without adapters.
    """

    def __init__(
        self,
        tasks: Mapping[str, OldTask],
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        max_fraction_of_time: float | None = None,
        adapter_off: bool = False,
        learned: str | None = None,
    ) -> None:
        self.tasks = check_tasks(tasks, _OWNER)
        check_intervals(_OWNER, every_n_epochs, every_n_steps)
        if max_fraction_of_time is not None and not 0 < max_fraction_of_time <= 1:
            raise ValueError(f"{_OWNER}: max_fraction_of_time={max_fraction_of_time!r} must lie in (0, 1].")
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.adapter_off, self.learned = adapter_off, learned
        self.time = TimeShare(max_fraction_of_time)
        self.history: list[dict[str, Any]] = []
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._measured_at = self._seen = -1

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
            come_first(trainer, self)
            for family in ("forgetting", "retained"):
                register_chart(trainer, "Old tasks", family, [f"{family}/{name}" for name in self.tasks])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step
        self._measured_at = min(self._measured_at, self._seen)  # it may be of an earlier fit
        if not self.before or trainer.global_step == 0:  # a resumed run keeps the baseline of its first start
            self.before, self.history = {}, []
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._seen = self._seen, trainer.global_step
        every = self.every_n_steps  # a batch of several optimizers takes several steps, and may pass by a multiple
        due = every and self._seen // every > before // every and self._seen != self._measured_at
        if due and self.time.allows():
            self._measure(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and self.time.allows():
            self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._measured_at:  # a run that resumes after its last step has no end of training
            self._end(trainer, pl_module)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        moved = bool(movers(trainer))  # which put other weights in, just before this
        if trainer.global_step != self._measured_at or moved:
            self._measure(trainer, pl_module, moved=moved)
        if self.learned is not None:
            log_figure(trainer, "forgetting/learned", draw_learned(self.history, self.learned))
        folder = trainer.log_dir if trainer.loggers else None  # every rank asks: Lightning broadcasts the answer
        if trainer.is_global_zero and folder is not None:
            summary = {
                "before": self.before,
                "after": self.after,
                "forgetting": self.forgetting,
                "history": self.history,
            }
            write_summary(Path(folder, "forgetting.json"), summary)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "measured_at": self._measured_at,
            "history": list(self.history),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = dict(state_dict["before"]), dict(state_dict["after"])
        self._measured_at, self.history = state_dict["measured_at"], list(state_dict.get("history", []))

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, moved: bool = False) -> None:
        with self.time.spent():
            self.after = measure(trainer, pl_module, self.tasks)
            off = self._without_adapters(trainer, pl_module) if self.adapter_off else {}
        self.before = self.before or dict(self.after)
        self._measured_at = trainer.global_step
        values = {f"retained/{name}": value for name, value in self.after.items()}
        values |= {f"forgetting/{name}": drop for name, drop in self.forgetting.items()}
        values |= {f"retained/{name}/adapter_off": value for name, value in off.items()}
        # What is known of the new task is of the weights before they were moved.
        learned = None if self.learned is None or moved else trainer.callback_metrics.get(self.learned)
        self.history.append(
            {
                "step": trainer.global_step,
                "retained": dict(self.after),
                "forgetting": self.forgetting,
                "learned": None if learned is None else float(learned),
            }
        )
        log_values(trainer, values)

    def _without_adapters(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        networks = adapted_networks(pl_module)
        if not networks:
            raise ValueError(
                f"{_OWNER}: adapter_off=True, but {type(pl_module).__name__} has no adapter. Leave it out."
            )
        with ExitStack() as stack:
            for _, network, _ in networks:
                stack.enter_context(adapter_disabled(network))
            return measure(trainer, pl_module, self.tasks)

"""Measure old tasks inside a fit: with the trainer's precision and devices, and the weights that will remain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_peft.old_task import OldTask, evaluate


def check_tasks(tasks: Mapping[str, OldTask], owner: str) -> dict[str, OldTask]:
    """Return tasks by name.

    Raises:
        ValueError: If there is none, or one is no task.
    """
    if not tasks or "" in tasks:
        raise ValueError(f"{owner}: tasks={tasks!r} must be at least one OldTask, each with a name.")
    for name, task in tasks.items():
        if not isinstance(task, OldTask):
            raise ValueError(f"{owner}: {name!r} is a {type(task).__name__}; wrap it as OldTask(data, metric, step).")
    return dict(tasks)


def check_intervals(owner: str, every_n_epochs: int | None, every_n_steps: int | None) -> None:
    """Refuse intervals of both kinds, and one that is no whole number of at least 1."""
    if every_n_epochs is not None and every_n_steps is not None:
        raise ValueError(f"{owner}: every_n_epochs and every_n_steps exclude each other; give one.")
    for unit, every in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(f"{owner}: {unit}={every!r} must be a whole number of at least 1.")


def measure(trainer: pl.Trainer, pl_module: pl.LightningModule, tasks: Mapping[str, OldTask]) -> dict[str, float]:
    """Return the value of each task, the same on every rank; training goes on as if nothing had happened.

    Where a ``WeightAveraging`` callback has begun to average the weights, the averaged ones are measured.
    """
    with averaged(trainer, pl_module):
        return measure_present(trainer, pl_module, tasks)


def measure_present(
    trainer: pl.Trainer, pl_module: pl.LightningModule, tasks: Mapping[str, OldTask]
) -> dict[str, float]:
    """Return the value of each task with the weights that are in the module; otherwise as :func:`measure`."""
    with forward_context(trainer):
        return {
            name: evaluate(
                pl_module,
                task,
                name=name,
                to_device=lambda batch: trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)),
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            )
            for name, task in tasks.items()
        }


def come_first(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Put a callback before those that look at its values, such as EarlyStopping, and behind those that move weights."""
    found = cast("Any", trainer)
    first = [mover for mover in movers(trainer) if mover is not callback]
    others = [other for other in found.callbacks if other is not callback and other not in first]
    found.callbacks = [*first, callback, *others]


def movers(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks that end training with other weights than its last step's.

    Our own say so by an attribute ``moves_weights``.
    """
    kinds = WeightAveraging, StochasticWeightAveraging
    return [
        callback
        for callback in cast("Any", trainer).callbacks
        if isinstance(callback, kinds) or getattr(callback, "moves_weights", False)
    ]


def forward_context(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Return the precision context of the trainer's own forwards (autocast and the like)."""
    plugin = trainer.precision_plugin
    return cast("AbstractContextManager[Any]", plugin.forward_context()) if plugin is not None else nullcontext()


@contextmanager
def averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
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

"""Where Lightning's fit loop stands when a checkpoint is written, and how it goes on from there.

This is the only file that sets the loop's counters. Lightning resumes from the end of a batch or an epoch without what was left
of it: the validation that was due, the hooks of the epoch's end, the look that a ``ReduceLROnPlateau`` takes after both.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, cast

import lightning.pytorch as pl


class Left(Enum):
    """What was left to do when a checkpoint was written."""

    UNKNOWN = "written in the middle of a batch or before one: Lightning goes on by its own rules"
    BATCH = "a batch was trained on; a validation, looks at metrics and the end of an epoch may follow"
    VALIDATED = "so was it validated"
    EPOCH = "the hooks of an epoch's end were called; looks at metrics follow"
    NOTHING = "an epoch was over"


def where(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what a checkpoint keeps beside Lightning's own counters."""
    fit: Any = trainer.fit_loop
    return {"validating": bool(trainer.validating), "loaded_in_epoch": fit._last_train_dl_reload_epoch}


def loads_anew(trainer: pl.Trainer) -> bool:
    """Whether the loaders of the next epoch are made anew."""
    every = cast("Any", trainer).reload_dataloaders_every_n_epochs
    return (
        bool(every) and trainer.current_epoch + 1 - cast("Any", trainer.fit_loop)._last_train_dl_reload_epoch >= every
    )


def settle(checkpoint: dict[str, Any], place: dict[str, Any]) -> Left:
    """Change the counters of a loaded checkpoint to those of a batch or an epoch that is over; return what is left of it.

    Args:
        checkpoint: As Lightning hands it to ``on_load_checkpoint``, before it reads the counters.
        place: What :func:`where` returned.
    """
    counters = checkpoint["loops"]["fit_loop"]
    epochs, batches = counters["epoch_progress"], counters["epoch_loop.batch_progress"]
    if (total := epochs["total"])["ready"] == total["started"] == total["processed"] > 0:
        left = Left.NOTHING if total["completed"] == total["processed"] else Left.EPOCH
        for count in (total, epochs["current"]):
            count["completed"] = count["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        return left
    if (total := batches["total"])["ready"] == total["started"] == total["processed"] > 0:
        if total["completed"] < total["processed"]:
            for count in (total, batches["current"]):
                count["completed"] = count["processed"]
            return Left.BATCH
        if place["validating"]:
            validated = counters["epoch_loop.val_loop.batch_progress"]["total"]
            return Left.VALIDATED if validated["completed"] == validated["started"] else Left.BATCH
    return Left.UNKNOWN


def go_on(trainer: pl.Trainer, left: Left, place: dict[str, Any]) -> None:
    """Let the loops do what was left. Call it in ``on_train_start``.

    Args:
        trainer: Its loops have counted what :func:`settle` returned.
        left: What is left.
        place: What :func:`where` returned.
    """
    fit: Any = trainer.fit_loop
    fit._restarting = False  # Lightning lets no scheduler look at the end of an epoch that was resumed
    fit._last_train_dl_reload_epoch = place["loaded_in_epoch"]
    if left in {Left.BATCH, Left.VALIDATED}:
        fit.epoch_loop.val_loop.restarting = False  # a validation that was begun begins again
        fit.epoch_loop._skip_next_val = left is Left.VALIDATED
        _take_no_batch_first(fit.epoch_loop)
    elif left in {Left.EPOCH, Left.NOTHING}:
        fit.epoch_loop.restarting = False
        if left is Left.EPOCH:
            _look(trainer)


def _take_no_batch_first(epoch_loop: Any) -> None:
    """Let the loop, in its first turn, do only what follows a batch."""

    def advance(_: object) -> None:
        del epoch_loop.advance

    epoch_loop.advance = advance


def _look(trainer: pl.Trainer) -> None:
    """Let each ``ReduceLROnPlateau`` take the look that is due after an epoch."""
    module = trainer.lightning_module
    for config in trainer.lr_scheduler_configs if module.automatic_optimization else []:
        value = trainer.callback_metrics.get(str(config.monitor))
        due = config.reduce_on_plateau and config.interval == "epoch" and trainer.current_epoch % config.frequency == 0
        if due and value is not None:
            module.lr_scheduler_step(config.scheduler, value)

"""Looks at a metric that ``ReduceLROnPlateau`` owes when a checkpoint is written.

Lightning lets such a scheduler look after the hooks in which checkpoints are written, and leaves that look out when it resumes.
"""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl


class PlateauLooks:
    """Know which schedulers have still to look at their metric for the batch or epoch that just ended."""

    def __init__(self) -> None:
        self.validated = False
        self._batch: int | None = None
        self._epoch = False

    def nothing_is_due(self) -> None:
        """Begin a batch, or end the run."""
        self.validated, self._batch, self._epoch = False, None, False

    def after_batch(self, batch_idx: int, *, stepped: bool, last: bool) -> None:
        """End a batch: the looks of its step and, after the last one, of its epoch are due."""
        self._batch, self._epoch = (batch_idx if stepped else None), last

    def after_epoch(self) -> None:
        """End an epoch: the look of its last step has been taken."""
        self.validated, self._batch, self._epoch = True, None, True

    def due(self, trainer: pl.Trainer) -> dict[int, float]:
        """Return the metric of each scheduler that has still to look, by its number.

        A validation that is due, too, may log the metric anew; before it the metric is not known.
        """
        known = self.validated or not (self._epoch and any(trainer.num_val_batches))
        counts = {"step": self._batch, "epoch": trainer.current_epoch if self._epoch and known else None}
        return {
            number: float(trainer.callback_metrics[str(config.monitor)])
            for number, config in enumerate(trainer.lr_scheduler_configs)
            if config.reduce_on_plateau
            and (count := counts[config.interval]) is not None
            and (count + 1) % config.frequency == 0
            and config.monitor in trainer.callback_metrics
        }

    def make_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: Mapping[int, float]) -> None:
        """Take the looks that were due when the checkpoint was written."""
        for number, metric in metrics.items():
            pl_module.lr_scheduler_step(trainer.lr_scheduler_configs[number].scheduler, metric)

"""Learn something new and keep the old: the callbacks that do it, in the right order, for any LightningModule."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl

from lightning_peft.callbacks import ForgettingEvaluation, FreezeSchedule, OldTask, ReplayMixing, ZeroInitHead
from lightning_peft.data.mix_loader import Rows


def keep_what_it_knows(
    *,
    memory: Rows,
    old_tasks: Mapping[str, OldTask],
    head: str = "head",
    head_steps: int = 100,
    ratio: float = 0.2,
    seed: int = 0,
) -> list[pl.Callback]:
    """Return a head that starts at zero, head first, replay, and forgetting measured every epoch, for ``Trainer(callbacks=...)``.

    The order of the list does not matter. ``configs/keep_what_it_knows.yaml`` is the same for LightningCLI:
    ``lightning-peft recipes show keep_what_it_knows``.

    Args:
        memory: Old rows to mix in, as in :class:`~lightning_peft.callbacks.ReplayMixing`.
        old_tasks: What the network could do before, by name.
        head: Dotted name of the head inside the LightningModule.
        head_steps: Optimizer steps in which the head trains alone.
        ratio: Share of old rows.
        seed: Seed of the order of old rows.

    Raises:
        ValueError: As the callbacks do.

    >>> from torchmetrics.classification import MulticlassAccuracy
    >>> rows = [(0.0, 0)] * 8
    >>> task = OldTask(rows, MulticlassAccuracy(num_classes=2), lambda module, batch: (module(batch[0]), batch[1]))
    >>> [type(callback).__name__ for callback in keep_what_it_knows(memory=rows, old_tasks={"old": task})]
    ['ZeroInitHead', 'FreezeSchedule', 'ReplayMixing', 'ForgettingEvaluation']
    """
    return [
        ZeroInitHead(head),
        FreezeSchedule.head_first(head, steps=head_steps),
        ReplayMixing(memory, ratio=ratio, seed=seed),
        ForgettingEvaluation(old_tasks, every_n_epochs=1),
    ]

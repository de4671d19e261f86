"""Add a loss on old data to every training step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_peft.distributed import weight_by_units
from lightning_peft.mixins.order import refuse_order


class ReplayMixin(pl.LightningModule):
    """Let a module learn its task while it rehearses an old one.

    Define ``replay_step(self, batch)``, which returns the loss on a batch of old rows: any loss that practises the old
    skill. :class:`~lightning_peft.callbacks.ReplayMixing` brings the rows; the training loss becomes
    ``loss + weight * replay loss`` (or the mean of both in a given ratio), both in one forward of the wrapped module, so
    that DDP averages both.

    ``replay_step`` may communicate: every rank calls it in the same steps. A rank that has no row of its own in a step
    gets one that counts with weight 0.

    Over several processes the losses count by rows. Where ``replay_step`` is a mean over something else, tokens say, define
    ``replay_units(self, batch)``, which returns how many a batch has: then two processes equal one on the joint batch.
    """

    replay: tuple[Any, float, float] | None = None
    """The coming step's replay batch, the weight of its loss and that of the new one; ``ReplayMixing`` sets it, one step
    takes it."""
    new_loss: Tensor | None = None
    """What the training step returned last, beside a replay batch."""
    replay_loss: Tensor | None = None
    """What ``replay_step`` returned last; ``ReplayMixing`` logs it (a compiled step could not: torch 2.13 stops there)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the mixin would be skipped."""
        super().__init_subclass__(**kwargs)
        refuse_order(cls, ReplayMixin)

    if TYPE_CHECKING:  # at run time it is the module's, which may stand behind the mixin

        def replay_step(self, batch: Any) -> Tensor:
            """Return the mean loss over a batch of old rows; yours to define."""

    def replay_units(self, batch: Any) -> Tensor | float | None:
        """Return how many of what ``replay_step`` is the mean over a batch has; None: rows."""
        return None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        step = super().training_step
        takes_index = len(inspect.signature(step).parameters) > 1
        output = step(batch, batch_idx) if takes_index else step(batch)
        replay, self.replay = self.replay, None
        if replay is None or output is None:
            return output
        batch, old, new = replay
        loss = self.replay_step(batch)
        if (units := self.replay_units(batch)) is not None:
            old = weight_by_units(old, units, loss.device)
        whole = output["loss"] if isinstance(output, Mapping) else output
        self.new_loss, self.replay_loss = whole.detach(), loss.detach()
        joined = (whole if new == 1 else new * whole) + old * loss
        return {**output, "loss": joined} if isinstance(output, Mapping) else joined

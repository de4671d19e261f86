"""Estimate forgetting without old data: how far the network has moved from what it was, on the batches it learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.callbacks.measuring import come_first
from lightning_peft.distillation import Reference, kl_to_reference
from lightning_peft.distributed import gather_objects
from lightning_peft.logging import log_values, register_chart
from lightning_peft.old_task import untouched
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "KLGauge"
_KEY = "gauge/kl"


class KLGauge(pl.Callback):
    """Log ``KL(before || now)`` of the network's own predictions on new batches, in nats.

    "Before" is the network with its adapter off and with what else trains at its first values, so an adapter costs no second
    copy. Mean over rows or tokens, over all processes. Training is bit-identical with and without it. The first value is that
    of the first batch, after its step.

    Shenfeld et al. 2025, arXiv:2509.04259: KL to the base model on the *new* task predicts forgetting. It is an estimate: log
    it beside a measured drop while you have one, and learn what a nat costs in your task.

    Args:
        outputs: Takes the module and a batch and returns logits ``(..., classes)``, or them and a mask ``(...)`` of the rows or
            tokens that count.
        every_n_steps: Optimizer steps between two looks; each is two forward passes.

    Raises:
        ValueError: For an interval below 1, or an ``outputs`` that is no function; at the first look, if it does not return
            logits.

    >>> KLGauge(lambda module, batch: module(batch[0])).every_n_steps
    50
    """

    def __init__(self, outputs: Callable[[Any, Any], Any], *, every_n_steps: int = 50) -> None:
        if not callable(outputs):
            raise ValueError(
                f"{_OWNER}: outputs={outputs!r} must be a function of (module, batch) that returns logits."
            )
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"{_OWNER}: every_n_steps={every_n_steps!r} must be a whole number of at least 1.")
        self.outputs, self.every_n_steps = outputs, every_n_steps
        self.reference = Reference()
        self.value: float | None = None
        self._looked_at = -1

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            come_first(trainer, self)
            register_chart(trainer, "Old tasks", "estimated on new rows", [_KEY])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self.reference, self.value, self._looked_at = Reference(), None, -1
        self.reference.place(pl_module)
        self.reference.keep(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.reference.keep(pl_module)  # a schedule may have freed something

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self._looked_at < 1 or step // self.every_n_steps > self._looked_at // self.every_n_steps
        if due and step not in {0, self._looked_at}:
            self._looked_at = step
            self.value = self._look(trainer, pl_module, batch)
            log_values(trainer, {_KEY: self.value})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state_dict(), "value": self.value, "looked_at": self._looked_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reference = Reference(**state_dict["reference"])
        self.value, self._looked_at = state_dict["value"], state_dict["looked_at"]

    @torch.no_grad()
    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> float:
        with trainer.precision_plugin.forward_context():
            with untouched(pl_module, pl_module.device):
                now, mask = self._logits(pl_module, batch)
            with self.reference.acting(pl_module):
                before, _ = self._logits(pl_module, batch)
        count = float(mask.sum()) if mask is not None else now[..., 0].numel()
        own = float(kl_to_reference(now, before, mask=mask)) * count
        shares = gather_objects((own, count))
        total, counts = (sum(float(share[place]) for share in shares) for place in (0, 1))
        return total / max(counts, 1e-12)

    def _logits(self, pl_module: pl.LightningModule, batch: Any) -> tuple[Tensor, Tensor | None]:
        found = self.outputs(pl_module, batch)
        logits, mask = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise ValueError(
                f"{_OWNER}: outputs returned {type(logits).__name__}; it must return a tensor of logits (rows, ..., classes), or a "
                "tuple of logits and a mask."
            )
        return logits, mask

"""Hold each weight near its start as firmly as it matters to an old task: elastic weight consolidation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.data.mix_loader import Rows, row_count
from lightning_peft.distributed import refuse_unsupported
from lightning_peft.fisher import Labels, Step, check_labels, diagonal_fisher
from lightning_peft.logging import log_values, register_chart
from lightning_peft.matching import match_names
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "EWC"


class EWC(pl.Callback):
    """Add ``rate / 2 * sum F (w - w_0)^2`` to the loss, with ``F`` the Fisher information of old rows (Kirkpatrick et al. 2017).

    ``w_0`` are the weights when training starts, ``F`` the diagonal that :func:`~lightning_peft.fisher.diagonal_fisher` takes
    there, once (arXiv:1612.00796, equation 3; the mean over rows). The module's loss is not touched: the gradient
    ``rate * F * (w - w_0)`` is added to ``w.grad`` right before the optimizer step. That is behind accumulation, the average
    over ranks and unscaling, so it counts once per step, and before the trainer's clipping, which sees the whole gradient. Where
    a module steps by hand and clips by itself, it comes behind its clipping. A weight without a gradient takes no step, and is
    left alone.

    ``drift/ewc/<name>`` is the penalty, every ``log_every_n_steps`` of the trainer and after the last step.

    **The trap:** weights that the old rows never used have almost no ``F`` and move freely: classes that the rows lack are not
    held. The rate has no scale of its own (good ones differ by orders of magnitude): sweep it.

    Args:
        data: Old rows, as a map-style dataset or a loader; batches of one are made of them.
        step: ``step(module, batch)`` returns the logits of the old task, ``(..., classes)``; the batch is on the module's device.
            For ``labels="empirical"`` it returns logits and labels.
        rate: ``lambda`` of the paper.
        labels: Whose labels the Fisher information is taken of: ``"exact"`` costs a backward pass per row and class,
            ``"sampled"`` and ``"empirical"`` one per row.
        parameters: Globs over the names of the parameters that are held; unset, those that require a gradient when training
            starts. Name those that a schedule frees later.
        name: Of the old task; callbacks of several tasks may stand side by side.

    Raises:
        ValueError: For data without rows, a step that cannot be called, a rate that is not above 0 or unknown labels; before
            training, for a glob that matches no parameter, logits that depend on none of them, sharded parameters, or a
            strategy other than a single device and DDP.

    >>> EWC([torch.zeros(4)], lambda module, x: module(x), rate=100.0, name="digits").state_key
    "EWC{'name': 'digits'}"
    """

    def __init__(
        self,
        data: Rows,
        step: Step,
        rate: float,
        *,
        labels: Labels = "exact",
        parameters: str | Sequence[str] | None = None,
        name: str = "old",
    ) -> None:
        row_count(getattr(data, "dataset", data), f"{_OWNER}: data")
        if not callable(step):
            raise ValueError(f"{_OWNER}: step={step!r} must be a function of (module, batch).")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate) or rate <= 0:
            raise ValueError(f"{_OWNER}: rate={rate!r} must be a finite number above 0.")
        if not name:
            raise ValueError(f"{_OWNER}: name={name!r} must not be empty: it is part of the log key.")
        check_labels(labels, _OWNER)
        self.data, self.step, self.rate, self.labels, self.name = data, step, rate, labels, name
        self.parameters = [parameters] if isinstance(parameters, str) else parameters and list(parameters)
        self.fisher: dict[str, Tensor] = {}
        self._starts: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._logged_at = 0

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            refuse_unsupported(trainer, _OWNER)
            register_chart(trainer, "Old tasks", "EWC penalty", [f"drift/ewc/{self.name}"])

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.parameters is not None:
            match_names(dict(pl_module.named_parameters()), self.parameters, owner=_OWNER, kind="parameter")
        if any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
            raise ValueError(
                f"{_OWNER}: the parameters are sharded, and rows go through the network one by one on each process by itself. "
                "Use a single device or strategy='ddp'."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = dict(pl_module.named_parameters())
        if trainer.global_step == 0:
            self.fisher, self._starts = {}, {}
        self._logged_at = min(self._logged_at, trainer.global_step)  # it may be of an earlier fit
        if not self.fisher:  # a resumed run has those of its first start
            chosen = self._choose(known)
            self.fisher = self._measure(trainer, pl_module, chosen)
            self._starts = {name: known[name].detach().clone() for name in chosen}
        for kept in (self.fisher, self._starts):
            for name in [*kept]:
                if name in known:
                    kept[name] = kept[name].to(known[name].device)
                else:
                    del kept[name]
        self._names = {id(known[name]): name for name in self.fisher}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        scale = _scale(trainer, optimizer)
        with torch.no_grad():
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                name = self._names.get(id(parameter))
                if name and parameter.grad is not None and parameter.requires_grad:
                    pull = self.fisher[name] * (parameter - self._starts[name])
                    parameter.grad.add_(pull.to(parameter.grad.dtype), alpha=self.rate * scale)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = cast("Any", trainer).log_every_n_steps
        if every and trainer.global_step // every > self._logged_at // every:
            self._log(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._logged_at:
            self._log(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._names = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fisher": {**self.fisher}, "start": {**self._starts}, "logged_at": self._logged_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fisher, self._starts = {**state_dict["fisher"]}, {**state_dict["start"]}
        self._logged_at = state_dict["logged_at"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return {**vars(self), "_names": {}}

    @torch.no_grad()
    def penalty(self, module: pl.LightningModule) -> float:
        """Return ``rate / 2 * sum F (w - w_0)^2`` of a module's present weights; 0 before training."""
        known = dict(module.named_parameters())
        parts = [
            (fisher * (known[name] - self._starts[name]).square()).sum()
            for name, fisher in self.fisher.items()
            if name in known
        ]
        return self.rate / 2 * float(torch.stack(parts).sum()) if parts else 0.0

    def _choose(self, known: dict[str, torch.nn.Parameter]) -> list[str]:
        if self.parameters is not None:
            return match_names(known, self.parameters, owner=_OWNER, kind="parameter")
        chosen = [name for name, parameter in known.items() if parameter.requires_grad]
        if not chosen:
            raise ValueError(f"{_OWNER}: no parameter requires a gradient. Name those that train later in parameters=.")
        return chosen

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str]) -> dict[str, Tensor]:
        precision = trainer.precision_plugin
        # Not under autocast: the weights are float32, and squares of half-precision gradients vanish.
        context = nullcontext() if isinstance(precision, MixedPrecision) else precision.forward_context()
        with cast("AbstractContextManager[Any]", context):
            return diagonal_fisher(
                pl_module,
                self.data,
                self.step,
                names,
                labels=self.labels,
                to_device=lambda batch: trainer.strategy.batch_to_device(precision.convert_input(batch)),
                reduce=lambda summed: cast("Tensor", trainer.strategy.reduce(summed, reduce_op="sum")),
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
                owner=_OWNER,
            )

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._logged_at = trainer.global_step
        log_values(trainer, {f"drift/ewc/{self.name}": self.penalty(pl_module)})


def _scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return the factor of an optimizer's gradients: of a fused one, which unscales them itself, the gradient scaler's."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and unscales else 1.0

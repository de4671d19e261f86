"""Weight decay toward the weights that training began with, in place of toward zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_peft.distributed import refuse_unsupported
from lightning_peft.drift import Drift
from lightning_peft.matching import match_names
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "DecayToPretrained"
Group = dict[str, Any]


class DecayToPretrained(pl.Callback):
    """Pull every weight back to where it began, ``w <- w - lr * rate * (w - w_0)``, after each optimizer step.

    ``w_0`` is the weight before its first step (the pretrained one, if it was) and ``lr`` the learning rate of that very
    step, scaled by schedulers or by other callbacks. This is the L2-SP penalty (Li et al. 2018, arXiv:1802.01483) as decoupled
    decay (Loshchilov & Hutter 2019, arXiv:1711.05101): neither momentum nor Adam's divisor sees it, and clipping does not cut
    it. Weights that take no step, frozen ones among them, are not pulled. A pull never goes beyond ``w_0``: where a
    schedule raises ``lr * rate`` above 1, it is 1.

    **The trap:** a new head has no pretrained weights. A rate for ``"*"`` holds it at its random start; give rates to the
    backbone alone.

    Args:
        rate: How strong the pull is, for all parameters, or by glob over their names. The first glob that matches a
            parameter counts; parameters that none matches, or whose rate is 0, are left alone.

    Raises:
        ValueError: For a rate below 0 or none above it; before training, for a glob that matches no parameter, an optimizer
            without learning rates, ``lr * rate`` above 1, or a strategy other than a single device, DDP and FSDP2.

    >>> DecayToPretrained({"backbone.*": 0.1}).rates
    {'backbone.*': 0.1}
    """

    def __init__(self, rate: float | Mapping[str, float]) -> None:
        self.rates: dict[str, float] = dict(rate) if isinstance(rate, Mapping) else {"*": rate}
        for glob, found in self.rates.items():
            number = isinstance(found, int | float) and not isinstance(found, bool)
            if not number or not math.isfinite(found) or found < 0:
                raise ValueError(f"{_OWNER}: rate={found!r} of {glob!r} must be a finite number of at least 0.")
        if not any(self.rates.values()):
            raise ValueError(f"{_OWNER}: rate={rate!r} pulls nothing; give at least one rate above 0.")
        self._starts: dict[str, Drift] = {}
        self._chosen: dict[int, tuple[str, float]] = {}
        self._depth: dict[Optimizer, int] = {}
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            refuse_unsupported(trainer, _OWNER)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._choose(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:  # a resumed run pulls to the start of its first one
            self._starts = {}
        parameters = self._choose(pl_module)
        self._starts = {name: kept for name, kept in self._starts.items() if name in parameters}
        for name, kept in self._starts.items():
            kept.reference = kept.reference.to(parameters[name].dtype)
            kept.place(parameters[name])
        for optimizer in trainer.optimizers:
            self._check(optimizer)
            after = optimizer.register_step_post_hook(self._after_step)
            # First of all: another one may restore learning rates that were scaled for the step.
            cast("Any", after.hooks_dict_ref()).move_to_end(after.id, last=False)
            self._handles += [optimizer.register_step_pre_hook(self._before_step), after]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._depth = {}  # also after a step that broke and was caught

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": {name: kept.state_dict()["reference"] for name, kept in self._starts.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._starts = {name: Drift(found) for name, found in state_dict["start"].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: it can be neither copied nor sent to a process."""
        return {**vars(self), "_chosen": {}, "_depth": {}, "_handles": []}

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._chosen, self._depth = [], {}, {}

    def _choose(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        parameters = dict(pl_module.named_parameters())
        match_names(parameters, list(self.rates), owner=_OWNER, kind="parameter")
        self._chosen = {}
        for name, parameter in parameters.items():
            rate = next((rate for glob, rate in self.rates.items() if fnmatchcase(name, glob)), 0.0)
            if rate:
                self._chosen[id(parameter)] = name, rate
        return {name: parameter for name, parameter in parameters.items() if id(parameter) in self._chosen}

    def _check(self, optimizer: Optimizer) -> None:
        """Look for what cannot work, or works against the pull."""
        kind = type(optimizer).__name__
        for group in optimizer.param_groups:
            found = [self._chosen[id(p)] for p in group["params"] if id(p) in self._chosen]
            if not found:
                continue
            if "lr" not in group:
                raise ValueError(
                    f"{_OWNER}: {kind} has no learning rate 'lr' in its groups, by which the pull is scaled."
                )
            name, rate = max(found, key=lambda one: one[1])
            lr = max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
            if lr * rate > 1:
                raise ValueError(
                    f"{_OWNER}: rate={rate!r} of {name!r} with a learning rate of {lr!r} is a pull of {lr * rate:.3g} per "
                    f"step, beyond the pretrained weights. Give a rate of at most {1 / lr:.3g}."
                )
            if group.get("weight_decay"):
                rank_zero_warn(
                    f"{_OWNER}: {kind} also decays {found[0][0]!r} and {len(found) - 1} more to zero "
                    f"(weight_decay={group['weight_decay']!r}), away from the pretrained weights. Give the optimizer "
                    "weight_decay=0 for them."
                )

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1  # a step that calls super().step() comes here twice
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            name, _rate = self._chosen.get(id(parameter), ("", 0.0))
            if name and name not in self._starts and parameter.requires_grad:
                self._starts[name] = Drift(parameter.detach().clone())

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth[optimizer] = self._depth.get(optimizer, 1) - 1
        infinite = getattr(optimizer, "found_inf", None)
        if self._depth[optimizer] > 0 or (infinite is not None and bool(infinite)):
            return  # not done yet, or a fused optimizer that the gradient scaler told to do nothing
        for share, weights in self._shares(optimizer).items():
            moved, starts = [weight for weight, _ in weights], [start for _, start in weights]
            torch._foreach_lerp_(moved, starts, share)

    def _shares(self, optimizer: Optimizer) -> dict[float, list[tuple[Tensor, Tensor]]]:
        """Return the weights that have taken this step, each with its start, by the share of the way that they go back."""
        shares: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name, rate = self._chosen.get(id(parameter), ("", 0.0))
                if name in self._starts and parameter.requires_grad and parameter.grad is not None:
                    share = min(float(group["lr"]) * rate, 1.0)
                    shares.setdefault(share, []).append((parameter.detach(), self._starts[name].reference))
        return shares

"""Watch how far each block goes from where it began, and whether weight decay or the data takes it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_peft.blocks import group_by_block
from lightning_peft.distributed import refuse_unsupported
from lightning_peft.drift import Drift, decay_rate
from lightning_peft.gradient_norms import join_norms
from lightning_peft.logging import log_values, register_chart
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "WeightDrift"
_CHARTS = {
    "distance": "distance from the start",
    "norm": "norm / norm at the start",
    "decay": "distance made by weight decay",
    "gradient": "distance made by gradients",
}


class WeightDrift(pl.Callback):
    """Log each block's distance from the weights that training began with, split into decay's part and the gradient's.

    With ``w_0`` the weights before a parameter's first step (pretrained ones, if it was):
    ``drift/distance/<block>`` is ``||w - w_0||``, ``drift/norm/<block>`` is ``||w|| / ||w_0||`` (missing for ``w_0 = 0``),
    ``drift/decay/<block>`` the norm of what weight decay did, ``-sum_t lr_t decay_t w_t``, and
    ``drift/gradient/<block>`` that of the rest. The two parts are vectors that add up to the distance; their norms do not.
    Over parameters that have trained; a block of which none has is not shown. Training is bit-identical with and without it.

    The decay's part is integrated over the looks, with the exact rates of every step (:class:`~lightning_peft.drift.Drift`), and is
    given for decoupled decay (:func:`~lightning_peft.drift.decay_rate`); for other optimizers that decay, the two parts are left
    out with a warning. What moves weights besides (clamping, averaging, rounding of ``bfloat16`` weights) is in the
    gradient's part.

    The distance is what L2-SP penalises (Li et al. 2018, arXiv:1802.01483); decoupled decay is of Loshchilov & Hutter 2019,
    arXiv:1711.05101.

    **The trap:** memory and checkpoints. It keeps a copy of every parameter that trains, and another (``float32`` or wider) where
    weights decay; a resumed run needs both, so they are in its checkpoints. Frozen parameters cost nothing.

    Args:
        every_n_steps: Look at every so many optimizer steps, and after the last.
        blocks: Globs over parameter names by title, in place of the blocks that names suggest
            (:func:`~lightning_peft.blocks.group_by_block`).

    Raises:
        ValueError: For a number out of range; before training, for a glob that matches no parameter or a strategy other than a
            single device, DDP and FSDP2.
    """

    def __init__(self, every_n_steps: int = 50, *, blocks: Mapping[str, str] | None = None) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"{_OWNER}: every_n_steps={every_n_steps!r} must be a whole number of at least 1.")
        self.every_n_steps = every_n_steps
        self.blocks = None if blocks is None else dict(blocks)
        self.values: dict[str, dict[str, float]] = {}
        self._drifts: dict[str, Drift] = {}
        self._looked_at = 0
        self._names: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            refuse_unsupported(trainer, _OWNER)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        blind = {
            type(optimizer).__name__
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            if decay_rate(optimizer, group) is None
        }
        if blind:
            rank_zero_warn(
                f"{_OWNER}: weight decay of {', '.join(sorted(blind))} cannot be told from the gradient, so drift/decay and "
                "drift/gradient are left out where it decays. Take an optimizer with decoupled decay, such as torch.optim.AdamW."
            )
        grouped = group_by_block(pl_module.named_parameters(), self.blocks, owner=_OWNER)
        trained = [block for block, found in grouped.items() if any(p.requires_grad for p in found.values())]
        for kind, chart in _CHARTS.items():
            if kind not in ("decay", "gradient") or not blind:
                register_chart(trainer, "Drift", chart, [f"drift/{kind}/{block}" for block in trained])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        if trainer.global_step == 0:  # a resumed run keeps the start of its first one
            self._drifts, self.values = {}, {}
        self._looked_at = min(self._looked_at, trainer.global_step)  # it may be of an earlier fit
        self._drifts = {name: drift for name, drift in self._drifts.items() if name in parameters}
        for name, drift in self._drifts.items():
            drift.place(parameters[name])  # a fresh copy of what came with a checkpoint
        chosen = group_by_block(parameters.items(), self.blocks, owner=_OWNER)
        self._names = {id(parameter): name for found in chosen.values() for name, parameter in found.items()}
        for optimizer in trainer.optimizers:
            after = optimizer.register_step_post_hook(self._after_step)
            # First of all: another one may restore learning rates that were scaled for the step.
            cast("Any", after.hooks_dict_ref()).move_to_end(after.id, last=False)
            self._handles += [optimizer.register_step_pre_hook(self._before_step), after]

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step // self.every_n_steps > self._looked_at // self.every_n_steps:
            self._look(trainer, pl_module)
            for name, parameter in pl_module.named_parameters():
                if name in self._drifts:
                    self._drifts[name].settle(parameter)
            self._looked_at = trainer.global_step

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._looked_at:  # nothing is settled: a longer run may go on from here
            self._look(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        drifts = {name: drift.state_dict() for name, drift in self._drifts.items()}
        return {"drifts": drifts, "looked_at": self._looked_at, "values": {**self.values}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drifts = {name: Drift(**found) for name, found in state_dict["drifts"].items()}
        self._looked_at, self.values = state_dict["looked_at"], {**state_dict["values"]}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: it can be neither copied nor sent to a process."""
        return {**vars(self), "_names": {}, "_handles": []}

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._names = [], {}

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            name = self._names.get(id(parameter))
            if name and name not in self._drifts and (parameter.requires_grad or parameter.grad is not None):
                self._drifts[name] = Drift(parameter.detach().clone())

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        infinite = getattr(optimizer, "found_inf", None)
        if infinite is not None and bool(infinite):
            return  # a fused optimizer, which the gradient scaler told to do nothing
        for group in optimizer.param_groups:
            rate = decay_rate(optimizer, group)
            for parameter in group["params"]:
                drift = self._drifts.get(self._names.get(id(parameter), ""))
                if drift is not None and parameter.grad is not None:
                    drift.count(rate)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values = {}
        for block, parameters in group_by_block(pl_module.named_parameters(), self.blocks, owner=_OWNER).items():
            looks = [self._drifts[name].look(found) for name, found in parameters.items() if name in self._drifts]
            if looks:
                self.values[block] = _joined(looks)
        values = {
            f"drift/{kind}/{block}": value for block, found in self.values.items() for kind, value in found.items()
        }
        log_values(trainer, values)


def _joined(looks: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the values of a block, from the norms of its parameters; a part is left out that one of them lacks."""
    norms = {
        kind: float(join_norms(look[kind] for look in looks))
        for kind in looks[0]
        if all(kind in look for look in looks)
    }
    start, weight = norms.pop("start"), norms.pop("weight")
    return {**norms, "norm": weight / start} if start > 0 else norms

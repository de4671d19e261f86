"""Watch what enters each block: its gradients, and how far a step moves it, relative to what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_peft.blocks import group_by_block
from lightning_peft.distributed import refuse_unsupported
from lightning_peft.gradient_norms import StepFlow
from lightning_peft.heat_map import draw_heat_map
from lightning_peft.logging import log_figure, log_values, register_chart
from lightning_peft.one_lightning import refuse_pytorch_lightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed

_OWNER = "GradientFlow"
_KEPT = 1000


class GradientFlow(pl.Callback):
    """Log the gradient norm of each block and its update-to-weight ratio, and draw the norms as one heat map.

    ``flow/gradient/<block>`` is the norm of the gradient that the optimizer is given: of the whole batch (accumulated and
    averaged over ranks), unscaled, before clipping. ``flow/update/<block>`` is ``||after - before|| / ||before||`` of the same
    step, over the parameters that took it. A frozen block has no value; neither has the update of weights that are all zero.
    Step 0 is the first. Training is bit-identical with and without it.

    You et al. 2017, arXiv:1708.03888, find that the ratio of weights to gradients differs by orders of magnitude between layers,
    which is why both are shown by block.

    **The trap:** norms grow with the size of a block. Compare a block with itself, over steps or runs; blocks are comparable
    by their updates.

    Args:
        every_n_steps: Look at every so many steps of an optimizer.
        first: Number of steps that are all looked at, from the first one on.
        blocks: Globs over parameter names by title, in place of the blocks that names suggest
            (:func:`~lightning_peft.blocks.group_by_block`).

    Raises:
        ValueError: For a number out of range; before training, for a glob that matches no parameter or a strategy other than a
            single device, DDP and FSDP2.
    """

    def __init__(self, every_n_steps: int = 10, *, first: int = 50, blocks: Mapping[str, str] | None = None) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("first", first, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{_OWNER}: {name}={value!r} must be a whole number of at least {least}.")
        self.every_n_steps, self.first = every_n_steps, first
        self.blocks = None if blocks is None else dict(blocks)
        self._looks: list[dict[str, Any]] = []
        self._steps: dict[int, int] = {}
        self._order: list[str] = []
        self._titles: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []
        self._open: dict[int, StepFlow] = {}
        self._began = 0

    @property
    def norms(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and gradient norms by block, in the network's order; of a long run the later ones thinned out."""
        return self._table("gradient")

    @property
    def updates(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and update-to-weight ratios by block."""
        return self._table("update")

    def heat_map(self) -> Figure:
        """Draw the gradient norms so far: blocks from the bottom of the network up, steps from left to right."""
        return draw_heat_map(self.norms, title="Gradients that enter each block", label="gradient norm")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            refuse_unsupported(trainer, _OWNER)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        grouped = group_by_block(pl_module.named_parameters(), self.blocks, owner=_OWNER)
        self._order = list(grouped)
        self._titles = {id(parameter): block for block, found in grouped.items() for parameter in found.values()}
        trained = [block for block, found in grouped.items() if any(p.requires_grad for p in found.values())]
        for kind, chart in (("gradient", "gradient norm"), ("update", "update / weight")):
            register_chart(trainer, "Gradient flow", chart, [f"flow/{kind}/{block}" for block in trained])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:  # a resumed run goes on with what was seen before
            self._looks, self._steps = [], {}
        for number, optimizer in enumerate(trainer.optimizers):
            self._handles.append(optimizer.register_step_post_hook(partial(self._after_step, number)))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        number = trainer.optimizers.index(optimizer)
        if number in self._open:
            if not self._open[number].finished:
                return  # LBFGS asks for several gradients in a step; the first one is of the weights that it starts from
            self._close(trainer)  # the second step in one batch, of a module that steps by hand
        taken = self._steps.get(number, 0)
        if (taken < self.first or taken % self.every_n_steps == 0) and (blocks := self._with_gradient(optimizer)):
            if not self._open:
                self._began = trainer.global_step
            self._open[number] = StepFlow(blocks)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shown = trainer.is_global_zero and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        if self._looks and shown:
            log_figure(trainer, "flow/gradient", self.heat_map())

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"looks": [*self._looks], "steps": {**self._steps}, "order": [*self._order]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._looks, self._steps = [*state_dict["looks"]], {**state_dict["steps"]}
        self._order = [*state_dict["order"]]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: it can be neither copied nor sent to a process."""
        return {**vars(self), "_handles": [], "_open": {}, "_titles": {}}

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._open, self._titles = [], {}, {}

    def _with_gradient(self, optimizer: Optimizer) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None and id(parameter) in self._titles:
                found.setdefault(self._titles[id(parameter)], []).append(parameter)
        return found

    def _after_step(self, number: int, *_: Any) -> None:
        self._steps[number] = self._steps.get(number, 0) + 1
        if number in self._open:
            self._open[number].finish()

    def _close(self, trainer: pl.Trainer) -> None:
        """Keep and log what was looked at; of a block that several optimizers share, the parts together."""
        flows = list(self._open.values())
        self._open = {}
        # A step that was left out, for infinite gradients of a gradient scaler, has moved nothing: no update.
        gradients, moved, weights = (
            _joined([getattr(flow, part) for flow in flows]) for part in ("gradients", "moved", "weights")
        )
        updates = {block: distance / weights[block] for block, distance in moved.items() if weights[block] > 0}
        if gradients:
            self._keep({"step": self._began, "gradient": gradients, "update": updates})
            values = {f"flow/gradient/{block}": norm for block, norm in gradients.items()}
            log_values(
                trainer, values | {f"flow/update/{block}": ratio for block, ratio in updates.items()}, step=self._began
            )

    def _keep(self, look: dict[str, Any]) -> None:
        looks = self._looks
        looks.append(look)
        if len(looks) > self.first + _KEPT:  # a checkpoint must not grow with the length of the run
            gaps = {n: looks[n + 1]["step"] - looks[n - 1]["step"] for n in range(max(self.first, 1), len(looks) - 1)}
            del looks[min(gaps, key=gaps.__getitem__)]

    def _table(self, kind: str) -> dict[str, list[tuple[int, float]]]:
        found = {
            block: [(look["step"], look[kind][block]) for look in self._looks if block in look[kind]]
            for block in self._order
        }
        return {block: values for block, values in found.items() if values}


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    blocks = dict.fromkeys(block for part in parts for block in part)
    return {block: math.hypot(*(float(part[block]) for part in parts if block in part)) for block in blocks}

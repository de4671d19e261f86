"""Go back a part of the way: weights between the pretrained and the fine-tuned ones, chosen by what both tasks say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.callbacks.measuring import check_tasks, come_first, measure_present
from lightning_peft.distributed import refuse_unsupported
from lightning_peft.files import write_atomic
from lightning_peft.logging import log_figure, log_values
from lightning_peft.old_task import OldTask
from lightning_peft.one_lightning import refuse_pytorch_lightning
from lightning_peft.reporting import TextTable, format_value
from lightning_peft.weight_line import WeightLine, refuse_curved

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed

_OWNER = "WeightInterpolation"


def choose_alpha(
    line: Sequence[Mapping[str, Any]], new: OldTask, old: Mapping[str, OldTask], max_drop: float | None = None
) -> float:
    """Return the best point of a line: of the highest mean, or the best at the new task whose drops are inside a limit.

    Args:
        line: Points by rising ``alpha``, each with ``alpha``, ``new``, and ``old`` and ``drop`` by task.
        new: The new task.
        old: The old tasks.
        max_drop: The most that any old task may lose. Unset, the mean of the new task's value and the mean of the old ones
            counts, with a minus where lower is better.

    Returns:
        Of equals the smallest ``alpha``. The start itself loses nothing, so one is always inside the limit.
    """

    def skill(point: Mapping[str, Any]) -> float:
        value: float = new.sign * point["new"]
        if max_drop is None:
            value += sum(task.sign * point["old"][name] for name, task in old.items()) / len(old)
        return -math.inf if math.isnan(value) else value

    inside = [p for p in line if max_drop is None or all(drop <= max_drop for drop in p["drop"].values())]
    return float(max(inside, key=skill)["alpha"])


class WeightInterpolation(pl.Callback):
    """After training, measure both tasks on the line from the pretrained to the fine-tuned weights, and keep the best point.

    ``w(alpha) = (1 - alpha) * w_0 + alpha * w`` (WiSE-FT: Wortsman et al. 2022, arXiv:2109.01903), with ``w_0`` the weights
    before their first step. Of adapters the update is scaled (:class:`WeightLine`). Running statistics of batch normalisation
    are interpolated like weights, not computed anew; counters stay.

    Logged are ``drift/alpha`` (the chosen point), ``learn/interpolated``, and by old task ``retained/interpolated/<name>`` and
    ``forgetting/interpolated/<name>``; the figure ``retained/line`` shows the new task over each old one. ``line`` has all points.
    Where ``WeightAveraging`` or ``StochasticWeightAveraging`` stand in the trainer, the averaged weights are the end of the line.

    **The trap:** the point is chosen by these rows; report another split. Checkpoints that were written during training hold
    the fine-tuned weights; the chosen ones are in the module, and in ``path``.

    Args:
        new: The new task: its data, metric and step, as an :class:`~lightning_peft.old_task.OldTask`.
        old: Old tasks by name.
        alphas: Points of the line, from 0 (pretrained) to 1 (fine-tuned).
        max_drop: The most that any old task may lose; the best point at the new task inside it is kept. Unset, that of the
            highest mean (:func:`choose_alpha`), for which the metrics should have one unit.
        path: A file for ``{"state_dict", "alpha", "line"}`` of the chosen point.

    Raises:
        ValueError: For no old task, or alphas that lack an end; before training, for an adapter whose update cannot be scaled, or
            a strategy other than a single device and DDP.
    """

    moves_weights = True
    """Training ends with the weights of a point on the line."""

    def __init__(
        self,
        new: OldTask,
        old: Mapping[str, OldTask],
        *,
        alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        max_drop: float | None = None,
        path: str | Path | None = None,
    ) -> None:
        check_tasks({"new": new}, _OWNER)
        if not {0.0, 1.0} <= set(alphas) or not all(0 <= alpha <= 1 for alpha in alphas):
            raise ValueError(f"{_OWNER}: alphas={alphas!r} must lie in [0, 1], with both ends 0 and 1 among them.")
        if max_drop is not None and not max_drop >= 0:
            raise ValueError(f"{_OWNER}: max_drop={max_drop!r} must be at least 0, in the unit of the metric.")
        self.new, self.old = new, check_tasks(old, _OWNER)
        self.alphas = sorted({float(alpha) for alpha in alphas})
        self.max_drop, self.path = max_drop, None if path is None else Path(path)
        self.line: list[dict[str, Any]] = []
        self.alpha: float | None = None
        self._starts: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            refuse_unsupported(trainer, _OWNER)
            come_first(trainer, self)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
            raise ValueError(f"{_OWNER}: the parameters are sharded. Use a single device or strategy='ddp'.")
        fresh = trainer.global_step == 0
        refuse_curved(pl_module, _OWNER, begins=fresh)
        if fresh:  # a resumed run keeps the start of its first one
            self.line, self.alpha = [], None
            kept = pl_module.state_dict().keys()
            self._starts = {
                name: buffer.detach().to("cpu", copy=True)
                for name, buffer in pl_module.named_buffers()
                if name in kept and buffer.is_floating_point()
            }
        self._names = {id(parameter): name for name, parameter in pl_module.named_parameters()}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            name = self._names.get(id(parameter))
            if name and name not in self._starts and parameter.grad is not None:
                self._starts[name] = parameter.detach().to("cpu", copy=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        line = WeightLine(pl_module, self._starts)
        self.line = []
        for alpha in self.alphas:
            line.go_to(alpha)
            self.line.append(self._measured(trainer, pl_module, alpha))
        self.alpha = choose_alpha(self.line, self.new, self.old, self.max_drop)
        line.go_to(self.alpha)
        self._report(trainer)
        if self.path is not None and trainer.is_global_zero:
            kept = {"state_dict": pl_module.state_dict(), "alpha": self.alpha, "line": self.line}
            write_atomic(self.path, lambda draft: torch.save(kept, draft))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._names = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": {**self._starts}, "line": [*self.line], "alpha": self.alpha}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._starts, self.line = {**state_dict["start"]}, [*state_dict["line"]]
        self.alpha = state_dict["alpha"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return {**vars(self), "_names": {}}

    def table(self) -> TextTable:
        """Return the points of the line, the chosen one with a star."""
        names = list(self.old)
        rows = [
            [
                f"{point['alpha']:g}{' *' if point['alpha'] == self.alpha else ''}",
                format_value(float(point["new"])),
                *(format_value(float(point["old"][name])) for name in names),
                *(format_value(float(point["drop"][name])) for name in names),
            ]
            for point in self.line
        ]
        return TextTable(_OWNER, ("alpha", "new", *names, *(f"drop of {name}" for name in names)), rows)

    def draw(self) -> Figure:
        """Draw the new task over each old one, a point for each alpha, the chosen one as a star."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
        from matplotlib.figure import Figure  # noqa: PLC0415

        figure = Figure(figsize=(4.5 * len(self.old), 4), layout="constrained")
        FigureCanvasAgg(figure)
        new = [point["new"] for point in self.line]
        for panel, name in zip(figure.subplots(1, len(self.old), squeeze=False)[0], self.old, strict=True):
            old = [point["old"][name] for point in self.line]
            panel.plot(old, new, "o-", color="tab:blue")
            for point in self.line:
                place = point["old"][name], point["new"]
                panel.annotate(f"{point['alpha']:g}", place, (4, 4), textcoords="offset points", fontsize=8)
                if point["alpha"] == self.alpha:
                    panel.plot(*place, "*", color="tab:red", markersize=14)
            panel.set_xlabel(f"old task: {name}")
            panel.set_ylabel("new task")
        figure.suptitle("From pretrained (0) to fine-tuned (1); star: kept", fontsize=10)
        return figure

    def _measured(self, trainer: pl.Trainer, pl_module: pl.LightningModule, alpha: float) -> dict[str, Any]:
        tasks = {f"new task at {alpha:g}": self.new}
        tasks |= {f"old task {name} at {alpha:g}": task for name, task in self.old.items()}
        new, *others = measure_present(trainer, pl_module, tasks).values()
        old = dict(zip(self.old, others, strict=True))
        before = self.line[0]["old"] if self.line else old
        drop = {name: task.sign * (before[name] - old[name]) for name, task in self.old.items()}
        return {"alpha": alpha, "new": new, "old": old, "drop": drop}

    def _report(self, trainer: pl.Trainer) -> None:
        chosen = next(point for point in self.line if point["alpha"] == self.alpha)
        values = {"drift/alpha": chosen["alpha"], "learn/interpolated": chosen["new"]}
        values |= {f"retained/interpolated/{name}": value for name, value in chosen["old"].items()}
        values |= {f"forgetting/interpolated/{name}": value for name, value in chosen["drop"].items()}
        log_values(trainer, values)
        if trainer.is_global_zero and trainer.loggers:
            log_figure(trainer, "retained/line", self.draw())
        rank_zero_info(self.table().markdown())

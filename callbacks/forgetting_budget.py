"""A limit on what a run may forget, kept by steering replay, by stopping, or by going back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Subset
from typing_extensions import override

from lightning_peft.callbacks.forgetting_evaluation import ForgettingEvaluation
from lightning_peft.callbacks.measuring import check_tasks, come_first, measure
from lightning_peft.callbacks.replay_mixing import ReplayMixing
from lightning_peft.data.ratio_controller import RatioController
from lightning_peft.logging import log_values, register_chart
from lightning_peft.old_task import OldTask
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "ForgettingBudget"
Action = Literal["replay", "stop", "rollback", "warn"]


class ForgettingBudget(pl.Callback):
    """Keep what each old task loses inside a limit of its own, and learn as much as the limits allow.

    Every so many steps the tasks are measured on guard rows. The drop since before training, as a part of its limit, decides;
    of several tasks the one that has used up most. What happens then is said by ``action``:

    - ``"replay"`` changes the ratio of the run's :class:`ReplayMixing` (see
      :class:`~lightning_peft.data.ratio_controller.RatioController`). It begins high and comes down as the tasks allow.
    - ``"rollback"`` keeps a copy of what trains whenever all drops are inside their limits, the best by ``monitor`` or else
      the latest, and puts it back at the end. It goes together with ``"replay"``.
    - ``"stop"`` ends training once a limit is passed.
    - ``"warn"`` says so, once for each task.

    **The trap:** guard rows are looked at while training, so what they say at the end is too good. Report on other rows: a
    :class:`ForgettingEvaluation` that shares rows with the guard is refused. :meth:`OldTask.split` makes two tasks of one.

    Args:
        max_drop: The largest drop, in the metric's unit; one for all tasks, or one for each by name.
        tasks: Guard tasks by name. Safety may be one of them.
        action: What keeps the budget; several go together.
        every_n_steps: Optimizer steps between measurements.
        monitor: For ``"rollback"``: a key of ``callback_metrics`` that says how well the new task goes.
        mode: Whether a larger or a smaller value of it is better.
        controller: How the ratio is steered.

    Raises:
        ValueError: For a limit, task or action that is none; before training, for ``"replay"`` without ``ReplayMixing``, for
            guard rows that are reported too, and for ``"rollback"`` of sharded weights.

    >>> from torchmetrics.classification import MulticlassAccuracy
    >>> guard = OldTask([(0.0, 0)] * 50, MulticlassAccuracy(2), lambda module, batch: (module(batch[0]), batch[1]))
    >>> ForgettingBudget(0.05, tasks={"old": guard}, action=["replay", "rollback"]).max_drop
    {'old': 0.05}
    """

    def __init__(
        self,
        max_drop: float | Mapping[str, float] = 0.05,
        *,
        tasks: Mapping[str, OldTask],
        action: Action | Sequence[Action] = "replay",
        every_n_steps: int = 20,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        controller: RatioController | None = None,
    ) -> None:
        self.tasks = check_tasks(tasks, _OWNER)
        self.max_drop = _limits(max_drop, self.tasks)
        self.action = [action] if isinstance(action, str) else list(action)
        if not self.action or set(self.action) - set(get_args(Action)):
            raise ValueError(f"{_OWNER}: action={action!r} must be among {', '.join(map(repr, get_args(Action)))}.")
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"{_OWNER}: every_n_steps={every_n_steps!r} must be a whole number of at least 1.")
        if mode not in {"max", "min"}:
            raise ValueError(f"{_OWNER}: mode={mode!r} must be 'max' or 'min'.")
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.controller = RatioController() if controller is None else controller
        self.before: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._measured_at = -1
        self._warned: list[str] = []
        self._replay: ReplayMixing | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return self._generate_state_key(tasks=sorted(self.tasks))

    @property
    def moves_weights(self) -> bool:
        """Whether training may end with other weights than those of its last step."""
        return "rollback" in self.action

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage != "fit":
            return
        callbacks = cast("Any", trainer).callbacks
        for other in callbacks:
            if isinstance(other, ForgettingEvaluation):
                _refuse_shared_rows(self.tasks, other.tasks)
        if "replay" in self.action:
            self._replay = next((one for one in callbacks if isinstance(one, ReplayMixing)), None)
            if self._replay is None:
                raise ValueError(
                    f"{_OWNER}: action='replay' has nothing to steer. Add ReplayMixing(memory) to the callbacks."
                )
            self._replay.steer(self.controller.first)
            register_chart(trainer, "Budget", "share of old rows", ["budget/ratio"])
        come_first(trainer, self)
        register_chart(trainer, "Budget", "part of the budget that is used", [f"budget/{name}" for name in self.tasks])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "rollback" in self.action and any(isinstance(p, DTensor) for p in pl_module.parameters()):
            raise ValueError(f"{_OWNER}: action='rollback' keeps whole weights, and these are sharded. Leave it out.")
        if self._measured_at > trainer.global_step:  # in an earlier fit, whose weights are not this one's
            self._measured_at, self.best, self._warned = trainer.global_step, None, []
        if not self.before or trainer.global_step == 0:  # a resumed run keeps the baseline of its first start
            self.before = measure(trainer, pl_module, self.tasks)
            self.history, self.best, self._warned = [], None, []
            self.controller.load_state_dict({"ratio": self.controller.first, "excess": None})
            self._measured_at = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A batch of several optimizers takes several steps, and may pass by a multiple.
        if trainer.global_step // self.every_n_steps > self._measured_at // self.every_n_steps:
            self._check(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here the monitored value is that of the weights as they are; at the next measurement they would be others.
        if self._keeps_after_validation(trainer) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self._measured_at == trainer.global_step and self.history:
                used = self.history[-1]["used"]
            else:
                used = self._used(measure(trainer, pl_module, self.tasks))
            if max(used.values()) <= 1:
                self._keep(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._measured_at:
            self._check(trainer, pl_module)
        if "rollback" in self.action:
            self._go_back(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "before": dict(self.before), "history": list(self.history), "best": self.best, "warned": list(self._warned),
            "measured_at": self._measured_at, "controller": self.controller.state_dict(),
        }  # fmt: skip

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.history = dict(state_dict["before"]), list(state_dict["history"])
        self.best, self._warned = state_dict["best"], list(state_dict["warned"])
        self._measured_at = state_dict["measured_at"]
        self.controller.load_state_dict(state_dict["controller"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the other callback: a copy looks for it in its own run."""
        return {**vars(self), "_replay": None}

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        used = self._used(measure(trainer, pl_module, self.tasks))
        self._measured_at = trainer.global_step
        entry: dict[str, Any] = {"step": trainer.global_step, "used": used}
        logged = {f"budget/{name}": part for name, part in used.items()}
        if self._replay is not None:
            entry["ratio"] = logged["budget/ratio"] = self.controller.update(max(used.values()))
            self._replay.change_ratio(self.controller.ratio)
        self.history.append(entry)
        log_values(trainer, logged)
        over = [name for name, part in used.items() if part > 1]
        if "rollback" in self.action and not over and not self._keeps_after_validation(trainer):
            self._keep(trainer, pl_module)
        if over:
            self._passed(trainer, over, used)

    def _used(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the part of its limit that each task has used up."""
        return {
            name: task.sign * (self.before[name] - values[name]) / self.max_drop[name]
            for name, task in self.tasks.items()
        }

    def _keeps_after_validation(self, trainer: pl.Trainer) -> bool:
        return "rollback" in self.action and self.monitor is not None and trainer.enable_validation

    def _passed(self, trainer: pl.Trainer, over: list[str], used: dict[str, float]) -> None:
        name = max(over, key=used.__getitem__)
        told = (
            f"{_OWNER}: {name!r} has lost {used[name] * self.max_drop[name]:.4g} of at most {self.max_drop[name]:.4g}"
        )
        if "stop" in self.action:
            rank_zero_info(f"{told}; training stops at step {trainer.global_step}.")
            trainer.should_stop = True
        if "warn" in self.action and name not in self._warned:
            self._warned.append(name)
            rank_zero_warn(f"{told} at step {trainer.global_step}.")

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = None
        if self.monitor is not None:
            found = trainer.callback_metrics.get(self.monitor)
            if found is None:
                return  # the first validation is still to come
            value = float(found)
            sign = 1 if self.mode == "max" else -1
            if self.best is not None and sign * value <= sign * self.best["value"]:
                return
        kept = {name: tensor.detach().cpu().clone() for name, tensor in _what_changes(pl_module).items()}
        self.best = {"step": trainer.global_step, "value": value, "weights": kept}

    def _go_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.best is None:
            rank_zero_warn(
                f"{_OWNER}: at no measurement were all drops inside their limits, so nothing is put back. Measure more often "
                "(every_n_steps), or let action include 'replay'."
            )
            return
        if self.best["step"] == trainer.global_step:
            return
        own = _what_changes(pl_module)
        with torch.no_grad():
            for name, kept in self.best["weights"].items():
                own[name].copy_(kept)
        rank_zero_info(f"{_OWNER}: the weights are those of step {self.best['step']} again, inside every limit.")


def _limits(max_drop: float | Mapping[str, float], tasks: Mapping[str, OldTask]) -> dict[str, float]:
    limits = dict(max_drop) if isinstance(max_drop, Mapping) else dict.fromkeys(tasks, max_drop)
    if set(limits) != set(tasks):
        raise ValueError(f"{_OWNER}: max_drop={max_drop!r} must name each of the tasks {sorted(tasks)}, and no other.")
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
            raise ValueError(f"{_OWNER}: max_drop={limit!r} of {name!r} must be above 0, in the unit of its metric.")
    return limits


def _what_changes(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """Return the parameters that have trained or may train, and all buffers that a checkpoint holds."""
    saved = pl_module.state_dict(keep_vars=True)
    return {
        name: value for name, value in saved.items() if not isinstance(value, torch.nn.Parameter) or value.requires_grad
    }


def _refuse_shared_rows(guards: Mapping[str, OldTask], reports: Mapping[str, OldTask]) -> None:
    for guard, guarding in guards.items():
        for report, reporting in reports.items():
            (one, of_one), (other, of_other) = _rows(guarding), _rows(reporting)
            if one is other and (of_one is None or of_other is None or of_one & of_other):
                raise ValueError(
                    f"{_OWNER}: guard task {guard!r} and reported task {report!r} share rows, so the report would flatter. Split "
                    "the task: guard, report = task.split()."
                )


def _rows(task: OldTask) -> tuple[Any, set[int] | None]:
    """Return the dataset that rows are taken from, and which; None for all."""
    data = task.loader.dataset
    if isinstance(data, Subset):
        return data.dataset, set(data.indices)
    return data, None

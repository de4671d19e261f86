"""Measure old tasks while a new one is learned, without touching the training."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchmetrics import Metric
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_peft.data.mix_loader import Rows, carried_options, row_count
from lightning_peft.distributed import rank, world_size
from lightning_peft.logging import log_values, register_chart
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "ForgettingEvaluation"


@dataclass(frozen=True)
class OldTask:
    """Something the network could do before: data, a metric, and how the module turns a batch into its arguments.

    Args:
        data: Rows of the task, as a loader or (in batches of 32, default collate) a map-style dataset.
        metric: A torchmetrics metric whose ``compute`` gives one number.
        step: ``step(module, batch)`` returns the arguments of ``metric.update``, as a tuple or a single one. The batch
            is on the module's device.
        higher_is_better: Where the metric does not say it itself.

    Raises:
        ValueError: If the data has no length or is empty, the metric is none or its direction is unknown, or the step
            cannot be called.
    """

    data: Rows
    metric: Metric
    step: Callable[[Any, Any], Any]
    higher_is_better: bool | None = None

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        row_count(self.loader.dataset, "OldTask: data")
        if not callable(self.step) or not _takes_two(self.step):
            raise ValueError(f"OldTask: step={self.step!r} must be a function of (module, batch).")
        if not isinstance(self.metric, Metric):
            raise ValueError(f"OldTask: metric={self.metric!r} must be a torchmetrics Metric.")
        if self.higher_is_better is None and self.metric.higher_is_better is None:
            raise ValueError(
                f"OldTask: {type(self.metric).__name__} does not say whether higher is better. Pass higher_is_better=."
            )

    @property
    def loader(self) -> DataLoader[Any]:
        """The data as a loader; of a given one only the dataset and the options are used."""
        return self.data if isinstance(self.data, DataLoader) else DataLoader(self.data, batch_size=32)

    @property
    def sign(self) -> int:
        """1 where a lower value is a loss of skill, -1 where a higher one is."""
        better = self.metric.higher_is_better if self.higher_is_better is None else self.higher_is_better
        return 1 if better else -1


def _takes_two(step: Callable[..., Any]) -> bool:
    try:
        inspect.signature(step).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # something compiled, which has no signature to look at
        pass
    return True


@torch.no_grad()
def evaluate(
    module: nn.Module,
    task: OldTask,
    *,
    name: str = "task",
    to_device: Callable[[Any], Any] = lambda batch: batch,
    progress: bool = True,
) -> float:
    """Measure a task on a module, over all processes if there are several, and leave no trace of it.

    Every process takes every ``world``-th row, without padding; random numbers, gradients and the train or eval mode
    of every single module are as before.

    Args:
        module: What ``task.step`` gets.
        task: What to measure.
        name: The task's name, for the progress bar and errors.
        to_device: Moves a batch to the module's device.
        progress: Show a bar if it takes longer than two seconds.

    Raises:
        ValueError: If there are fewer rows than processes, or the step gives nothing that the metric takes.
    """
    loader = task.loader
    rows, world = row_count(loader.dataset, f"{_OWNER}: {name}"), world_size()
    if rows < world:
        raise ValueError(f"{_OWNER}: {name} has {rows} rows for {world} processes; it needs one for each.")
    shard = Subset(loader.dataset, range(rank(), rows, world))
    size = loader.batch_size or 32
    batches = DataLoader(shard, size, generator=torch.Generator(), **carried_options(loader))
    rounds = math.ceil(math.ceil(rows / world) / size)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    metric = copy.deepcopy(task.metric).to(device)
    metric.reset()
    with _untouched(module, device):
        bar = tqdm(_fill(batches, rounds), total=rounds, desc=name, delay=2, leave=False, disable=not progress)
        for batch, counts in bar:
            arguments = _step(task, module, to_device(batch), name)
            if counts:
                _update(metric, arguments, name)
        value = torch.as_tensor(metric.compute())
    if value.numel() != 1:
        raise ValueError(
            f"{_OWNER}: the {type(metric).__name__} of {name!r} gives {value.numel()} values; it must give one number "
            "(for many metrics: average='macro')."
        )
    return float(value)


def _fill(batches: DataLoader[Any], rounds: int) -> Iterator[tuple[Any, bool]]:
    """Yield as many batches on every process: sharded modules communicate in every forward."""
    number, batch = 0, None
    for number, batch in enumerate(batches, start=1):  # noqa: B007 - read after the loop
        yield batch, True
    for _ in range(number, rounds):
        yield batch, False


def _step(task: OldTask, module: nn.Module, batch: Any, name: str) -> tuple[Any, ...]:
    arguments = task.step(module, batch)
    if arguments is None:
        raise ValueError(
            f"{_OWNER}: the step of {name!r} returned None; it must return the arguments of "
            f"{type(task.metric).__name__}.update."
        )
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _update(metric: Metric, arguments: tuple[Any, ...], name: str) -> None:
    try:
        metric.update(*arguments)
    except Exception as error:
        raise ValueError(
            f"{_OWNER}: the step of {name!r} returned {len(arguments)} arguments that {type(metric).__name__}.update "
            f"does not take ({error}). Return a tuple of its arguments, in its order and shapes."
        ) from error


@contextmanager
def _untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with isolate_rng(include_cuda=device.type == "cuda"):
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


class ForgettingEvaluation(pl.Callback):
    """Log how much of each old task is left, and how much is lost.

    ``retained/<name>`` is the task's value; ``forgetting/<name>`` is the drop since before training, ``before - after``
    (``after - before`` where lower is better), never clipped: below zero the task has improved. Measured before the
    first step, every so many epochs or steps, and after the last. Training is bit-identical with and without it. Where a
    ``WeightAveraging`` callback averages the weights, the averaged ones are measured, as Lightning does in validation:
    they are what remains.

    Args:
        tasks: Old tasks by name.
        every_n_epochs: Measure at the end of every so many epochs.
        every_n_steps: Measure after every so many optimizer steps.

    Raises:
        ValueError: For no task, or for both intervals; before training, for a task that cannot be measured.
    """

    def __init__(
        self, tasks: Mapping[str, OldTask], *, every_n_epochs: int | None = None, every_n_steps: int | None = None
    ) -> None:
        if not tasks:
            raise ValueError(f"{_OWNER}: tasks={tasks!r} is empty; give at least one OldTask by name.")
        for name, task in tasks.items():
            if not isinstance(task, OldTask):
                raise ValueError(
                    f"{_OWNER}: {name!r} is a {type(task).__name__}; wrap it as OldTask(data, metric, step)."
                )
        if every_n_epochs is not None and every_n_steps is not None:
            raise ValueError(f"{_OWNER}: every_n_epochs and every_n_steps exclude each other; give one.")
        for unit, every in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if every is not None and (not isinstance(every, int) or every < 1):
                raise ValueError(f"{_OWNER}: {unit}={every!r} must be a whole number of at least 1.")
        self.tasks = dict(tasks)
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._measured_at = -1

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; two callbacks with different tasks may stand side by side."""
        return self._generate_state_key(tasks=sorted(self.tasks))

    @property
    def forgetting(self) -> dict[str, float]:
        """The drop of each task since before training, in the metric's own unit."""
        return {name: task.sign * (self.before[name] - self.after[name]) for name, task in self.tasks.items()}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            _come_first(trainer, self)
            for family in ("forgetting", "retained"):
                register_chart(trainer, "Old tasks", family, [f"{family}/{name}" for name in self.tasks])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.before or trainer.global_step == 0:  # a resumed run keeps the baseline of its first start
            self.before = {}
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps
        if every and trainer.global_step % every == 0 and trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self.before), "after": dict(self.after), "measured_at": self._measured_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = dict(state_dict["before"]), dict(state_dict["after"])
        self._measured_at = state_dict["measured_at"]

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with _averaged(trainer, pl_module), _forward_context(trainer):
            self.after = {
                name: evaluate(
                    pl_module,
                    task,
                    name=name,
                    to_device=lambda batch: trainer.strategy.batch_to_device(
                        trainer.precision_plugin.convert_input(batch)
                    ),
                    progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
                )
                for name, task in self.tasks.items()
            }
        self.before = self.before or dict(self.after)
        self._measured_at = trainer.global_step
        values = {f"retained/{name}": value for name, value in self.after.items()}
        values |= {f"forgetting/{name}": drop for name, drop in self.forgetting.items()}
        log_values(trainer, values)


def _forward_context(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Return the precision context of the trainer's own forwards (autocast and the like)."""
    plugin = trainer.precision_plugin
    return cast("AbstractContextManager[Any]", plugin.forward_context()) if plugin is not None else nullcontext()


def _come_first(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Put a callback before those that look at its values, such as EarlyStopping, and behind those that move weights."""
    found = cast("Any", trainer)
    movers = [other for other in found.callbacks if isinstance(other, WeightAveraging)]
    others = [other for other in found.callbacks if other is not callback and other not in movers]
    found.callbacks = [*movers, callback, *others]


@contextmanager
def _averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Put averaged weights into the module for a while, where a callback has begun to average them."""
    begun = [
        callback
        for callback in cast("Any", trainer).callbacks
        if isinstance(callback, WeightAveraging) and cast("Any", callback)._average_model.n_averaged > 0
    ]
    for callback in begun:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in begun:
            callback._swap_models(pl_module)

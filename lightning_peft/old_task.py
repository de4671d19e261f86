"""Something the network could do before, and how well it does it now.

Measuring leaves no trace: generators, gradients, modes and statistics are as before.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchmetrics import Metric
from tqdm.auto import tqdm

from lightning_peft.data.mix_loader import Rows, carried_options, row_count
from lightning_peft.distributed import rank, world_size
from lightning_peft.eval_mode import eval_mode


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

    def split(self, share: float = 0.5, *, seed: int = 0) -> tuple[OldTask, OldTask]:
        """Return two tasks of different rows: one to guard while training, one to report.

        Args:
            share: The part of the rows that the first one gets.
            seed: Seed of the division.

        Raises:
            ValueError: If one of them would have no row.
        """
        rows = len(self.loader.dataset)  # type: ignore[arg-type]
        first = round(share * rows)
        if not 0 < first < rows:
            raise ValueError(f"OldTask: share={share!r} of {rows} rows leaves one part empty; both need rows.")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
        parts = [Subset(self.loader.dataset, sorted(part)) for part in (order[:first], order[first:])]
        options = {**carried_options(self.loader), "batch_size": self.loader.batch_size or 32}
        one, other = (replace(self, data=DataLoader(part, **options)) for part in parts)
        return one, other


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
    rows, world = row_count(loader.dataset, f"OldTask: {name}"), world_size()
    if rows < world:
        raise ValueError(f"OldTask: {name} has {rows} rows for {world} processes; it needs one for each.")
    shard = Subset(loader.dataset, range(rank(), rows, world))
    size = loader.batch_size or 32
    batches = DataLoader(shard, size, generator=torch.Generator(), **carried_options(loader))
    rounds = math.ceil(math.ceil(rows / world) / size)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    metric = copy.deepcopy(task.metric).to(device)
    metric.reset()
    with untouched(module, device):
        bar = tqdm(_fill(batches, rounds), total=rounds, desc=name, delay=2, leave=False, disable=not progress)
        for batch, counts in bar:
            arguments = _step(task, module, to_device(batch), name)
            if counts:
                _update(metric, arguments, name)
        value = torch.as_tensor(metric.compute())
    if value.numel() != 1:
        raise ValueError(
            f"OldTask: the {type(metric).__name__} of {name!r} gives {value.numel()} values; it must give one number "
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
            f"OldTask: the step of {name!r} returned None; it must return the arguments of "
            f"{type(task.metric).__name__}.update."
        )
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _update(metric: Metric, arguments: tuple[Any, ...], name: str) -> None:
    try:
        metric.update(*arguments)
    except Exception as error:
        raise ValueError(
            f"OldTask: the step of {name!r} returned {len(arguments)} arguments that {type(metric).__name__}.update "
            f"does not take ({error}). Return a tuple of its arguments, in its order and shapes."
        ) from error


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the module in eval mode for a while; modes and generators are as before afterwards."""
    with eval_mode(module), isolate_rng(include_cuda=device.type == "cuda"):
        yield

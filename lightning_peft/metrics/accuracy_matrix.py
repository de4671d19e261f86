"""What is measured along a sequence of tasks: values after each task as a matrix, values inside tasks as curves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # slow to import, seldom needed
    from matplotlib.figure import Figure, SubFigure

_COLUMNS = 5  # of a measurement on a curve: during_task, on_task, step, sum of weighted values, sum of weights


class TaskRecord(Metric):
    """What the metrics over a sequence of tasks share: the number of tasks, and states that go into checkpoints."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, num_tasks: int, **options: Any) -> None:
        super().__init__(**options)
        if not _is_whole(num_tasks, 1):
            raise ValueError(f"{self._owner}: num_tasks={num_tasks!r} must be a whole number of at least 1.")
        self.num_tasks = num_tasks

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @override
    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        # torchmetrics would compute from this update alone, after it has put the others aside.
        raise ValueError(f"{self._owner}: a single update has no value. Call update(), and compute() after a task.")

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or some that ``compute`` returned before, as torchmetrics does."""
        return self._plot(val, ax)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torchmetrics would keep the old result, warn that nothing was measured, take any shape and share the tensors.
        found = {name: state_dict[prefix + name] for name in self._defaults if prefix + name in state_dict}
        for name, value in found.items():
            fresh, whole = self._defaults[name], isinstance(value, Tensor)
            if isinstance(fresh, Tensor) and value.shape != fresh.shape:
                raise ValueError(
                    f"{self._owner}: the loaded {name!r} are of {value.shape[-1]} tasks, not num_tasks={self.num_tasks}. Load "
                    "them into a metric of as many tasks."
                )
            own = [row.to(self.device) for row in ([value] if whole else value)]
            state_dict[prefix + name] = own[0].to(fresh.dtype) if isinstance(fresh, Tensor) else own
        super()._load_from_state_dict(state_dict, prefix, *args)
        if found:
            self._computed, self._update_count = None, max(self._update_count, 1)

    def _check_task(self, name: str, value: int, lowest: int) -> None:
        if not _is_whole(value, lowest) or value >= self.num_tasks:
            before = " (-1: before the first one)" if lowest < 0 else ""
            raise ValueError(
                f"{self._owner}: {name}={value!r} must be a whole number from {lowest}{before} to {self.num_tasks - 1}, "
                f"as num_tasks={self.num_tasks}."
            )

    def _summed(self, value: float | Tensor, weight: float | Tensor) -> Tensor:
        """Return the sum of weighted values and that of the weights."""
        values, weights = (torch.as_tensor(it, dtype=torch.float64, device=self.device) for it in (value, weight))
        fits = weights.ndim == 0 or weights.shape == values.shape
        if not fits or not bool(values.isfinite().all() and (weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(
                f"{self._owner}: value={value!r} with weight={weight!r} must be finite, with one weight for all or one for each, "
                "at least 0. Leave out what was not measured."
            )
        return torch.stack([(values * weights).sum(), weights.expand_as(values).sum()])


class MatrixRecord(TaskRecord):
    """Collect ``R[i, j]``: the same updates and states for all its functions, so that a ``MetricCollection`` keeps them once."""

    scores: Tensor
    weights: Tensor

    def __init__(self, num_tasks: int, **options: Any) -> None:
        super().__init__(num_tasks, **options)
        zeros = torch.zeros(num_tasks + 1, num_tasks, dtype=torch.float64)  # before the first task, after each task
        self.add_state("scores", default=zeros, dist_reduce_fx="sum", persistent=True)
        self.add_state("weights", default=zeros.clone(), dist_reduce_fx="sum", persistent=True)

    @override
    def update(self, after_task: int, on_task: int, value: float | Tensor, *, weight: float | Tensor = 1.0) -> None:
        """Add measurements to a cell, which is the weighted mean of all that it was given, on all ranks.

        Rows that ranks or batches share out add up to those of one process: pass hits, ``logits.argmax(-1) == labels``, or
        a mean with the number of rows that it is of as weight.

        Args:
            after_task: The task that was trained last, counted from 0; -1 before the first one.
            on_task: The task that was tested, counted from 0.
            value: A hit or a score per row, of any shape, or one number.
            weight: Of each value, or one for all.

        Raises:
            ValueError: For a task out of range, a value that is not finite, a bad weight.
        """
        self._check_task("after_task", after_task, -1)
        self._check_task("on_task", on_task, 0)
        score, total = self._summed(value, weight).to(self.scores.dtype)
        where = torch.tensor(after_task + 1, device=self.device), torch.tensor(on_task, device=self.device)
        # Out of place: states made under inference_mode cannot be changed in place outside of it.
        self.scores = self.scores.index_put(where, score, accumulate=True)
        self.weights = self.weights.index_put(where, total, accumulate=True)

    @property
    def matrix(self) -> Tensor:
        """The matrix of this process, ``(tasks + 1, tasks)``; inside ``compute`` that of all."""
        return self.scores / self.weights  # 0 / 0, where nothing was measured, is nan


class AccuracyMatrix(MatrixRecord):
    """The accuracy on each task before the first task and after each task: ``compute`` returns ``(tasks + 1, tasks)``.

    Row 0 is ``R[-1]``, before the first task; row ``i + 1`` is ``R[i]``, after task ``i`` (both counted from 0), so the last row is
    the final one. What was not measured is ``nan``. Lopez-Paz & Ranzato 2017, arXiv:1706.08840, section 2.

    **The trap:** under several processes ``state_dict`` holds this process's share; the whole is in it between ``sync()`` and
    ``unsync()``. Load a whole one into one process, and let the others begin empty.

    Args:
        num_tasks: Length of the sequence.
        names: Of the tasks, for the picture.
        options: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: For a number of tasks below 1, or names that are not as many.

    >>> metric = AccuracyMatrix(2)
    >>> metric.update(after_task=0, on_task=0, value=torch.tensor([True, True, True, False]))
    >>> metric.update(after_task=1, on_task=0, value=0.5, weight=4)
    >>> metric.compute()
    tensor([[   nan,    nan],
            [0.7500,    nan],
            [0.5000,    nan]], dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, num_tasks: int, *, names: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(num_tasks, **options)
        self.names = _task_names(names, num_tasks, self._owner)

    @override
    def compute(self) -> Tensor:
        return self.matrix

    @override
    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Draw the matrix, or one that ``compute`` returned before: :func:`draw_accuracy_matrix`."""
        return draw_accuracy_matrix(self.compute() if val is None else val, names=self.names, ax=ax)


class CurveRecord(TaskRecord):
    """Collect values on tasks at steps inside of tasks, for metrics of what happens between two rows of the matrix."""

    measurements: list[Tensor]

    def __init__(self, num_tasks: int, **options: Any) -> None:
        super().__init__(num_tasks, **options)
        self.add_state("measurements", default=[], dist_reduce_fx="cat", persistent=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the measurements, for torchmetrics also on a rank that has none."""
        return torch.float64

    @override
    def compute(self) -> Tensor:
        values = [self._formula(curve) for curve in self._curves()]
        return torch.stack(values).mean() if values else torch.tensor(torch.nan, dtype=self.dtype, device=self.device)

    @abstractmethod
    def _formula(self, curve: Tensor) -> Tensor:
        """Return the value of a curve, ``(looks,)``: first how well the task was learned, then it during later tasks."""

    @override
    def update(
        self, during_task: int, on_task: int, value: float | Tensor, *, step: int, weight: float | Tensor = 1.0
    ) -> None:
        """Add measurements at a step; those of one step are joined by their weighted mean, on all ranks.

        Args:
            during_task: The task in training, counted from 0.
            on_task: The task that was tested, counted from 0.
            value: A hit or a score per row, of any shape, or one number.
            step: The optimizer step, counted over the whole run. The last look while ``on_task`` itself trained is its ``R[j, j]``.
            weight: Of each value, or one for all.

        Raises:
            ValueError: For a task or step out of range, a value that is not finite, a bad weight.
        """
        self._check_task("during_task", during_task, 0)
        self._check_task("on_task", on_task, 0)
        if not _is_whole(step, 0):
            raise ValueError(f"{self._owner}: step={step!r} must be a whole number of at least 0.")
        where = torch.tensor([during_task, on_task, step], dtype=torch.float64, device=self.device)
        self.measurements.append(torch.cat([where, self._summed(value, weight)]))

    def _curves(self) -> list[Tensor]:
        points: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
        rows = dim_zero_cat(self.measurements).reshape(-1, _COLUMNS).tolist() if len(self.measurements) else []
        for during, on, step, score, weight in rows:
            if weight:
                points.setdefault((int(on), int(step), int(during)), []).append((score, weight))
        means = {point: sum(s for s, _ in found) / sum(w for _, w in found) for point, found in points.items()}
        curves = []
        for task in range(self.num_tasks - 1):
            looks = [[means[at] for at in sorted(means) if at[::2] == (task, row)] for row in range(self.num_tasks)]
            for row in range(task, self.num_tasks):
                if not looks[row]:
                    raise ValueError(f"{self._owner}: needs R[{row}, {task}], a look at task {task} during task {row}.")
            curves.append([looks[task][-1], *chain(*looks[task + 1 :])])
        return [torch.tensor(curve, dtype=self.dtype, device=self.device) for curve in curves]


def rows_after(matrix: Tensor, owner: str) -> Tensor:
    """Return ``R``, ``(tasks, tasks)``, of a matrix with or without the row before the first task; others are refused."""
    rows, tasks = matrix.shape if matrix.ndim == 2 else (0, 0)
    if not tasks or rows - tasks not in (0, 1) or not matrix.is_floating_point():
        raise ValueError(
            f"{owner}: a matrix of shape {tuple(matrix.shape)} and {matrix.dtype} must be (tasks, tasks), or (tasks + 1, tasks) "
            "with the row before the first task, of a floating point type."
        )
    return matrix[rows - tasks :]


def draw_accuracy_matrix(
    matrix: Tensor, *, names: Sequence[str] | None = None, ax: Axes | None = None
) -> tuple[Figure | SubFigure, Axes]:
    """Draw a row per look and a column per task, with the values; what was not measured is blank.

    Colours span 0 to 1, or more where values do. A row before the first task without measurements is left out.

    Args:
        matrix: ``(tasks + 1, tasks)`` or ``(tasks, tasks)``.
        names: Of the tasks.
        ax: Where to draw; unset, on a new figure that no window shows.

    Raises:
        ValueError: For another shape, or names that are not as many as tasks.

    >>> figure, panel = draw_accuracy_matrix(torch.tensor([[0.9, float("nan")], [0.7, 0.8]]), names=["upright", "rotated"])
    >>> [text.get_text() for text in panel.texts]
    ['0.90', '0.70', '0.80']
    """
    after = rows_after(matrix, "draw_accuracy_matrix")
    labels = _task_names(names, len(after), "draw_accuracy_matrix")
    has_before = len(matrix) > len(after) and not bool(matrix[0].isnan().all())
    cells = (matrix if has_before else after).detach().double().cpu().numpy()
    panel = _new_panel(*cells.shape) if ax is None else ax
    shown = [0.0, 1.0, *cells[np.isfinite(cells)]]
    low, high = min(shown), max(shown)
    panel.imshow(np.ma.masked_invalid(cells), cmap="viridis", vmin=low, vmax=high)
    for row, column in np.argwhere(np.isfinite(cells)):
        value = cells[row, column]
        colour = "black" if value - low > 0.6 * (high - low) else "white"
        panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    rows = ["before"] * has_before + [f"after {label}" for label in labels]
    panel.set_yticks(range(len(rows)), rows, fontsize=9)
    panel.set_xticks(range(len(labels)), labels, fontsize=9, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_xlabel("tested on")
    return panel.figure, panel


def _new_panel(rows: int, columns: int) -> Axes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(2.2 + 0.6 * columns, 1.6 + 0.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def _task_names(names: Sequence[str] | None, num_tasks: int, owner: str) -> list[str]:
    found = [f"task {task}" for task in range(num_tasks)] if names is None else list(names)
    if len(found) != num_tasks:
        raise ValueError(f"{owner}: names={names!r} are {len(found)} for {num_tasks} tasks. Pass one for each.")
    return found


def _is_whole(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest

"""What a sequence of tasks did to each of them: learned, kept, forgotten, helped.

``R[i, j]`` is the accuracy on task ``j`` after training on task ``i``, both counted from 0, and ``T`` their number. Nothing is
clipped, and a mean over no task (``T = 1``) is ``nan``. Metrics take the updates of ``AccuracyMatrix``; ``of`` takes a matrix.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.metrics.accuracy_matrix import CurveRecord, MatrixRecord, rows_after

_DEFINITIONS = ("chaudhry", "avalanche", "mammoth")


class MatrixMetric(MatrixRecord):
    """What the metrics of one number share: they collect the matrix, and ``of`` is their formula.

    Args:
        num_tasks: Length of the sequence.
        so_far: Judge the tasks up to the last one after which anything was measured; unset, all of them.
        options: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: For a number below 1; by ``compute`` and ``of``, for an entry that is needed and missing.
    """

    higher_is_better = True

    def __init__(self, num_tasks: int, *, so_far: bool = False, **options: Any) -> None:
        super().__init__(num_tasks, **options)
        self.so_far = so_far

    @override
    def compute(self) -> Tensor:
        matrix = self.matrix
        if self.so_far and not bool(matrix[1:].isnan().all()):
            trained = int((~matrix[1:].isnan()).any(dim=1).nonzero().max()) + 1  # to the last row with any measurement
            matrix = matrix[: trained + 1, :trained]
        return self.of(matrix)

    def of(self, matrix: Tensor) -> Tensor:
        """Return the metric of a matrix, whatever was collected.

        Args:
            matrix: ``(tasks + 1, tasks)``, as ``AccuracyMatrix`` returns it, or without its first row ``(tasks, tasks)``; after the
                first ``k`` tasks, ``matrix[: k + 1, :k]`` of the former.
        """
        after = rows_after(matrix, self._owner)
        if len(after) > self.num_tasks:
            raise ValueError(f"{self._owner}: a matrix of {len(after)} tasks is more than num_tasks={self.num_tasks}.")
        return self._formula(after)

    @abstractmethod
    def _formula(self, after: Tensor) -> Tensor:
        """Return the metric of ``R``, ``(tasks, tasks)``."""

    def _cells(self, after: Tensor, cells: Iterable[tuple[int, int]]) -> Tensor:
        """Return entries of ``R`` that the formula needs."""
        pairs = list(cells)
        for row, task in pairs:
            if bool(after[row, task].isnan()):
                raise ValueError(
                    f"{self._owner}: needs R[{row}, {task}], the value on task {task} after training on task {row}, which was not "
                    f"measured. Update with after_task={row}, on_task={task}."
                )
        return torch.stack([after[pair] for pair in pairs]) if pairs else after.new_empty(0)

    def _learned(self, after: Tensor, tasks: Iterable[int]) -> Tensor:
        return self._cells(after, ((task, task) for task in tasks))

    def _final(self, after: Tensor, tasks: Iterable[int]) -> Tensor:
        return self._cells(after, ((len(after) - 1, task) for task in tasks))


class AverageAccuracy(MatrixMetric):
    """ACC, the mean of the last row: ``mean_j R[T-1, j]``. Lopez-Paz & Ranzato 2017, arXiv:1706.08840.

    >>> AverageAccuracy(2).of(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    tensor(0.7500)
    """

    @override
    def _formula(self, after: Tensor) -> Tensor:
        return self._final(after, range(len(after))).mean()


class AverageIncrementalAccuracy(MatrixMetric):
    """AIA, the mean over the run of the accuracy on the tasks so far: ``mean_i mean_{j<=i} R[i, j]``.

    Rebuffi et al. 2017, arXiv:1611.07725.

    >>> AverageIncrementalAccuracy(2).of(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    tensor(0.8250)
    """

    @override
    def _formula(self, after: Tensor) -> Tensor:
        rows = [self._cells(after, ((row, task) for task in range(row + 1))).mean() for row in range(len(after))]
        return torch.stack(rows).mean()


class LearningAccuracy(MatrixMetric):
    """LA, the plasticity: accuracy on tasks just trained, ``mean_j R[j, j]``. Riemer et al. 2019, arXiv:1810.11910.

    >>> LearningAccuracy(2).of(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    tensor(0.8500)
    """

    @override
    def _formula(self, after: Tensor) -> Tensor:
        return self._learned(after, range(len(after))).mean()


class Stability(MatrixMetric):
    """Accuracy in the end on the old tasks, all but the last one: ``mean_{j<T-1} R[T-1, j]``.

    >>> Stability(2).of(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    tensor(0.7000)
    """

    @override
    def _formula(self, after: Tensor) -> Tensor:
        return self._final(after, range(len(after) - 1)).mean()


class BackwardTransfer(MatrixMetric):
    """BWT, what later training added to the old tasks: ``mean_{j<T-1} (R[T-1, j] - R[j, j])``.

    Above 0 they improved, below 0 they were forgotten. Lopez-Paz & Ranzato 2017, arXiv:1706.08840.

    >>> BackwardTransfer(2).of(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    tensor(-0.2000)
    """

    @override
    def _formula(self, after: Tensor) -> Tensor:
        old = range(len(after) - 1)
        return (self._final(after, old) - self._learned(after, old)).mean()


class Forgetting(MatrixMetric):
    """F, what the old tasks lost until the end: ``mean_{j<T-1} (best_j - R[T-1, j])``. Below 0 they improved.

    Libraries disagree on ``best_j``; the row before the first task counts in none of them:

    - ``"chaudhry"``: ``max_{j<=l<=T-2} R[l, j]``, without the last row. Chaudhry et al. 2018, arXiv:1801.10112.
    - ``"avalanche"``: ``R[j, j]``, so that F is -BWT. Avalanche 0.6.0.
    - ``"mammoth"``: ``max_l R[l, j]`` over all rows, the last one too, so F is never below 0. Rows before ``j`` count where they
      were measured (Mammoth, May 2026, takes 0 for others: the same, as no accuracy is below 0).

    Args:
        num_tasks: Length of the sequence.
        definition: One of these.
        options: ``so_far``, and those of ``torchmetrics.Metric``.

    Raises:
        ValueError: For another definition.

    >>> improved = torch.tensor([[0.5, 0.2], [0.8, 0.9]])
    >>> [round(float(Forgetting(2, definition=name).of(improved)), 4) for name in ("chaudhry", "avalanche", "mammoth")]
    [-0.3, -0.3, 0.0]
    """

    higher_is_better = False

    def __init__(self, num_tasks: int, *, definition: str = "chaudhry", **options: Any) -> None:
        super().__init__(num_tasks, **options)
        if definition not in _DEFINITIONS:
            raise ValueError(f"{self._owner}: definition={definition!r} must be one of {list(_DEFINITIONS)}.")
        self.definition = definition

    @override
    def _formula(self, after: Tensor) -> Tensor:
        drops = [self._best(after, task) - self._final(after, [task]) for task in range(len(after) - 1)]
        return torch.cat(drops).mean() if drops else after.new_tensor(torch.nan)

    def _best(self, after: Tensor, task: int) -> Tensor:
        if self.definition == "avalanche":
            return self._learned(after, [task])
        since = self._cells(after, ((row, task) for row in range(task, len(after) - 1)))
        column = since if self.definition == "chaudhry" else after[:, task]
        return column[~column.isnan()].max()


class ForwardTransfer(MatrixMetric):
    """FWT, what earlier tasks gave to one that was not yet trained: ``mean_{j>=1} (R[j-1, j] - b_j)``.

    Lopez-Paz & Ranzato 2017, arXiv:1706.08840.

    Args:
        num_tasks: Length of the sequence.
        baseline: ``b``, ``(tasks,)``: the accuracy of a randomly initialised network on each task; ``b[0]`` is not used.
        options: ``so_far``, and those of ``torchmetrics.Metric``.

    Raises:
        ValueError: For a baseline of another length; by ``compute`` and ``of``, if one that is used is ``nan``.

    >>> ForwardTransfer(2, baseline=[0.1, 0.1]).of(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
    tensor(0.4000)
    """

    def __init__(self, num_tasks: int, *, baseline: Sequence[float] | Tensor, **options: Any) -> None:
        super().__init__(num_tasks, **options)
        self.baseline = _numbers(baseline, num_tasks, f"{self._owner}: baseline")

    @override
    def _formula(self, after: Tensor) -> Tensor:
        new = range(1, len(after))
        start = [_needed(self.baseline, task, f"{self._owner}: baseline") for task in new]
        return (self._cells(after, ((task - 1, task) for task in new)) - after.new_tensor(start)).mean()


class Intransigence(MatrixMetric):
    """``I_k = a*_k - R[k, k]``, what the sequence kept from being learned of the last task ``k``. Below 0 it helped.

    Chaudhry et al. 2018, arXiv:1801.10112.

    Args:
        num_tasks: Length of the sequence.
        joint: ``a*``, ``(tasks,)``: the accuracy on task ``k`` of a model trained jointly on the tasks up to ``k``; only that of
            the last task judged is used.
        options: ``so_far``, and those of ``torchmetrics.Metric``.

    Raises:
        ValueError: For joint accuracies of another length; by ``compute`` and ``of``, if the one used is ``nan``.

    >>> Intransigence(1, joint=[0.95]).of(torch.tensor([[0.9]]))
    tensor(0.0500)
    """

    higher_is_better = False

    def __init__(self, num_tasks: int, *, joint: Sequence[float] | Tensor, **options: Any) -> None:
        super().__init__(num_tasks, **options)
        self.joint = _numbers(joint, num_tasks, f"{self._owner}: joint")

    @override
    def _formula(self, after: Tensor) -> Tensor:
        task = len(after) - 1
        return _needed(self.joint, task, f"{self._owner}: joint") - self._learned(after, [task])[0]


class MinAccuracy(CurveRecord):
    """min-ACC, the lowest accuracy on an old task at any look after it was learned, mean over the old tasks.

    The looks are those inside of later tasks, their ends among them. De Lange et al. 2023, arXiv:2205.13452.

    >>> metric = MinAccuracy(2)
    >>> for step, (during, value) in enumerate([(0, 0.9), (1, 0.4), (1, 0.7)]):
    ...     metric.update(during, 0, value, step=step)
    >>> metric.compute()
    tensor(0.4000, dtype=torch.float64)
    """

    higher_is_better = True

    @override
    def _formula(self, curve: Tensor) -> Tensor:
        return curve[1:].min()


class StabilityGap(CurveRecord):
    """How far old tasks fell in between, which looks at the ends of tasks miss: mean of ``R[j, j]`` minus its min-ACC.

    Below 0 they were better all the time. De Lange et al. 2023, arXiv:2205.13452. Updates are those of ``MinAccuracy``.

    >>> metric = StabilityGap(2)
    >>> for step, (during, value) in enumerate([(0, 0.9), (1, 0.4), (1, 0.7)]):
    ...     metric.update(during, 0, value, step=step)
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    @override
    def _formula(self, curve: Tensor) -> Tensor:
        return curve[0] - curve[1:].min()


def _numbers(values: Sequence[float] | Tensor, num_tasks: int, owner: str) -> list[float]:
    found = torch.as_tensor(values, dtype=torch.float64).cpu()
    if found.shape != (num_tasks,):
        raise ValueError(f"{owner}={values!r} must be {num_tasks} numbers, one for each task.")
    return [float(value) for value in found]


def _needed(values: Sequence[float], task: int, owner: str) -> float:
    if not math.isfinite(values[task]):
        raise ValueError(f"{owner}[{task}]={values[task]!r} is needed and must be finite.")
    return values[task]

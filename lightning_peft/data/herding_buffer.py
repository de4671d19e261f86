"""The rows whose features best stand for their class, equally many of each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.data.buffers import Label, MemoryBuffer, StoredRow


class HerdingBuffer(MemoryBuffer):
    """Keep the rows whose features best stand for the mean of their class; equally many of each class, to one row.

    Herding needs all rows of a class. So ``add`` collects candidates beside the buffer, and ``end_task`` chooses among them
    (:func:`herding_order`) and lets them go; until then the new rows are not in the buffer. Where classes are many, each
    keeps the first rows of its order, which are the best ones. A class that comes back is chosen anew from what was kept of it
    and what came, with the features as they were then, towards the mean of all that ever came of it. Nothing in it is random.

    iCaRL: Rebuffi et al. 2017, arXiv:1611.07725, algorithms 4 and 5. There features have length 1: normalise them before.

    **The trap:** the candidates of a task stay in memory, and in checkpoints, until ``end_task``.

    Args:
        capacity: The most rows that it holds, at least one per class.

    Raises:
        ValueError: For a capacity below 1; by ``add``, for a row without a label or a feature, a feature of another length than
            the class's first, and a class for which there is no place left.

    >>> buffer = HerdingBuffer(capacity=2)
    >>> for value in (0.0, 1.0, 5.0):
    ...     buffer.add(value, label="a", feature=torch.tensor([value]))
    >>> buffer.end_task()
    >>> list(buffer)
    [1.0, 5.0]
    """

    needs = ("label", "feature")

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.candidates: list[StoredRow] = []
        """Rows that wait for ``end_task``."""
        self._totals: dict[Label, tuple[Tensor, int]] = {}

    @override
    def _decide(self, stored: StoredRow) -> None:
        label, feature = stored.label, stored.feature
        assert label is not None
        assert feature is not None
        if label not in self._totals and len(self._totals) == self.capacity:
            raise ValueError(
                f"{self._owner}: there is no place for class {label!r} beside {len(self._totals)} others. Make it with a capacity "
                f"of at least {self.capacity + 1}, better a multiple of the number of classes."
            )
        total, count = self._totals.get(label, (torch.zeros(len(feature), dtype=torch.float64), 0))
        if len(total) != len(feature):
            raise ValueError(
                f"{self._owner}: a feature of class {label!r} has length {len(feature)}, earlier ones {len(total)}. Features must "
                "come from one layer."
            )
        self._totals[label] = total + feature.double(), count + 1
        self.candidates.append(stored)

    @override
    def end_task(self) -> None:
        available: dict[Label, list[StoredRow]] = {label: [] for label in self._totals}
        for stored in (*self.stored, *self.candidates):
            assert stored.label is not None
            available[stored.label].append(stored)
        new = {stored.label for stored in self.candidates}
        quotas = class_quotas({label: len(found) for label, found in available.items()}, self.capacity)
        self.stored, self.candidates = [], []
        for label, found in available.items():
            chosen = self._best(label, found, quotas[label]) if label in new else found[: quotas[label]]
            self.stored.extend(chosen)

    def _best(self, label: Label, found: list[StoredRow], count: int) -> list[StoredRow]:
        features = torch.stack([stored.feature for stored in found if stored.feature is not None])
        total, seen = self._totals[label]
        return [found[index] for index in herding_order(features, count, mean=total / seen)]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "candidates": [{**vars(stored)} for stored in self.candidates],
            "totals": {**self._totals},
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.candidates = [StoredRow(**stored) for stored in state_dict["candidates"]]
        self._totals = {**state_dict["totals"]}


def herding_order(features: Tensor, count: int, *, mean: Tensor | None = None) -> list[int]:
    """Choose rows one after the other so that the mean of those chosen comes as close to a mean as it can.

    ``p_k = argmin_x || mean - (f(x) + f(p_1) + ... + f(p_{k-1})) / k ||`` over the rows ``x`` that are left; of equally
    good ones the first. Rebuffi et al. 2017, arXiv:1611.07725, algorithm 4. Computed in ``float64``.

    Args:
        features: ``(rows, features)``.
        count: How many to choose, at most ``rows``.
        mean: ``(features,)``; by default the rows' mean.

    Returns:
        Row numbers, the best first: the first few are what a smaller ``count`` would have chosen.

    Raises:
        ValueError: For features that are no matrix, and a count out of range.

    >>> herding_order(torch.tensor([[0.0], [1.0], [5.0]]), 2)
    [1, 2]
    """
    if features.dim() != 2:
        raise ValueError(f"herding_order: features of shape {tuple(features.shape)} must be (rows, features).")
    if not 0 <= count <= len(features):
        raise ValueError(f"herding_order: count={count!r} must lie from 0 to the number of rows, {len(features)}.")
    features = features.double()
    mean = features.mean(0) if mean is None else mean.double()
    order: list[int] = []
    total = torch.zeros_like(mean)
    left = torch.ones(len(features), dtype=torch.bool)
    for number in range(1, count + 1):
        distances = (mean - (features + total) / number).norm(dim=1)
        best = int(distances.masked_fill(~left, torch.inf).argmin())
        order.append(best)
        left[best] = False
        total = total + features[best]
    return order


def class_quotas(available: Mapping[Label, int], capacity: int) -> dict[Label, int]:
    """Share places equally among classes, and give on what a class has no rows for.

    Args:
        available: Rows that there are of each class.
        capacity: Places in all.

    Returns:
        Places of each class. Together ``min(capacity, rows)``; of classes that do not get all their rows in, none has two
        places more than another.

    >>> class_quotas({"a": 9, "b": 1, "c": 9}, 6)
    {'a': 2, 'b': 1, 'c': 3}
    """
    quotas, left = dict.fromkeys(available, 0), capacity
    for number, label in enumerate(sorted(available, key=lambda label: available[label])):
        quotas[label] = min(available[label], left // (len(available) - number))
        left -= quotas[label]
    return quotas

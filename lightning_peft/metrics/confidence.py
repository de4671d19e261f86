"""How sure a classifier is of what it is shown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class ClassifierConfidence(Metric):
    """Mean top probability of a softmax, and the share of rows where it is above a threshold.

    **The trap:** a softmax is sure of much that is nothing (Hein et al. 2019, arXiv:1812.05720, theorem 3.1: far enough away,
    a ReLU network is as sure as one likes). High confidence alone is no sign of a good sample.

    Args:
        threshold: From where on the classifier counts as sure.
        options: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: For a threshold outside (0, 1).

    >>> metric = ClassifierConfidence(0.7)
    >>> metric.update(torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log())
    >>> {name: round(float(value), 2) for name, value in metric.compute().items()}
    {'confidence': 0.7, 'sure': 0.5}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    sure: Tensor
    rows: Tensor

    def __init__(self, threshold: float = 0.99, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < threshold < 1:
            raise ValueError(f"ClassifierConfidence: threshold={threshold!r} must lie inside (0, 1).")
        self.threshold = threshold
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sure", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor) -> None:
        """Add logits ``(rows, classes)``."""
        top = logits.detach().double().softmax(1).amax(1)
        self.total += top.sum()
        self.sure += (top > self.threshold).sum()
        self.rows += len(top)

    @override
    def compute(self) -> dict[str, Tensor]:
        return {"confidence": self.total / self.rows, "sure": self.sure.double() / self.rows}

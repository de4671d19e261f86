"""What is measured, as torchmetrics classes."""

from lightning_peft.metrics.accuracy_matrix import AccuracyMatrix, draw_accuracy_matrix
from lightning_peft.metrics.continual import (
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    Intransigence,
    LearningAccuracy,
    MinAccuracy,
    Stability,
    StabilityGap,
)
from lightning_peft.metrics.retrieval import RecallAtOne

__all__ = [
    "AccuracyMatrix",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
    "Intransigence",
    "LearningAccuracy",
    "MinAccuracy",
    "RecallAtOne",
    "Stability",
    "StabilityGap",
    "draw_accuracy_matrix",
]

"""What is measured, as torchmetrics classes."""

from lightning_peft.metrics.accuracy_matrix import AccuracyMatrix, draw_accuracy_matrix
from lightning_peft.metrics.confidence import ClassifierConfidence
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
from lightning_peft.metrics.frechet_distance import FrechetDistance
from lightning_peft.metrics.manifold import DensityCoverage, Memorisation, NearestNeighbourDistance, PrecisionRecall
from lightning_peft.metrics.retrieval import RecallAtOne

__all__ = [
    "AccuracyMatrix",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "ClassifierConfidence",
    "DensityCoverage",
    "Forgetting",
    "ForwardTransfer",
    "FrechetDistance",
    "Intransigence",
    "LearningAccuracy",
    "Memorisation",
    "MinAccuracy",
    "NearestNeighbourDistance",
    "PrecisionRecall",
    "RecallAtOne",
    "Stability",
    "StabilityGap",
    "draw_accuracy_matrix",
]

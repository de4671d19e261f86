"""What is measured of every arm of the recipe ``generative``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.metrics import ClassifierConfidence
from lightning_peft.metrics.frechet_distance import frechet_distance
from lightning_peft.metrics.manifold import copying, density_coverage, nearest_distances, precision_recall
from lightning_peft.recipes.generative_arms import Bench, Made

Row = dict[str, Any]
COLUMNS = {
    "confidence": "conf",
    "sure": ">.99",
    "agreement": "agree",
    "detector": "det",
    "nearest": "nn",
    "fid": "FID",
    "precision": "P",
    "recall": "R",
    "density": "D",
    "coverage": "C",
    "nearer": "copy",
    "conditional": "cond",
}
"""Keys of a row, and the headings of the table."""


@torch.no_grad()
def measured(made: Made, bench: Bench) -> Row:
    """Return all measures of an arm's images; ``nan`` where too few were accepted to measure anything."""
    images, train = made.images, bench.images.train
    if len(images) <= 5:
        return {**dict.fromkeys(COLUMNS, float("nan")), "images": len(images), **made.facts}
    classifier, evaluator, detector = (bench.nets[name] for name in ("classifier", "evaluator", "detector"))
    confidence = ClassifierConfidence(0.99)
    logits = classifier(images)
    confidence.update(logits)
    seen = evaluator(images).argmax(1)
    nearest = nearest_distances(images, train)
    precision, recall = precision_recall(train, images)
    density, coverage = density_coverage(train, images)
    nearer, z = copying(nearest, nearest_distances(bench.images.test, train))
    return {
        **{name: float(value) for name, value in confidence.compute().items()},
        "agreement": share(logits.argmax(1) == seen),
        "detector": share(detector(images).argmax(1) == 1),
        "nearest": float(nearest.mean()),
        "fid": frechet_distance(evaluator.features, train, images),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        "nearer": nearer,
        "copying_z": z,
        "conditional": float("nan") if made.wanted is None else share(seen == made.wanted),
        "entropy": entropy(seen, bench.images.classes),
        "images": len(images),
        **made.facts,
    }


def share(hits: Tensor) -> float:
    """Return the share of hits."""
    return float(hits.double().mean())


def entropy(classes: Tensor, count: int) -> float:
    """Return the entropy of the classes that were seen, as a share of the greatest possible.

    >>> entropy(torch.tensor([0, 1, 0, 1]), 2)
    1.0
    """
    shares = torch.bincount(classes, minlength=count).double() / len(classes)
    return float(torch.special.entr(shares).sum() / torch.tensor(float(count)).double().log())

"""Confidence against numpy, however batched."""

import numpy as np
import pytest
import torch

from lightning_peft.metrics import ClassifierConfidence


@pytest.mark.parametrize("batch", [1, 9, 50])
def test_it_is_the_mean_of_the_top_probability_and_the_share_above(batch):
    logits = 3 * torch.randn(50, 4)
    odds = np.exp(logits.double().numpy())
    top = (odds / odds.sum(1, keepdims=True)).max(1)
    metric = ClassifierConfidence(0.9)
    for part in logits.split(batch):
        metric.update(part)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert 0 < found["sure"] < 1
    assert found == pytest.approx({"confidence": top.mean(), "sure": (top > 0.9).mean()}, abs=1e-9)


def test_sums_are_added_over_ranks():
    assert {function.__name__ for function in ClassifierConfidence()._reductions.values()} == {"dim_zero_sum"}


@pytest.mark.parametrize("threshold", [0, 1, 1.5])
def test_a_threshold_that_nothing_or_all_passes_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"threshold={threshold} must lie inside \(0, 1\)"):
        ClassifierConfidence(threshold)

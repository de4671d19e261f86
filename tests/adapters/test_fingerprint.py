"""A fingerprint tells networks apart by names, shapes and values."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft.adapters.fingerprint import (
    fingerprint,
    fingerprint_differences,
    fingerprint_from_plain,
    fingerprint_to_plain,
)


def test_equal_networks_do_not_differ_and_plain_data_comes_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    prints = fingerprint(model)
    assert fingerprint_differences(prints, fingerprint(copy.deepcopy(model))) == []
    assert fingerprint_from_plain(fingerprint_to_plain(prints)) == prints


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m[0].weight.data.view(-1)[4:5].add_(1e-6), ["0.weight: other values"]),
        (lambda m: m[1].running_mean.add_(1), ["1.running_mean: other values"]),
        (lambda m: m.append(nn.Linear(3, 1, bias=False)), ["2.weight: not in the base it was trained on"]),
        (
            lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(4))),
            ["0.bias: shape (3,) expected, (4,) at hand"],
        ),
        (lambda m: setattr(m[0], "bias", None), ["0.bias: not in the base at hand"]),
    ],
)
def test_every_difference_is_named(change, expected):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = fingerprint(model)
    change(model)
    assert fingerprint_differences(before, fingerprint(model)) == expected
    ignored = expected[0].split(":")[0]
    assert fingerprint_differences(before, fingerprint(model), ignore=[ignored]) == []


def test_a_base_saved_in_half_precision_is_recognised_in_full():
    model = nn.Linear(3, 3)
    half = fingerprint(copy.deepcopy(model).to(torch.bfloat16))
    assert fingerprint_differences(half, fingerprint(model)) != []
    assert fingerprint_differences(half, fingerprint(model), model=model) == []


def test_values_on_the_meta_device_are_not_compared():
    model = nn.Linear(3, 3)
    assert fingerprint_differences(fingerprint(model), fingerprint(nn.Linear(3, 3, device="meta"))) == []
    assert fingerprint_differences(fingerprint(model), fingerprint(nn.Linear(3, 4, device="meta"))) != []

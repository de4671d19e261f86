"""Bases whose weights are stored in fewer bits: torchao's tensors, bitsandbytes' layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer computes with a weight that cannot be added to or decomposed.

    >>> is_quantised(nn.Linear(2, 2))
    False
    """
    if any(cls.__module__.startswith("bitsandbytes") for cls in type(layer).__mro__):
        return True
    weight = layer._parameters.get("weight")
    # torchao's tensors are subclasses; so are sharded ones, which have a mesh and hold ordinary numbers.
    return weight is not None and type(weight.data) is not Tensor and not hasattr(weight, "device_mesh")


def weight_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a layer with this weight computes; integers stand for bfloat16."""
    return weight.dtype if weight.is_floating_point() else torch.bfloat16

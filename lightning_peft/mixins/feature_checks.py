"""Whether what a module calls its features stays what it is while its head trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


def refuse_moving(
    module: pl.LightningModule,
    features: Callable[[Any], Any],
    inputs: Any,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Look at the features of some inputs, and stop if training would change them.

    Args:
        module: The module; modes, buffers and generators are as before.
        features: What is looked at.
        inputs: Of a few rows, on the module's device.
        context: Puts the module into eval mode for a while, and back.

    Raises:
        ValueError: If they depend on a parameter that trains, or are other ones in training than in evaluation: dropout or batch
            statistics outside the backbone.
    """
    name, buffers = type(module).__name__, [(one, one.detach().clone()) for one in module.buffers()]
    trained = {key: one for key, one in module.named_parameters() if one.requires_grad}
    with context():
        with torch.enable_grad():
            found = _states(features(inputs))
            grads = (
                torch.autograd.grad(found.float().sum(), list(trained.values()), allow_unused=True)
                if found.requires_grad
                else ()
            )
        module.train()
        with torch.no_grad():
            in_training = _states(features(inputs))
            for one, before in buffers:
                one.copy_(before)
    if found.requires_grad:
        moved = [key for key, grad in zip(trained, grads, strict=True) if grad is not None]
        raise ValueError(
            f"{name}: features(inputs) depends on {moved[0]!r}, which trains, so its result cannot be kept. Move it behind the "
            "features, or leave feature_cache out."
        )
    if not torch.allclose(found.float(), in_training.float(), rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{name}: features(inputs) is another one in training than in evaluation (dropout or batch statistics outside the "
            "backbone?), so its result cannot be kept. Move that behind the features, or leave feature_cache out."
        )


def _states(found: Any) -> Tensor:
    states: Tensor = found[0] if isinstance(found, tuple) else found
    return states

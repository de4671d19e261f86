"""The state of every generator of random numbers that training draws from, as plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

RandomState = dict[str, Any]


def random_state(device: torch.device | None = None) -> RandomState:
    """Take down the state of Python's, numpy's and torch's generators.

    Args:
        device: A CUDA device whose generator is taken too.

    Returns:
        Tensors and plain types, which load under ``weights_only=True``.

    >>> state = random_state()
    >>> first = torch.rand(2)
    >>> set_random_state(state)
    >>> torch.equal(torch.rand(2), first)
    True
    """
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    state: RandomState = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device | None = None) -> None:
    """Go back to a state that :func:`random_state` took down.

    Args:
        state: The state; without one of a CUDA device, that device is left alone.
        device: The CUDA device, if there is one.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Take back what is drawn inside.

    Args:
        device: A CUDA device whose generator counts too.

    >>> with random_state_kept():
    ...     first = torch.rand(2)
    >>> torch.equal(torch.rand(2), first)
    True
    """
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)

"""A module's own logs and metrics while tasks adapt: they would see tasks where they expect batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics import Metric

from lightning_peft.meta.places import Parts


@contextmanager
def silenced(module: pl.LightningModule) -> Iterator[None]:
    """Let a module log nothing inside."""
    attributes = ("log", "log_dict")
    kept = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(dict.fromkeys(attributes, _nothing))
    try:
        yield
    finally:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(kept)


@contextmanager
def metrics_kept(parts: Parts) -> Iterator[None]:
    """Take back what the metrics of a module's parts count inside; nothing that vmap wrapped stays in them."""
    kept = [(vars(one), _state(one)) for _, one in parts if isinstance(one, Metric)]
    try:
        yield
    finally:
        for attributes, state in kept:
            attributes.update(state)


def _state(metric: Metric) -> dict[str, Any]:
    """Return the attributes of a metric, with copies of what it may change in place."""
    return {
        name: value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
        for name, value in vars(metric).items()
    }


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand for a log that nobody reads."""

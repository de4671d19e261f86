"""What stands in a batch for the inputs of a network whose features are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.data.cached_rows import CachedRows, Features

_OWNER = "LinearProbeMixin"
FEATURES = "features"


class CachedInputs(dict[str, Any]):
    """Stands in a batch for the inputs of the network: their features, and what else of a mapping the step may ask for."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(
            f"{_OWNER}: with a feature cache the batch has no {name!r}: features(inputs) reads it, or its rows differ in shape, "
            f"and then only features are kept. Read it there, or list it: cached_inputs = [{name!r}]."
        )


class Reads(dict[str, Any]):
    """A mapping that notes what is read of it."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        super().__init__(inputs)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return what is there of a name."""
        # Its own get does not ask __getitem__.
        return self[name] if name in self else default  # noqa: SIM401

    def items(self) -> Any:
        """Return everything: all of it counts as read."""
        self.read |= self.keys()
        return super().items()

    def values(self) -> Any:
        """Return everything: all of it counts as read."""
        self.read |= self.keys()
        return super().values()

    def not_needed(self) -> set[str]:
        """Return what was read and is more than a number a row: the network's inputs."""
        return {name for name in self.read if isinstance(self[name], Tensor) and self[name].dim() > 1}


class CachedBatch:
    """Put features into the place of the inputs of a batch."""

    def __init__(self, mapping: bool) -> None:
        self.mapping = mapping

    def __call__(self, batch: tuple[Features, Any]) -> Any:
        """Return the batch as the step expects it."""
        features, rest = batch
        if self.mapping:
            return CachedInputs(rest, features=features)
        inputs = CachedInputs(features=features)
        return inputs if rest is None else (inputs, *rest)


def divided(batch: Any) -> tuple[Any, Any]:
    """Return the inputs of a batch and the rest."""
    if isinstance(batch, list | tuple):
        return batch[0], list(batch[1:])
    return batch, None


def on_cpu(value: Any) -> Any:
    """Return what a batch holds, without gradient, where it can be written."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, Mapping):
        return {name: on_cpu(part) for name, part in value.items()}
    return type(value)(on_cpu(part) for part in value) if isinstance(value, list | tuple) else value


def label_key(batch: Any) -> str | int | None:
    """Return where a batch or row has its label: of a mapping ``labels`` or ``label``, else its last part; None for nowhere."""
    if isinstance(batch, Mapping):
        return next((name for name in ("labels", "label", "target", "y") if name in batch), None)
    return -1 if isinstance(batch, list | tuple) else None


def targets_of(rows: CachedRows) -> Tensor:
    """Return the label of each cached row, ``(rows,)``.

    Raises:
        ValueError: If they have none.
    """
    found: list[Any] = rows.rest or []
    key: Any = label_key(found[0]) if found else None
    if key is None:
        raise ValueError(
            f"{_OWNER}: a batch has no label; a mapping names it 'labels' or 'label', a tuple ends with it."
        )
    return torch.stack([torch.as_tensor(row[key]) for row in found])

"""A memory of old rows, which keeps a fixed number of those that come by: what every kind of buffer shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_peft.data.streams import key

Label: TypeAlias = int | str


@dataclass(frozen=True)
class StoredRow:
    """A row in a buffer, and what was known of it.

    Args:
        row: What a dataset gives: tensors, numbers and text, in tuples, lists and dicts.
        label: Its class.
        feature: Its features, ``(features,)``.
        logits: What the network said of it, for distillation, ``(classes,)``.
        step: Optimizer steps that were done when the logits were taken.
    """

    row: Any
    label: Label | None = None
    feature: Tensor | None = None
    logits: Tensor | None = None
    step: int | None = None


class MemoryBuffer(Dataset[Any], ABC):
    """A map-style dataset of at most ``capacity`` rows, chosen from those that :meth:`add` was given.

    Rows are copied to the CPU. What is kept depends on the seed and on the rows' order alone: no generator is drawn from, so a
    buffer that was saved and loaded decides on as if it had not been, whatever the number of workers.

    Args:
        capacity: The most rows that it holds.
        seed: Seed of its decisions.

    Raises:
        ValueError: For a capacity below 1 or a seed that is no whole number.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """What :meth:`add` must be told of each row: ``label``, ``feature``."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if not _is_whole(capacity) or capacity < 1:
            raise ValueError(f"{self._owner}: capacity={capacity!r} must be a whole number of at least 1.")
        if not _is_whole(seed):
            raise ValueError(f"{self._owner}: seed={seed!r} must be a whole number.")
        self.capacity, self.seed = capacity, seed
        self.seen = 0
        """Rows that :meth:`add` was given so far."""
        self.stored: list[StoredRow] = []
        """The rows that are kept, with what is known of them."""

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def __len__(self) -> int:
        return len(self.stored)

    @override
    def __getitem__(self, index: int) -> Any:
        return self.stored[index].row

    @property
    def counts(self) -> dict[Label | None, int]:
        """Rows kept of each class."""
        labels = [stored.label for stored in self.stored]
        return {label: labels.count(label) for label in dict.fromkeys(labels)}

    def add(
        self,
        row: Any,
        *,
        label: Label | Tensor | None = None,
        feature: Tensor | None = None,
        logits: Tensor | None = None,
        step: int | None = None,
    ) -> None:
        """Offer a row; the buffer decides whether to keep it, and which other one goes.

        Args:
            row: What a dataset gives: tensors, numbers and text, in tuples, lists and dicts.
            label: Its class: a whole number, a text or a tensor of one whole number.
            feature: Its features, ``(features,)``; more dimensions are flattened.
            logits: What the network says of it, ``(classes,)``.
            step: Optimizer steps that were done when the logits were taken.

        Raises:
            ValueError: For a row that a checkpoint could not hold, a label, feature or step that is none, logits without a step,
                and where something is missing that this kind of buffer needs.
        """
        self.take(self.describe(row, label=label, feature=feature, logits=logits, step=step))

    def describe(
        self,
        row: Any,
        *,
        label: Label | Tensor | None = None,
        feature: Tensor | None = None,
        logits: Tensor | None = None,
        step: int | None = None,
    ) -> StoredRow:
        """Check a row and copy it to the CPU, without a decision; :meth:`take` makes it. Arguments as of :meth:`add`."""
        missing = [name for name in self.needs if {"label": label, "feature": feature}[name] is None]
        if missing:
            raise ValueError(f"{self._owner}: a row came without its {missing[0]}. Pass {missing[0]}= with each row.")
        if (logits is None) != (step is None):
            raise ValueError(
                f"{self._owner}: logits and the step at which they were taken go together, but only "
                f"{'step' if logits is None else 'logits'}= came. Pass both or neither."
            )
        if step is not None and (not _is_whole(step) or step < 0):
            raise ValueError(f"{self._owner}: step={step!r} must be a whole number of at least 0.")
        return StoredRow(
            row=_plain(row, self._owner),
            label=None if label is None else self._label(label),
            feature=None if feature is None else self._numbers(feature, "feature").flatten(),
            logits=None if logits is None else self._numbers(logits, "logits"),
            step=step,
        )

    def take(self, stored: StoredRow) -> None:
        """Decide on a row that :meth:`describe` returned."""
        self._decide(stored)
        self.seen += 1

    @abstractmethod
    def _decide(self, stored: StoredRow) -> None:
        """Keep a row or not; ``self.seen`` rows came before it."""

    def end_task(self) -> None:
        """Do what is only possible once all rows of a task are there."""

    def with_logits(self) -> LogitRows:
        """Return the rows as ``(row, logits, step)``, for distillation; they follow what the buffer holds."""
        return LogitRows(self)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is kept and all that later decisions depend on, as plain data and tensors."""
        return {
            "kind": self._owner,
            "capacity": self.capacity,
            "seed": self.seed,
            "seen": self.seen,
            "stored": [{**vars(stored)} for stored in self.stored],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Become the buffer that :meth:`state_dict` was taken of.

        Raises:
            ValueError: If that was of another kind, capacity or seed.
        """
        own = {"kind": self._owner, "capacity": self.capacity, "seed": self.seed}
        for name, value in own.items():
            if state_dict[name] != value:
                raise ValueError(
                    f"{self._owner}: the saved buffer has {name}={state_dict[name]!r}, this one {name}={value!r}. Make it as it "
                    "was when it was saved."
                )
        self.seen = state_dict["seen"]
        self.stored = [StoredRow(**stored) for stored in state_dict["stored"]]

    def _draw(self, bound: int) -> int:
        """Return a random number from 0 to below ``bound``, a function of the seed and the row's number."""
        return key(self.seed, self._owner, self.seen) % bound

    def _label(self, label: object) -> Label:
        value = label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
        if not isinstance(value, str) and not _is_whole(value):
            raise ValueError(
                f"{self._owner}: label={label!r} must be a whole number, a text or a tensor of one whole number."
            )
        return cast("Label", value)

    def _numbers(self, values: object, name: str) -> Tensor:
        if not isinstance(values, Tensor) or values.numel() == 0 or not bool(torch.isfinite(values).all()):
            raise ValueError(f"{self._owner}: {name}={values!r:.200} must be a tensor of finite numbers.")
        return _copied(values)


class LogitRows(Dataset[tuple[Any, Tensor, int]]):
    """The rows of a buffer with their stored logits and the step at which these were taken."""

    def __init__(self, buffer: MemoryBuffer) -> None:
        self.buffer = buffer

    def __len__(self) -> int:
        return len(self.buffer)

    @override
    def __getitem__(self, index: int) -> tuple[Any, Tensor, int]:
        stored = self.buffer.stored[index]
        if stored.logits is None or stored.step is None:
            raise ValueError(f"LogitRows: row {index} was stored without logits. Pass logits= and step= to add.")
        return stored.row, stored.logits, stored.step


def _is_whole(value: object) -> bool:
    return type(value) is int  # neither a bool nor a number of numpy's, which a checkpoint could not hold


def _copied(values: Tensor) -> Tensor:
    """Return a tensor of its own: a view into a batch would keep, and save, all of the batch."""
    return values.detach().as_subclass(Tensor).to("cpu", copy=True).contiguous()


def _plain(value: Any, owner: str) -> Any:
    if isinstance(value, Tensor):
        return _copied(value)
    if isinstance(value, Mapping):
        return {_plain(name, owner): _plain(found, owner) for name, found in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(_plain(found, owner) for found in value)
    if value is None or type(value) in {bool, int, float, str, bytes}:
        return value
    raise ValueError(
        f"{owner}: a row holds {value!r:.200}, a {type(value).__name__}, which a checkpoint could not hold. Rows may hold tensors, "
        "numbers, text and None, in tuples, lists and dicts; let the dataset turn the rest into tensors."
    )

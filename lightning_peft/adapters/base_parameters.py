"""Adapters that add nothing: they train chosen parameters of the network itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter


@dataclass(frozen=True, repr=False)
class BaseParameters(Adapter):
    """What adapters that train parameters of the network share; subclasses say which.

    Args:
        targets: Globs that choose among the parameters of the subclass's sort.

    Raises:
        ValueError: If the targets are no list of globs, here; if they choose nothing, when a network is adapted.
    """

    targets: list[str] | tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        super().__post_init__()
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"{type(self).__name__}: targets={self.targets!r} must be a list of globs.")
        object.__setattr__(self, "targets", tuple(self.targets))

    @override
    @abstractmethod
    def select(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters of ``model`` that would train.

        Raises:
            ValueError: If there are none, or a glob matches none.
        """

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        return self.select(model)


def required(found: Sequence[str], model: nn.Module, *, owner: str, kind: str) -> Sequence[str]:
    """Return ``found``.

    Raises:
        ValueError: If it is empty.
    """
    if not found:
        raise ValueError(f"{owner}: this {type(model).__name__} has no {kind}, so nothing would train.")
    return found

"""Linear probe: train only what lies outside the network, on features that stay fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter


@dataclass(frozen=True, repr=False)
class LinearProbe(Adapter):
    """Freeze the network whole; a head outside it is what trains.

    The mixins keep a probed network in eval mode: dropout and batch statistics would make its features move.
    Alain & Bengio 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644.

    >>> from lightning_peft import add_adapter
    >>> any(parameter.requires_grad for parameter in add_adapter(nn.Linear(2, 2), LinearProbe()).parameters())
    False
    """

    frozen_features: ClassVar[bool] = True

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        return []

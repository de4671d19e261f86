"""Full fine-tuning, as an adapter value: everything trains, nothing is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter


@dataclass(frozen=True, repr=False)
class FullFinetune(Adapter):
    """Train every parameter of the network: the top rung of the ladder, and the one that forgets most.

    >>> from lightning_peft import add_adapter
    >>> all(parameter.requires_grad for parameter in add_adapter(nn.Linear(2, 2), FullFinetune()).parameters())
    True
    """

    keeps_base: ClassVar[bool] = False

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        return [key for key, _ in model.named_parameters()]

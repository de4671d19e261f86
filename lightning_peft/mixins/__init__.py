"""Where weights and losses are added: mixins for LightningModules."""

from lightning_peft.mixins.adapted import adapted
from lightning_peft.mixins.adapter_mixin import AdapterMixin
from lightning_peft.mixins.replay_mixin import ReplayMixin
from lightning_peft.mixins.rungs import (
    FullFinetuneMixin,
    LinearProbeMixin,
    LoRAMixin,
    PrefixMixin,
    SoftPromptMixin,
)

__all__ = [
    "AdapterMixin",
    "FullFinetuneMixin",
    "LinearProbeMixin",
    "LoRAMixin",
    "PrefixMixin",
    "ReplayMixin",
    "SoftPromptMixin",
    "adapted",
]

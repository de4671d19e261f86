"""Where weights and losses are added: mixins for LightningModules."""

from lightning_peft.mixins.adapted import adapted
from lightning_peft.mixins.adapter_mixin import AdapterMixin
from lightning_peft.mixins.der_mixin import DERMixin
from lightning_peft.mixins.distill_mixin import DistillMixin
from lightning_peft.mixins.linear_probe_mixin import LinearProbeMixin
from lightning_peft.mixins.prompt_search_mixin import PromptSearchMixin
from lightning_peft.mixins.prompting_mixin import PromptingMixin
from lightning_peft.mixins.replay_mixin import ReplayMixin
from lightning_peft.mixins.rungs import (
    FullFinetuneMixin,
    LoRAMixin,
    PrefixMixin,
    SoftPromptMixin,
)

__all__ = [
    "AdapterMixin",
    "DERMixin",
    "DistillMixin",
    "FullFinetuneMixin",
    "LinearProbeMixin",
    "LoRAMixin",
    "PrefixMixin",
    "PromptSearchMixin",
    "PromptingMixin",
    "ReplayMixin",
    "SoftPromptMixin",
    "adapted",
]

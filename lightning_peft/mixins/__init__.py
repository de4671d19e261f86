"""Where weights and losses are added: mixins for LightningModules."""

from lightning_peft.mixins.adapted import adapted
from lightning_peft.mixins.adapter_mixin import AdapterMixin
from lightning_peft.mixins.der_mixin import DERMixin
from lightning_peft.mixins.distill_mixin import DistillMixin
from lightning_peft.mixins.linear_probe_mixin import LinearProbeMixin
from lightning_peft.mixins.maml_mixin import MAMLMixin
from lightning_peft.mixins.meta_presets import ANILMixin, FOMAMLMixin, MetaSGDMixin, ReptileMixin
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
    "ANILMixin",
    "AdapterMixin",
    "DERMixin",
    "DistillMixin",
    "FOMAMLMixin",
    "FullFinetuneMixin",
    "LinearProbeMixin",
    "LoRAMixin",
    "MAMLMixin",
    "MetaSGDMixin",
    "PrefixMixin",
    "PromptSearchMixin",
    "PromptingMixin",
    "ReplayMixin",
    "ReptileMixin",
    "SoftPromptMixin",
    "adapted",
]

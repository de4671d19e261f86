"""Where weights and losses are added: mixins for LightningModules."""

from lightning_peft.mixins.adapter_mixin import AdapterMixin, FullFinetuneMixin, LinearProbeMixin, LoRAMixin
from lightning_peft.mixins.replay_mixin import ReplayMixin

__all__ = ["AdapterMixin", "FullFinetuneMixin", "LinearProbeMixin", "LoRAMixin", "ReplayMixin"]

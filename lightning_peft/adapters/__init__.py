"""What is added to a network: plain torch, one file per method."""

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attach import (
    adapter_disabled,
    adapter_state_dict,
    add_adapter,
    merge_adapter,
    remove_adapter,
    unmerge_adapter,
)
from lightning_peft.adapters.full_finetune import FullFinetune
from lightning_peft.adapters.linear_probe import LinearProbe
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.parameter_groups import parameter_groups

__all__ = [
    "Adapter",
    "FullFinetune",
    "LinearProbe",
    "LoRA",
    "adapter_disabled",
    "adapter_state_dict",
    "add_adapter",
    "merge_adapter",
    "parameter_groups",
    "remove_adapter",
    "unmerge_adapter",
]

"""What is added to a network: plain torch, one file per method."""

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attach import (
    adapter_state_dict,
    add_adapter,
    merge_adapter,
    remove_adapter,
    unmerge_adapter,
)
from lightning_peft.adapters.bitfit import BitFit
from lightning_peft.adapters.combine import merge_adapters
from lightning_peft.adapters.deep_prompt import DeepPrompt
from lightning_peft.adapters.full_finetune import FullFinetune
from lightning_peft.adapters.ia3 import IA3
from lightning_peft.adapters.kv_prefix import KVPrefix
from lightning_peft.adapters.layer_norm_tuning import LayerNormTuning
from lightning_peft.adapters.linear_probe import LinearProbe
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.parameter_groups import parameter_groups
from lightning_peft.adapters.peft_format import from_peft, load_adapter, save_adapter
from lightning_peft.adapters.prompt_neighbours import nearest_tokens
from lightning_peft.adapters.soft_prompt import SoftPrompt
from lightning_peft.adapters.switch import adapter_disabled, adapter_rows, set_adapter
from lightning_peft.adapters.vera import VeRA

__all__ = [
    "IA3",
    "Adapter",
    "BitFit",
    "DeepPrompt",
    "FullFinetune",
    "KVPrefix",
    "LayerNormTuning",
    "LinearProbe",
    "LoRA",
    "SoftPrompt",
    "VeRA",
    "adapter_disabled",
    "adapter_rows",
    "adapter_state_dict",
    "add_adapter",
    "from_peft",
    "load_adapter",
    "merge_adapter",
    "merge_adapters",
    "nearest_tokens",
    "parameter_groups",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]

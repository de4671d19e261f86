"""Translate adapters to PEFT's ``adapter_config.json`` and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.ia3 import IA3
from lightning_peft.adapters.kv_prefix import KVPrefix
from lightning_peft.adapters.layer_norm_tuning import LayerNormTuning
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.peft_ia3 import ia3_config, ia3_from_config
from lightning_peft.adapters.peft_layer_norm import layer_norm_config, layer_norm_from_config
from lightning_peft.adapters.peft_lora import lora_config, lora_from_config, refuse_moved_base
from lightning_peft.adapters.peft_matching import CONFIG
from lightning_peft.adapters.peft_prompts import prefix_config, prefix_from_config, prompt_config, prompt_from_config
from lightning_peft.adapters.peft_vera import vera_config, vera_from_config
from lightning_peft.adapters.soft_prompt import SoftPrompt
from lightning_peft.adapters.vera import VeRA

DESCRIPTIVE = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"}
"""Fields that change nothing in what is computed."""

Writer = Callable[[nn.Module, Attachment, str], dict[str, Any]]
WRITERS: dict[type[Adapter], Writer] = {
    LoRA: lora_config,
    IA3: ia3_config,
    VeRA: vera_config,
    SoftPrompt: prompt_config,
    KVPrefix: prefix_config,
    LayerNormTuning: layer_norm_config,
}
"""The fields of PEFT's for every adapter that it has a format for."""
READERS: dict[str, Callable[[Mapping[str, Any], nn.Module], Adapter]] = {
    "LORA": lora_from_config,
    "IA3": ia3_from_config,
    "VERA": vera_from_config,
    "PROMPT_TUNING": prompt_from_config,
    "P_TUNING": prompt_from_config,
    "PREFIX_TUNING": prefix_from_config,
    "LN_TUNING": layer_norm_from_config,
}
"""The adapter for every ``peft_type`` that can be read."""


def adapter_from_config(config: Mapping[str, Any], model: nn.Module, *, live: bool) -> Adapter:
    """Return the adapter that PEFT's fields describe.

    Args:
        config: The fields.
        model: The network without the adapter.
        live: Whether they come from a model in memory.

    Raises:
        ValueError: If it is a method, or asks for an option, that we do not compute.
    """
    kind = config.get("peft_type")
    kind = str(getattr(kind, "value", kind))
    if kind not in READERS:
        raise ValueError(f"load_adapter: peft_type={kind!r} cannot be read; these can: {', '.join(sorted(READERS))}.")
    if not live:  # in memory the base has gone through it as well
        refuse_moved_base(config)
    try:
        return READERS[kind](config, model)
    except (TypeError, AttributeError, re.error) as error:
        raise ValueError(
            f"load_adapter: a field of {CONFIG} is damaged or of a kind that it cannot have: {error}"
        ) from error

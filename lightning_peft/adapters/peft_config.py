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
from lightning_peft.adapters.peft_lora import REFUSED, lora_config, lora_from_config, refuse_moved_base
from lightning_peft.adapters.peft_matching import CONFIG
from lightning_peft.adapters.peft_prompts import prefix_config, prefix_from_config, prompt_config, prompt_from_config
from lightning_peft.adapters.peft_vera import vera_config, vera_from_config
from lightning_peft.adapters.soft_prompt import SoftPrompt
from lightning_peft.adapters.vera import VeRA

DESCRIPTIVE = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"}
"""Fields that change nothing in what is computed."""
_CHOICE = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
}
_PROMPT = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
_START = {
    "init_lora_weights", "init_ia3_weights", "init_weights", "loftq_config", "eva_config",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip
_RUNTIME = {
    "runtime_config",
    "megatron_config",
    "megatron_core",
    "ensure_weight_tying",
    "qalora_group_size",
    "save_projection",
}
_PROJECTED = {"prefix_projection", "encoder_reparameterization_type"}
_PROJECTED |= {"encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
KNOWN = {
    *DESCRIPTIVE, *_CHOICE, *_PROMPT, *_START, *_RUNTIME, *_PROJECTED, *REFUSED, "peft_type", "r", "bias", "target_parameters",
    "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "feedforward_modules",
    "projection_prng_key", "vera_dropout", "d_initial",
}  # fmt: skip
"""Fields that we compute, that only training needs, or that a reader refuses by their value."""
FLAGS = {"use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "prefix_projection", "inference_mode"}
"""Fields that are true or false."""

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
    _check_fields(config)
    if not live:  # in memory the base has gone through it as well
        refuse_moved_base(config)
    try:
        return READERS[kind](config, model)
    except (TypeError, AttributeError, re.error) as error:
        raise ValueError(
            f"load_adapter: a field of {CONFIG} is damaged or of a kind that it cannot have: {error}"
        ) from error


def _check_fields(config: Mapping[str, Any]) -> None:
    if strange := {key: value for key, value in config.items() if key not in KNOWN and value}:
        raise ValueError(
            f"load_adapter: {CONFIG} asks for {strange}, which this version does not know: a misspelt field, or one of a newer "
            "PEFT. Correct it, or delete it if it changes nothing in what is computed."
        )
    if wrong := {key: config[key] for key in sorted(FLAGS) if not isinstance(config.get(key), bool | None)}:
        raise ValueError(f"load_adapter: {CONFIG} has {wrong}, where only true or false can stand.")
    if config.get("layers_to_transform") is not None and isinstance(config.get("target_modules"), str):
        raise ValueError(
            f"load_adapter: {CONFIG} has layers_to_transform beside the expression target_modules="
            f"{config['target_modules']!r}, which chooses layers by itself. Give target_modules as a list."
        )

"""LoRA in PEFT's ``adapter_config.json``, both ways."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.lora_update import LoRAUpdate, ParametersLoRA
from lightning_peft.adapters.peft_matching import (
    CONFIG,
    as_globs,
    exactly,
    heads_and_targets,
    refuse_missing,
    saved_modules,
)
from lightning_peft.adapters.updates import updates_named

# Fields of PEFT's that change what a LoRA computes, with the only values that we compute.
REFUSED: dict[str, Any] = dict.fromkeys(
    (
        "lora_bias",
        "layer_replication",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "trainable_token_indices",
        "monteclora_config",
        "velora_config",
        "corda_config",
        "lora_ga_config",
    )
)
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Any]:
    """Return the fields of PEFT's ``LoraConfig`` for one LoRA of a network."""
    lora = attachment.adapters[name]
    assert isinstance(lora, LoRA)
    found = updates_named(model, name)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parameters: list[str] = []
    for path, update in found.items():
        assert isinstance(update, LoRAUpdate | ParametersLoRA)
        key = path
        if isinstance(update, ParametersLoRA) and not isinstance(model.get_submodule(path), nn.MultiheadAttention):
            inner = [f"{path}.{parameter}".lstrip(".") for parameter in update.paths.values()]
            parameters, key = [*parameters, *inner], inner[0]
        # What counts from a start other than zero is stored as both ends side by side: of twice the rank.
        wider = 2 if isinstance(update, LoRAUpdate) and update.start_A is not None else 1
        ranks[path] = update.rank * wider
        alphas[path] = lora.alpha_of(key) * (math.sqrt(wider) if lora.scaling == "rslora" else wider)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    modules = [path for path in found if not any(p.rpartition(".")[0] == path for p in parameters)]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": lora.dropout,
        "target_modules": exactly(modules),
        **({"target_parameters": parameters} if parameters else {}),
        "exclude_modules": None,
        "rank_pattern": {re.escape(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(path): _plain(value) for path, value in alphas.items() if value != alpha},
        "use_rslora": lora.scaling == "rslora",
        "use_dora": lora.dora,
        "bias": lora.bias,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,  # loading runs the init again, and others than this move the base
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": saved_modules(model, lora.train_also) or None,
    }


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha  # PEFT says it is whole, and some readers believe it


def lora_from_config(config: Mapping[str, Any], model: nn.Module) -> LoRA:
    """Return the LoRA that PEFT's fields describe for a network.

    Args:
        config: The fields.
        model: The network without the adapter.

    Raises:
        ValueError: If a field is missing that would have to be guessed, or asks for what cannot be computed.
    """
    refuse_missing(config, "r", "lora_alpha")
    # An empty dict or list, false and null mean the same in these fields.
    if strange := {key: config[key] for key in REFUSED if config.get(key)}:
        raise ValueError(f"load_adapter: {CONFIG} asks for {strange}, which cannot be computed yet.")
    heads, names = heads_and_targets(config, model)
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=as_globs(names),
        dropout=config.get("lora_dropout") or 0.0,
        rank_pattern=_resolved(config.get("rank_pattern"), names),
        alpha_pattern=_resolved(config.get("alpha_pattern"), names),
        scaling="rslora" if config.get("use_rslora") else "lora",
        dora=bool(config.get("use_dora")),
        train_also=as_globs(heads),
        bias=config.get("bias") or "none",
    )


def refuse_moved_base(config: Mapping[str, Any]) -> None:
    """Refuse a file whose initialisation changed the base that the adapter was trained on.

    Raises:
        ValueError: With the name of the initialisation.
    """
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_MOVES_THE_BASE):
        raise ValueError(
            f"load_adapter: init_lora_weights={start!r} moved the weights of the base that the adapter was trained on, so it "
            "does not fit the base at hand. Let PEFT convert it (path_initial_model_for_weight_conversion)."
        )


def _resolved(pattern: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """Return what a pattern of PEFT's gives each name: the first expression that matches its end counts."""
    found = {}
    for name in names:
        for key, value in (pattern or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                found[glob.escape(name)] = value
                break
    return found

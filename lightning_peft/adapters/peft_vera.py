"""VeRA in PEFT's ``adapter_config.json``, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.peft_matching import (
    CONFIG,
    as_globs,
    exactly,
    heads_and_targets,
    refuse_missing,
    saved_modules,
)
from lightning_peft.adapters.updates import updates_named
from lightning_peft.adapters.vera import VeRA


def vera_config(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Any]:
    """Return the fields of PEFT's ``VeraConfig`` for one VeRA of a network."""
    vera = attachment.adapters[name]
    assert isinstance(vera, VeRA)
    return {
        "peft_type": "VERA",
        "r": vera.rank,
        "target_modules": exactly(updates_named(model, name)),
        "projection_prng_key": vera.seed,
        "save_projection": True,
        "vera_dropout": vera.dropout,
        "d_initial": vera.d_initial,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": saved_modules(model, vera.train_also) or None,
    }


def vera_from_config(config: Mapping[str, Any], model: nn.Module) -> VeRA:
    """Return the VeRA that PEFT's fields describe for a network.

    Args:
        config: The fields.
        model: The network without the adapter.

    Raises:
        ValueError: If a field is missing that would have to be guessed, or asks for what cannot be computed.
    """
    refuse_missing(config, "r", "projection_prng_key")
    if (bias := config.get("bias") or "none") != "none":
        raise ValueError(f"load_adapter: {CONFIG} asks for bias={bias!r} beside VeRA, which cannot be computed yet.")
    heads, names = heads_and_targets(config, model)
    return VeRA(
        rank=config["r"],
        targets=as_globs(names),
        seed=config["projection_prng_key"],
        d_initial=config.get("d_initial") or 0.1,
        dropout=config.get("vera_dropout") or 0.0,
        train_also=as_globs(heads),
    )

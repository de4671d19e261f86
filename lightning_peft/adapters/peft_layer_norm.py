"""Trained normalisation layers in PEFT's ``adapter_config.json``, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.layer_norm_tuning import LayerNormTuning, is_norm
from lightning_peft.adapters.peft_matching import (
    as_globs,
    exactly,
    matches,
    matching_modules,
    refuse_missing,
    saved_modules,
)


def layer_norm_config(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Any]:
    """Return the fields of PEFT's ``LNTuningConfig``."""
    adapter = attachment.adapters[name]
    assert isinstance(adapter, LayerNormTuning)
    return {
        "peft_type": "LN_TUNING",
        "target_modules": exactly(dict.fromkeys(key.rpartition(".")[0] for key in adapter.select(model))),
        "exclude_modules": None,
        "modules_to_save": saved_modules(model, adapter.train_also) or None,
    }


def layer_norm_from_config(config: Mapping[str, Any], model: nn.Module) -> LayerNormTuning:
    """Return the tuning of normalisation layers that PEFT's fields describe.

    Raises:
        ValueError: If the targets are not given, none of them is there, or one is another kind of layer.
    """
    refuse_missing(config, "target_modules")
    targets, exclude = config["target_modules"], config.get("exclude_modules") or []
    modules = {path: module for path, module in model.named_modules() if matches(targets, path)}
    names = [path for path in modules if not matches(exclude, path)]
    if not names:
        raise ValueError(f"load_adapter: target_modules={targets!r} matches no layer of {type(model).__name__}.")
    if others := [path for path in names if not is_norm(modules[path])]:
        raise ValueError(f"load_adapter: {others[0]!r} is tuned as a normalisation layer and is none.")
    heads = matching_modules(model, config.get("modules_to_save"))
    return LayerNormTuning(targets=as_globs(names), train_also=as_globs(heads))

"""IA3 in PEFT's ``adapter_config.json``, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.ia3 import IA3
from lightning_peft.adapters.ia3_update import IA3Update
from lightning_peft.adapters.peft_matching import as_globs, exactly, heads_and_targets, refuse_missing, saved_modules
from lightning_peft.adapters.updates import updates_named


def ia3_config(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Any]:
    """Return the fields of PEFT's ``IA3Config`` for one IA3 of a network."""
    found = updates_named(model, name)
    feedforward = [path for path, update in found.items() if isinstance(update, IA3Update) and update.scales_input]
    return {
        "peft_type": "IA3",
        "target_modules": exactly(found),
        "exclude_modules": None,
        "feedforward_modules": exactly(feedforward),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": saved_modules(model, attachment.adapters[name].train_also) or None,
    }


def ia3_from_config(config: Mapping[str, Any], model: nn.Module) -> IA3:
    """Return the IA3 that PEFT's fields describe for a network.

    Args:
        config: The fields.
        model: The network without the adapter.

    Raises:
        ValueError: If a field is missing that would have to be guessed.
    """
    refuse_missing(config, "feedforward_modules")
    feedforward = config["feedforward_modules"]
    heads, names = heads_and_targets(config, model)
    return IA3(
        targets=as_globs(names),
        feedforward=as_globs(name for name in names if _is_feedforward(feedforward, name)),
        train_also=as_globs(heads),
    )


def _is_feedforward(chosen: str | list[str], name: str) -> bool:
    # Unlike a target, it need not begin at a dot: PEFT compares with the end of the name.
    return re.fullmatch(chosen, name) is not None if isinstance(chosen, str) else name.endswith(tuple(chosen))

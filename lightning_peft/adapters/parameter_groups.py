"""Named optimizer groups of an adapted network."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lightning_peft.adapters.lora import LoRALinear


def parameter_groups(module: nn.Module, *, lr: float, lora_plus: float = 1.0) -> list[dict[str, Any]]:
    """Group what trains for an optimizer, LoRA's ``B`` matrices with a learning rate of their own.

    ``lr_B = lora_plus * lr`` and ``lr`` for everything else. ``B`` starts at zero and ``A`` at random: with one rate for
    both, the rate that lets ``B`` learn moves ``A`` away from where it was drawn. The paper advises a ratio well above
    1. Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, section 4.

    Args:
        module: Any module; only parameters that require a gradient are grouped, each once.
        lr: Learning rate of everything but the ``B`` matrices.
        lora_plus: Factor for the ``B`` matrices; 1 is plain LoRA.

    Returns:
        The groups ``lora_B`` (if there are any) and ``other`` (likewise), each with ``params``, ``lr`` and ``name``;
        Lightning's ``LearningRateMonitor`` shows the names.

    Raises:
        ValueError: For a rate or factor that is not above 0, and if nothing trains.

    >>> from lightning_peft import LoRA, add_adapter
    >>> net = add_adapter(nn.Linear(8, 8), LoRA(rank=2))
    >>> [(group["name"], group["lr"]) for group in parameter_groups(net, lr=1e-3, lora_plus=16)]
    [('lora_B', 0.016), ('other', 0.001)]
    """
    for name, value in (("lr", lr), ("lora_plus", lora_plus)):
        if not 0 < value < math.inf:
            raise ValueError(f"parameter_groups: {name}={value!r} must be a number above 0.")
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALinear)]
    up = {id(parameter) for layer in layers for parameter in layer.lora_B.parameters()}
    training = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not training:
        raise ValueError(f"parameter_groups: no parameter of this {type(module).__name__} requires a gradient.")
    groups = [
        {"params": [p for p in training if id(p) in up], "lr": lora_plus * lr, "name": "lora_B"},
        {"params": [p for p in training if id(p) not in up], "lr": lr, "name": "other"},
    ]
    return [group for group in groups if group["params"]]

"""Named optimizer groups of an adapted network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.layer import AdaptedLayer
from lightning_peft.adapters.layer_kinds import AdaptedConv, AdaptedEmbedding, kind_of
from lightning_peft.adapters.lora_update import LoRAUpdate, ParametersLoRA


def parameter_groups(
    module: nn.Module, *, lr: float, lora_plus: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group what trains for an optimizer, LoRA's ``B`` matrices and each depth with a learning rate of their own.

    ``lr_B = lora_plus * lr`` and ``lr`` for everything else. ``B`` starts at zero and ``A`` at random: with one rate for
    both, the rate that lets ``B`` learn moves ``A`` away from where it was drawn. The paper advises a ratio well above
    1. Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, section 4.

    With ``layer_decay`` below 1, layer ``i`` of ``n``, counted from 0, has ``layer_decay ** (n - i)`` times its rate, what lies
    below the first layer ``layer_decay ** (n + 1)`` times, and what lies above the last (norm, head) the rate itself: layers near
    the input hold what is general and move least. Clark et al. 2020, "ELECTRA", arXiv:2003.10555, appendix B; counted as in
    BEiT, Bao et al. 2021, arXiv:2106.08254.

    The layers are the longest ``nn.ModuleList`` or ``nn.Sequential`` of modules of one class that lies in no other such stack.
    Below them lies what the module around them registers before them, and further out what is registered before them and
    holds an embedding or a convolution. **The trap:** all else is above, a second stack of layers (a decoder's) too.

    Args:
        module: Any module; only parameters that require a gradient are grouped, each once.
        lr: Learning rate of everything but the ``B`` matrices, at the top.
        lora_plus: Factor for the ``B`` matrices; 1 is plain LoRA.
        layer_decay: Factor from layer to layer, downwards; 1 is the same rate at every depth.

    Returns:
        The groups ``lora_B`` (if there are any) and ``other`` (likewise), each with ``params``, ``lr`` and ``name``; with
        ``layer_decay`` below 1 there are such groups for each depth: ``embeddings.other``, ``layer0.lora_B``, ``top.other``.
        Lightning's ``LearningRateMonitor`` shows the names.

    Raises:
        ValueError: For a rate or factor that is out of range, if nothing trains, and if ``layer_decay`` is below 1 and there
            is no stack of layers.

    >>> from lightning_peft import LoRA, add_adapter
    >>> net = add_adapter(nn.Linear(8, 8), LoRA(rank=2))
    >>> [(group["name"], group["lr"]) for group in parameter_groups(net, lr=1e-3, lora_plus=16)]
    [('lora_B', 0.016), ('other', 0.001)]
    """
    for name, value in (("lr", lr), ("lora_plus", lora_plus)):
        if not 0 < value < math.inf:
            raise ValueError(f"parameter_groups: {name}={value!r} must be a number above 0.")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"parameter_groups: layer_decay={layer_decay!r} must lie in (0, 1].")
    updates = [update for update in module.modules() if isinstance(update, LoRAUpdate | ParametersLoRA)]
    up = {id(p) for update in updates for name, p in update.named_parameters() if name.startswith("lora_B")}
    training = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not training:
        raise ValueError(f"parameter_groups: no parameter of this {type(module).__name__} requires a gradient.")
    count, depths = layer_depths(module) if layer_decay < 1 else (-1, {})
    groups = []
    for depth in range(-1, count + 1):
        prefix = {-1: "embeddings.", count: "top."}.get(depth, f"layer{depth}.") if layer_decay < 1 else ""
        here = [parameter for parameter in training if depths.get(id(parameter), count) == depth]
        rate = lr * layer_decay ** (count - depth)
        groups += [
            {"params": [p for p in here if id(p) in up], "lr": lora_plus * rate, "name": f"{prefix}lora_B"},
            {"params": [p for p in here if id(p) not in up], "lr": rate, "name": f"{prefix}other"},
        ]
    return [group for group in groups if group["params"]]


def layer_depths(module: nn.Module) -> tuple[int, Mapping[int, int]]:
    """Return how many layers a network has, and the depth of parameters by ``id``: -1 below the layers, 0, 1 ... in them.

    Raises:
        ValueError: If there is no stack of layers.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> count, depths = layer_depths(net)
    >>> count, depths[id(net[1].weight)]
    (2, 1)
    """
    name, stack = _longest_stack(module)
    layers = list(stack.children())
    below = {id(parameter): -1 for parameter in _below(module, name)}
    inside = {id(parameter): depth for depth, layer in enumerate(layers) for parameter in layer.parameters()}
    return len(layers), {**inside, **below}  # what is shared with an embedding is an embedding


def _longest_stack(module: nn.Module) -> tuple[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        nested = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(child, nn.ModuleList | nn.Sequential) and not nested and _alike(list(child)):
            found[name] = child
    if not found:
        raise ValueError(
            f"parameter_groups: this {type(module).__name__} has no nn.ModuleList or nn.Sequential of at least two modules of "
            "one class, so layer_decay cannot tell how deep a parameter lies. Leave it at 1."
        )
    return max(found.items(), key=lambda item: len(list(item[1].children())))


def _alike(layers: list[nn.Module]) -> bool:
    classes = {layer.base_class if isinstance(layer, AdaptedLayer) else type(layer) for layer in layers}
    return len(layers) > 1 and len(classes) == 1 and any(True for _ in layers[0].parameters())


def _below(module: nn.Module, stack: str) -> list[nn.Parameter]:
    """Return what lies below a stack: outwards from it, what each module around it registers before it."""
    found: list[nn.Parameter] = []
    path = stack.split(".") if stack else []
    for depth in reversed(range(len(path))):
        around = module.get_submodule(".".join(path[:depth]))
        nearest = not found
        found += around.parameters(recurse=False)
        for name, child in around.named_children():
            if name == path[depth]:
                break
            if nearest or _embeds(child):
                found += child.parameters()
    return found


def _embeds(module: nn.Module) -> bool:
    return any(kind_of(part) in (AdaptedEmbedding, AdaptedConv) for part in module.modules())

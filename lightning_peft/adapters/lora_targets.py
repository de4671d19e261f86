"""Which layers of a network an adapter goes to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.adapters.layer_kinds import (
    AdaptedConv,
    AdaptedConv1D,
    AdaptedEmbedding,
    AdaptedLinear,
    fused_parameters,
    kind_of,
    own_forward,
)
from lightning_peft.adapters.own_parameters import base_parameters
from lightning_peft.adapters.quantised import is_quantised
from lightning_peft.matching import match_names
from lightning_peft.tied import tied_weights

LINEAR = (AdaptedLinear, AdaptedConv1D)


@dataclass(frozen=True)
class Target:
    """One thing to adapt.

    Args:
        host: Dotted name of the module.
        module: The module.
        parameters: Names of the parameters that are updated, relative to it.
        width: Inputs of the linear map.
        out: Outputs of it.
    """

    host: str
    module: nn.Module
    parameters: tuple[str, ...]
    width: int
    out: int

    @property
    def on_meta(self) -> bool:
        """Whether the weights have no values yet."""
        return any(self.module.get_parameter(path).is_meta for path in self.parameters)

    def refusal(self, *, rank: int, dora: bool, init: str) -> str | None:
        """Say why it cannot carry this LoRA, None if it can."""
        kind, quantised = kind_of(self.module), is_quantised(self.module)
        if kind is not None and own_forward(self.module) and not quantised:
            return f"is a {type(self.module).__name__}, a layer with a forward of its own."
        groups = (
            self.module.groups
            if kind is AdaptedConv and isinstance(self.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            else 1
        )
        if rank % groups:
            return f"has {groups} groups, so its rank, {rank}, must be a multiple of that."
        if init == "orthogonal" and rank % 2:
            return f"has rank {rank}; init='orthogonal' takes half for A and half for B, so it must be even."
        if dora and (kind is None or quantised or groups > 1):
            return "cannot have dora=True: it is quantised, grouped, or read without being called."
        if init != "default" and (kind not in LINEAR or (quantised and init != "eva")):
            return f"cannot start with init={init!r}: that needs the weight matrix of a linear layer."
        return None


def adaptable(model: nn.Module) -> dict[str, Target]:
    """Return everything in a network that a low-rank update can go to, by dotted name."""
    found: dict[str, Target] = {}
    inside: set[str] = set()  # projections that an attention reads without calling them
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside.add(f"{name}.out_proj".lstrip("."))
            if module._qkv_same_embed_dim:
                wide = module.embed_dim
                found[name] = Target(name, module, ("in_proj_weight", "out_proj.weight"), wide, wide)
        elif kind_of(module) is not None:
            found[name] = Target(name, module, ("weight",), *_sizes(module))
    for name, module, parameter in fused_parameters(model):
        host = name.rpartition(".")[0]
        _, out, width = module.get_parameter(parameter).shape
        found[name] = Target(host, module, (parameter,), width, out)
    return {name: target for name, target in found.items() if name not in inside}


def _sizes(layer: Any) -> tuple[int, int]:
    if kind_of(layer) is AdaptedEmbedding:
        return layer.num_embeddings, layer.embedding_dim
    if kind_of(layer) is AdaptedConv:
        return layer.weight[0].numel() * layer.groups, layer.out_channels
    if kind_of(layer) is AdaptedConv1D:
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


def select_targets(
    model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str], *, owner: str
) -> dict[str, Target]:
    """Return the targets that globs choose.

    Args:
        model: The network.
        targets: Globs over names of layers, or ``"all-linear"``.
        exclude: Globs of layers to leave out.
        owner: Whose targets they are, for the error messages.

    Raises:
        ValueError: If a glob matches nothing, nothing is left, or a layer shares its weight with another module.
    """
    known = adaptable(model)
    if targets == "all-linear":
        bypassed = heads_of(model) | output_embeddings(model)
        chosen = [name for name, target in known.items() if kind_of(target.module) in LINEAR and name not in bypassed]
    else:
        chosen = match_names(known, targets, owner=f"{owner}: target", kind="layer")
    left_out = match_names(known, exclude, owner=f"{owner}: exclude", kind="layer")
    selected = {name: known[name] for name in chosen if name not in left_out}
    if not selected:
        raise ValueError(
            f"{owner}: targets={targets!r} without exclude={list(exclude)!r} leave none of the {len(known)} layers of "
            f"this {type(model).__name__} that can be adapted."
        )
    if tied := tied_weights(model).keys() & selected.keys():
        raise ValueError(
            f"{owner}: {sorted(tied)} share their weight with other modules, so merging would change those too. "
            "Leave them out with exclude=."
        )
    return selected


def biases(model: nn.Module, which: str, targets: Mapping[str, Target]) -> list[str]:
    """Return the biases of the network that train beside the updates.

    Args:
        model: The network.
        which: ``"none"``, ``"all"`` or ``"lora_only"``, those of the targets.
        targets: What the updates go to.
    """
    found = [name for name in base_parameters(model) if name.rpartition(".")[2].endswith("bias")]
    if which == "all":
        return found
    return [name for name in found if which == "lora_only" and _host_of(name, targets.values())]


def _host_of(name: str, targets: Collection[Target]) -> bool:
    return any(name.startswith(f"{target.host}." if target.host else "") for target in targets)


def check_apart(also: Sequence[str], targets: Mapping[str, Target], *, owner: str) -> None:
    """Refuse a parameter that would get an update and train itself.

    Raises:
        ValueError: With the name of the first one.
    """
    updated = {f"{target.host}.{path}".lstrip(".") for target in targets.values() for path in target.parameters}
    if both := sorted(updated.intersection(also)):
        raise ValueError(
            f"{owner}: train_also covers {both[0]!r}, which has an update already. Leave it out with exclude=."
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every ``nn.Linear`` and transformers ``Conv1D`` of a network by its dotted name."""
    return {name: module for name, module in model.named_modules() if kind_of(module) in LINEAR}


def output_embeddings(model: nn.Module) -> set[str]:
    """Return the linear layers that share their weight with an embedding."""
    linear, modules = linear_layers(model), dict(model.named_modules())
    return {
        name
        for name, others in tied_weights(model).items()
        if name in linear and any(isinstance(modules[other], nn.Embedding) for other in others)
    }


def heads_of(model: nn.Module) -> set[str]:
    """Return the linear layers of a transformers model outside its base model: output embedding, classifier head.

    Empty for other networks. transformers is not imported: its models say what their base is.
    """
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    return {
        name
        for name, layer in linear_layers(model).items()
        if layer is output or (isinstance(base, nn.Module) and not name.startswith(f"{prefix}."))
    }

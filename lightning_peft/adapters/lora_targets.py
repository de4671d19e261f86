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


def own_parameters(model: nn.Module, globs: Sequence[str], bias: str, targets: Mapping[str, Target]) -> list[str]:
    """Return the parameters of the network itself that train beside the updates.

    Args:
        model: The network.
        globs: Over names of modules or parameters; a module stands for all its parameters.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.
        targets: What the updates go to.

    Raises:
        ValueError: If a glob matches nothing, or covers a layer that is a target.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    # A weight that several modules share goes by its first name: it trains in all of them and stays shared.
    parameters = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    modules = {path for name in parameters for path in _and_parents(name.rpartition(".")[0])} - {""}
    named = match_names(
        sorted(modules | parameters.keys()), globs, owner="LoRA: train_also", kind="module or parameter"
    )
    chosen = {
        kept for name, kept in parameters.items() if name in named or any(name.startswith(f"{path}.") for path in named)
    }
    if both := sorted(chosen & {f"{t.host}.{path}".lstrip(".") for t in targets.values() for path in t.parameters}):
        raise ValueError(
            f"LoRA: train_also covers {both[0]!r}, which has an update already. Leave it out with exclude=."
        )
    if bias == "all":
        chosen |= {name for name in parameters if name.rpartition(".")[2].endswith("bias")}
    elif bias == "lora_only":
        chosen |= {name for name in parameters if name.endswith("bias") and _host_of(name, targets.values())}
    return [name for name in first.values() if name in chosen]


def _and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _host_of(name: str, targets: Collection[Target]) -> bool:
    return any(name.startswith(f"{target.host}." if target.host else "") for target in targets)


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

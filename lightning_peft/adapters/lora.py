"""LoRA: train a low-rank update beside a frozen linear layer.

``y = W x + b + (alpha / rank) B A x`` with ``A`` of shape ``(rank, in)`` and ``B`` of shape ``(out, rank)``.
Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.layer import AdaptedLayer, MasterParameters, master_dtype
from lightning_peft.matching import match_names
from lightning_peft.tied import tied_weights


@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank updates on linear layers, everything else frozen.

    ``B`` starts at zero, so adding the adapter changes no output; ``A`` starts Kaiming-uniform, within ``±1/sqrt(in)``.
    On a bfloat16 or float16 base both stay float32 and are cast at each use.

    **The trap:** less capacity is no protection. LoRA moves less than full fine-tuning, and forgets about as much for
    the distance that it moves; put ``ReplayMixing`` beside it.

    Args:
        rank: Rank of the update, at most the smaller side of every target.
        alpha: The update is scaled by ``alpha / rank``, so that a change of rank needs no new learning rate.
        targets: Globs over module names relative to the adapted network, or ``"all-linear"``: every linear layer
            except an output embedding that shares its weight with the input's, and except the output embedding and the
            head of a transformers model.
        exclude: Globs of layers to leave out.
        dropout: Probability of dropping an input of the update during training. It follows the layer's train or eval
            mode, and networks of ``from_pretrained`` come in eval mode: call ``train()`` on them if dropout is to act.

    Raises:
        ValueError: For a value out of range, here; for targets that do not fit a network, when it is adapted.

    >>> LoRA(rank=4, targets=["*.query", "*.value"]).scale
    4.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Literal["all-linear"] | list[str] | tuple[str, ...] = "all-linear"
    exclude: list[str] | tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA: rank={self.rank!r} must be a whole number of at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout={self.dropout!r} must lie in [0, 1).")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"LoRA: alpha={self.alpha!r} must be a finite number other than 0.")
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            raise ValueError(f"LoRA: targets={self.targets!r} must be 'all-linear' or a list of globs.")
        if isinstance(self.exclude, str):
            raise ValueError(f"LoRA: exclude={self.exclude!r} must be a list of globs.")
        for name in ("targets", "exclude"):  # equal and hashable, whichever sequence they came as
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value))

    @property
    def scale(self) -> float:
        """The factor ``alpha / rank`` of the update."""
        return self.alpha / self.rank

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        layers = self.select(model)
        self._check(layers)
        for layer in layers.values():
            LoRALinear.adapt(layer, self, name)
        return [f"{layer}.{matrix}.{name}".lstrip(".") for layer in layers for matrix in ("lora_A", "lora_B")]

    @override
    def refusal(self, model: nn.Module) -> str | None:
        try:
            self.select(model)
        except ValueError as error:
            return str(error)
        return None

    def select(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Return the layers of ``model`` that this adapter would adapt, by name.

        Raises:
            ValueError: If a glob matches no linear layer, or a layer cannot carry the adapter.
        """
        linear = linear_layers(model)
        if self.targets == "all-linear":
            bypassed = heads_of(model) | output_embeddings(model) | set(attention_projections(model))
            chosen = [name for name in linear if name not in bypassed]
        else:
            chosen = match_names(linear, self.targets, owner="LoRA: target", kind="linear layer")
        left_out = match_names(linear, self.exclude, owner="LoRA: exclude", kind="linear layer")
        layers = {name: linear[name] for name in chosen if name not in left_out}
        if not layers:
            raise ValueError(
                f"LoRA: targets={self.targets!r} without exclude={list(self.exclude)!r} leave none of the "
                f"{len(linear)} linear layers of this {type(model).__name__}."
            )
        if tied := tied_weights(model).keys() & layers.keys():
            raise ValueError(
                f"LoRA: {sorted(tied)} share their weight with other modules, so merging would change those too. "
                "Leave them out with exclude=."
            )
        for name in attention_projections(model):
            if name in layers:
                raise ValueError(
                    f"LoRA: {name!r} belongs to an nn.MultiheadAttention, which reads its weight without calling it, "
                    "so an adapter there would do nothing. Leave it out with exclude=."
                )
        return layers

    def _check(self, layers: Mapping[str, nn.Linear]) -> None:
        for name, layer in layers.items():
            if type(layer) not in (nn.Linear, NonDynamicallyQuantizableLinear):
                raise ValueError(
                    f"LoRA: {name!r} is a {type(layer).__name__}, a subclass of nn.Linear with behaviour of its own. "
                    "Leave it out with exclude=."
                )
        sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
        small = {
            name: f"{name!r} ({wide} -> {high})" for name, (wide, high) in sizes.items() if self.rank > min(wide, high)
        }
        if small:
            raise ValueError(
                f"LoRA: rank={self.rank} is above the size of {', '.join(small.values())}. "
                f"Lower the rank, or leave out with exclude={list(small)}."
            )


class LoRALinear(AdaptedLayer, nn.Linear):
    """A linear layer plus low-rank updates; made in place from an existing layer by :meth:`adapt`."""

    lora_A: MasterParameters  # noqa: N815 - PEFT's names, and the paper's
    lora_B: MasterParameters  # noqa: N815
    scales: dict[str, float]
    dropout: float

    @classmethod
    def adapt(cls, layer: nn.Linear, lora: LoRA, name: str) -> None:
        """Turn ``layer`` itself into a LoRALinear; no Parameter of it is touched."""
        base_class = type(layer)
        layer.__class__ = cls
        assert isinstance(layer, LoRALinear)
        layer.become_adapted(base_class)
        device, dtype = layer.weight.device, master_dtype(layer.weight.dtype)
        down = nn.Parameter(torch.empty(lora.rank, layer.in_features, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        up = nn.Parameter(torch.zeros(layer.out_features, lora.rank, device=device, dtype=dtype))
        layer.lora_A, layer.lora_B = MasterParameters({name: down}), MasterParameters({name: up})
        layer.scales, layer.dropout = {name: lora.scale}, lora.dropout

    @override
    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled and self.pristine is not None:
            return F.linear(input, self.pristine, self.bias)
        output = F.linear(input, self.weight, self.bias)
        if self.merged or not self.enabled:
            return output
        for name, scale in self.scales.items():
            dropped = F.dropout(input, self.dropout, self.training)
            low = F.linear(dropped, self.lora_A[name].to(input.dtype))
            # The scale rides along in the addition: no pass of its own over the output.
            output = torch.add(output, F.linear(low, self.lora_B[name].to(input.dtype)), alpha=scale)
        return output

    @override
    def merged_weight(self) -> Tensor:
        weight: Tensor = self.weight.to(master_dtype(self.weight.dtype))
        for name, scale in self.scales.items():
            weight = weight + scale * (self.lora_B[name] @ self.lora_A[name]).to(weight.dtype)
        return weight.to(self.weight.dtype)

    @override
    def drop_adapter(self) -> None:
        del self.lora_A, self.lora_B, self.scales, self.dropout


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every ``nn.Linear`` of a network by its dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def attention_projections(model: nn.Module) -> Mapping[str, nn.Linear]:
    """Return the linear layers inside ``nn.MultiheadAttention``, whose forward never calls them."""
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = {f"{attention}.out_proj".lstrip(".") for attention in attentions}
    return {name: layer for name, layer in linear_layers(model).items() if name in inside}


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

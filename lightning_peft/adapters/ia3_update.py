"""IA3 on one layer: its vector, the layer's output with it, and the weights that it amounts to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.layer_kinds import AdaptedConv, AdaptedLinear, kind_of
from lightning_peft.adapters.lora_targets import Target
from lightning_peft.adapters.updates import Update, master_dtype


class IA3Update(Update):
    """``l * layer(x)`` or, for ``scales_input``, ``layer(l * x)``.

    Args:
        layer: An adapted layer.
        target: Its sizes.
        scales_input: Whether the vector is of shape ``(in,)`` and scales the input; else it is of shape ``(out,)``.
    """

    def __init__(self, layer: Any, target: Target, *, scales_input: bool) -> None:
        super().__init__()
        self.scales_input = scales_input
        inputs = layer.in_channels if kind_of(layer) is AdaptedConv else target.width
        size = inputs if scales_input else target.out
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": master_dtype(layer.weight.dtype)}
        self.ia3_l = nn.Parameter(torch.ones(size, **like))

    @override
    def forward(self, layer: AdaptedLinear, input: Tensor) -> Tensor:
        if self.scales_input:
            return layer.plain(input * layer.along_inputs(self.ia3_l).to(input.dtype))
        output = layer.plain(input)
        return output * layer.along_channels(self.ia3_l).to(output.dtype)

    @override
    def merged_values(self, layer: Any) -> dict[str, Tensor]:
        wide = layer.matrix().to(self.ia3_l.dtype)
        if self.scales_input:
            # A convolution in groups gives each group of outputs its own inputs, and an input all taps of its kernel.
            groups = getattr(layer, "groups", 1)
            blocks = wide.reshape(groups, len(wide) // groups, len(self.ia3_l) // groups, -1)
            wide = (blocks * self.ia3_l.view(groups, 1, -1, 1)).reshape(wide.shape)
            return {"weight": layer.oriented(wide).to(layer.weight.dtype)}
        values = {"weight": layer.oriented(wide * self.ia3_l[:, None]).to(layer.weight.dtype)}
        if layer.bias is not None:
            values["bias"] = (layer.bias.to(wide.dtype) * self.ia3_l).to(layer.bias.dtype)
        return values

"""LoRA on one layer: its matrices, the layer's output with them, and the weight that they amount to."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.layer_kinds import (
    AdaptedConv,
    AdaptedConv1D,
    AdaptedEmbedding,
    AdaptedLinear,
    row_norms,
)
from lightning_peft.adapters.low_rank import low_rank_linear
from lightning_peft.adapters.updates import Update, held, master_dtype
from lightning_peft.in_place import in_place_of


class LoRAUpdate(Update):
    """``W + scale * B A`` seen as matrices, ``A`` of shape ``(rank, in)`` and ``B`` of shape ``(out, rank)``.

    With a start other than zero, the update is ``B A - B0 A0``, computed as ``B (A - A0) + (B - B0) A0``: exactly
    nothing at first, whatever the rounding, and no large terms that cancel.
    """

    lora_A: nn.Parameter  # noqa: N815 - PEFT's names, and the paper's
    lora_B: nn.Parameter  # noqa: N815
    lora_magnitude_vector: nn.Parameter | None
    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815
    input_dropout: ClassVar[bool] = True

    def __init__(self, layer: Any, *, rank: int, scale: float, dropout: float = 0.0, dora: bool = False) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, dropout
        matrix = layer.matrix()
        self.allocate(layer, {"device": layer.weight.device, "dtype": master_dtype(layer.weight.dtype)})
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        magnitude = (
            nn.Parameter(torch.empty(len(matrix), device=matrix.device, dtype=self.lora_A.dtype)) if dora else None
        )
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.base_loaded(layer)

    def allocate(self, layer: Any, like: dict[str, Any]) -> None:
        """Make ``A``, Kaiming-uniform within ``±1/sqrt(in)``, and ``B``, zero."""
        out, width = layer.matrix().shape
        self.lora_A = nn.Parameter(torch.empty(self.rank, width, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B = nn.Parameter(torch.zeros(out, self.rank, **like))

    def start_at(self, down: Tensor, up: Tensor) -> None:
        """Begin with these matrices, and count the update from there."""
        with torch.no_grad():
            self.lora_A.copy_(down)
            self.lora_B.copy_(up)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return two matrices ``(k, in)`` and ``(out, k)`` whose product is the unscaled update."""
        a: Tensor = held(self, "lora_A")
        b: Tensor = held(self, "lora_B")
        start: Tensor | None = held(self, "start_A")
        if a.ndim > 2:  # of a convolution
            a, b = a.flatten(1), b.flatten(1)
        if start is None or self.start_B is None:
            return a, b
        return torch.cat([a - start, start]), torch.cat([b, b - self.start_B], 1)

    def gain(self, layer: Any) -> Tensor | None:
        """Return ``m / ||W + scale B A|| - 1`` for every output channel, None without DoRA.

        The norm is a constant to the gradient (Liu et al. 2024, arXiv:2402.09353, section 4.3). It is not taken of the sum, which
        would have to be built: ``||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B``, row by row, reads ``W`` once.
        """
        magnitude: Tensor | None = held(self, "lora_magnitude_vector")
        return None if magnitude is None else magnitude / self.norms(layer) - 1

    @torch.no_grad()
    def norms(self, layer: Any) -> Tensor:
        """Return the norm of every row of ``W + scale * B A``."""
        matrix, (a, b) = layer.matrix(), self.factors()
        square = row_norms(matrix, dtype=a.dtype).square_()
        cross = (matrix @ a.to(matrix.dtype).T).to(a.dtype)
        inner = torch.addmm(cross, b, a @ a.T, beta=2, alpha=self.scale)
        return square.add_(inner.mul_(b).sum(1), alpha=self.scale).clamp_min_(0).sqrt_()

    @override
    @torch.no_grad()
    def base_loaded(self, layer: Any) -> None:
        if self.lora_magnitude_vector is not None and not self.lora_magnitude_vector.is_meta:
            self.lora_magnitude_vector.copy_(self.norms(layer))

    @override
    def forward(self, layer: AdaptedLinear, input: Tensor) -> Tensor:
        low = self.low_rank(layer, F.dropout(input, self.dropout, self.training and self.input_dropout))
        output = torch.add(layer.plain(input), low, alpha=self.scale)
        gain = self.gain(layer)
        if gain is None:
            return output
        gain = layer.along_channels(gain).to(output.dtype)
        bias = None if layer.bias is None else layer.along_channels(layer.bias).to(output.dtype)
        return torch.addcmul(output, output if bias is None else output - bias, gain)

    def low_rank(self, layer: Any, input: Tensor) -> Tensor:
        """Return the unscaled update of the layer's output."""
        raise NotImplementedError

    def delta(self, layer: Any) -> Tensor:
        """Return the scaled update of the weight, in its layout and in the adapter's dtype."""
        a, b = self.factors()
        delta: Tensor = layer.oriented(self.scale * (b @ a))
        return delta

    @override
    def merged_values(self, layer: Any) -> dict[str, Tensor]:
        (a, b), gain = self.factors(), self.gain(layer)
        wide = layer.matrix().to(a.dtype) + self.scale * (b @ a)
        if gain is not None:
            wide = wide * (1 + gain)[:, None]
        return {"weight": layer.oriented(wide).to(layer.weight.dtype)}


class LinearLoRA(LoRAUpdate):
    """LoRA on ``nn.Linear`` and transformers' ``Conv1D``."""

    @override
    def forward(self, layer: AdaptedLinear, input: Tensor) -> Tensor:
        if layer.base_class.__module__.startswith("bitsandbytes"):  # its forward is its own
            return super().forward(layer, input)
        a, b = self.factors()
        dropout = self.dropout if self.training else 0.0
        return low_rank_linear(
            input, layer.matrix(), held(layer, "bias"), a, b, scale=self.scale, dropout=dropout, gain=self.gain(layer)
        )

    @override
    def low_rank(self, layer: Any, input: Tensor) -> Tensor:
        a, b = self.factors()
        return F.linear(F.linear(input, a.to(input.dtype)), b.to(input.dtype))


class ConvLoRA(LoRAUpdate):
    """LoRA on ``nn.Conv1d/2d/3d``: a convolution with ``rank`` outputs, then one of kernel 1.

    With groups the first is ungrouped, as in PEFT's files, and the update is no convolution of the layer's kind.
    """

    @override
    def allocate(self, layer: AdaptedConv, like: dict[str, Any]) -> None:
        wide = layer.weight.shape[1] * layer.groups
        self.lora_A = nn.Parameter(torch.empty(self.rank, wide, *layer.kernel_size, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        ones = [1] * len(layer.kernel_size)
        self.lora_B = nn.Parameter(torch.zeros(len(layer.weight), self.rank // layer.groups, *ones, **like))

    @override
    def low_rank(self, layer: Any, input: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        padding = layer.padding
        if layer.padding_mode != "zeros":
            input, padding = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        low = convolve(input, self.lora_A.to(input.dtype), None, layer.stride, padding, layer.dilation)
        return convolve(low, self.lora_B.to(low.dtype), groups=layer.groups)

    @override
    def merged_values(self, layer: Any) -> dict[str, Tensor]:
        if layer.groups > 1:
            raise ValueError(
                f"merge_adapter: a convolution in {layer.groups} groups cannot hold its LoRA, which mixes the groups. "
                "Run it unmerged."
            )
        return super().merged_values(layer)


class EmbeddingLoRA(LoRAUpdate):
    """LoRA on ``nn.Embedding``: ``A`` of shape ``(rank, num)`` starts at zero, ``B`` of shape ``(dim, rank)`` normal."""

    input_dropout = False

    @override
    def allocate(self, layer: Any, like: dict[str, Any]) -> None:
        dim, num = layer.matrix().shape
        self.lora_A = nn.Parameter(torch.zeros(self.rank, num, **like))
        self.lora_B = nn.Parameter(torch.randn(dim, self.rank, **like))

    @override
    def low_rank(self, layer: Any, input: Tensor) -> Tensor:
        rows = F.embedding(
            input, self.lora_A.T, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq, sparse=layer.sparse
        )
        return F.linear(rows, self.lora_B).to(layer.weight.dtype)


class ParametersLoRA(Update):
    """LoRA on parameters that a module reads by itself: ``nn.MultiheadAttention``, fused experts.

    The module runs with ``W + scale * B A`` in the place of each. Of experts ``(E, out, in)`` the update of expert ``e`` is
    ``B.view(out, r, E)[:, :, e] A.view(E, r, in)[e]``.

    Args:
        module: The module.
        paths: Names of the parameters, relative to it.
        rank: Rank of every update.
        scale: Factor of every update.
    """

    rows = False

    def __init__(self, module: nn.Module, paths: list[str], *, rank: int, scale: float) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.paths = {path.replace(".", "_"): path for path in paths}
        self.transposed = bool(getattr(module, "is_transposed", False))
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for key, path in self.paths.items():
            weight = module.get_parameter(path)
            *experts, out, width = weight.shape
            out, width = (width, out) if experts and self.transposed else (out, width)
            count = experts[0] if experts else 1
            like: dict[str, Any] = {"device": weight.device, "dtype": master_dtype(weight.dtype)}
            self.lora_A[key] = nn.Parameter(torch.empty(count * rank, width, **like))
            nn.init.kaiming_uniform_(self.lora_A[key], a=math.sqrt(5))
            self.lora_B[key] = nn.Parameter(torch.zeros(out, rank * count, **like))

    def updated(self, module: nn.Module) -> dict[str, Tensor]:
        """Return every parameter with its update, by its name in the module."""
        values = {}
        for key, path in self.paths.items():
            weight, a, b = module.get_parameter(path), self.lora_A[key], self.lora_B[key]
            if weight.ndim == 2:
                delta = b @ a
            else:
                count = len(weight)
                a, b = a.view(count, self.rank, -1), b.view(-1, self.rank, count)
                delta = torch.einsum("ore,eri->eio" if self.transposed else "ore,eri->eoi", b, a)
            values[path] = torch.add(weight.to(delta.dtype), delta, alpha=self.scale).to(weight.dtype)
        return values

    @override
    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        with in_place_of(module, self.updated(module)):
            return module.base_class.forward(module, *args, **kwargs)

    @override
    def merged_values(self, layer: Any) -> dict[str, Tensor]:
        return self.updated(layer)


UPDATES: dict[type[AdaptedLinear], type[LoRAUpdate]] = {
    AdaptedLinear: LinearLoRA,
    AdaptedConv1D: LinearLoRA,
    AdaptedConv: ConvLoRA,
    AdaptedEmbedding: EmbeddingLoRA,
}
"""The update of every kind of layer."""

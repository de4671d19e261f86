"""VeRA on one layer: its two vectors, and the random matrices that it shares with all others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.layer_kinds import AdaptedLinear
from lightning_peft.adapters.lora_targets import Target
from lightning_peft.adapters.low_rank import low_rank_linear
from lightning_peft.adapters.quantised import is_quantised
from lightning_peft.adapters.updates import Update, master_dtype


class Projections(nn.Module):
    """The shared matrices ``A`` and ``B``, Kaiming-uniform from a generator of their own.

    Args:
        rank: Rank of the updates.
        width: Inputs of the widest layer.
        out: Outputs of the layer that has most.
        seed: Seed of the generator.

    >>> a, b = Projections(2, 6, 5, seed=0).sliced(4, 3)
    >>> a.shape, b.shape
    (torch.Size([2, 4]), torch.Size([3, 2]))
    """

    vera_A: Tensor  # noqa: N815 - PEFT's names, and the paper's
    vera_B: Tensor  # noqa: N815

    def __init__(self, rank: int, width: int, out: int, seed: int) -> None:
        super().__init__()
        self.shape = (rank, width, out)
        self.seed = seed
        down, up = self.drawn()
        self.register_buffer("vera_A", down, persistent=False)
        self.register_buffer("vera_B", up, persistent=False)

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Return the matrices, drawn again: float32 on the CPU, ``A`` first, as PEFT draws them."""
        rank, width, out = self.shape
        generator = torch.Generator("cpu").manual_seed(self.seed)
        matrices = []
        for shape in ((rank, width), (out, rank)):
            bound = math.sqrt(6 / shape[1])
            empty = torch.empty(shape, dtype=torch.float32, device="cpu")
            matrices.append(empty.uniform_(-bound, bound, generator=generator))
        return matrices[0], matrices[1]

    def sliced(self, width: int, out: int) -> tuple[Tensor, Tensor]:
        """Return what a layer of that size uses of ``A`` and of ``B``."""
        return self.vera_A[:, :width], self.vera_B[:out]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        on_meta = self.vera_A.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if on_meta and not self.vera_A.is_meta:  # to_empty() gave memory without values, and no checkpoint has them
            for mine, drawn in zip((self.vera_A, self.vera_B), self.drawn(), strict=True):
                mine.copy_(drawn)
        return self


class VeRAUpdate(Update):
    """``W + diag(b) B diag(d) A``, of which only ``b`` and ``d`` are its own.

    Args:
        layer: An adapted linear layer.
        target: Its sizes.
        projections: The shared matrices.
        d_initial: Where ``d`` starts; ``b`` starts at zero.
        dropout: Probability of dropping an input of the update.
    """

    projections: Projections
    """On one update of the network only: the place where the shared matrices are registered."""

    def __init__(
        self, layer: Any, target: Target, projections: Projections, *, d_initial: float, dropout: float
    ) -> None:
        super().__init__()
        self.width, self.out, self.dropout = target.width, target.out, dropout
        # In a tuple a module is not registered: it would move once per layer, and be listed under every layer's name.
        self.shared = (projections,)
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": master_dtype(layer.weight.dtype)}
        self.vera_lambda_b = nn.Parameter(torch.zeros(target.out, **like))
        self.vera_lambda_d = nn.Parameter(torch.full((projections.shape[0],), d_initial, **like))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``diag(b) B diag(d)``: both vectors in one factor, so that the other takes no gradient."""
        down, up = self.shared[0].sliced(self.width, self.out)
        dtype = self.vera_lambda_b.dtype
        return cast("Tensor", down.to(dtype)), self.vera_lambda_b[:, None] * (up.to(dtype) * self.vera_lambda_d)

    @override
    def forward(self, layer: AdaptedLinear, input: Tensor) -> Tensor:
        (down, up), dropout = self.factors(), self.dropout if self.training else 0.0
        if is_quantised(layer):  # its forward is its own
            low = F.linear(F.dropout(input, dropout), down.to(input.dtype))
            return layer.plain(input) + F.linear(low, up.to(low.dtype))
        return low_rank_linear(input, layer.matrix(), layer.bias, down, up, scale=1.0, dropout=dropout)

    @override
    def merged_values(self, layer: Any) -> dict[str, Tensor]:
        down, up = self.factors()
        wide = layer.matrix().to(up.dtype) + up @ down
        return {"weight": layer.oriented(wide).to(layer.weight.dtype)}

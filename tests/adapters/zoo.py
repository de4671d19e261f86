"""Small networks with every kind of layer that can be adapted, in float64, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """One network.

    Args:
        build: Makes it.
        inputs: Makes what it is called with.
        targets: Layers to adapt.
        parameters: Fused parameters to adapt, for PEFT's ``target_parameters``.
            no: What it cannot have: a method, an operation, or PEFT's for comparison.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    targets: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    no: frozenset[str] = field(default=frozenset())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Two experts as transformers stores them, and one soft gate."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        if transposed:
            self.is_transposed = True
        self.up = nn.Parameter(torch.randn(2, 6, 12) if transposed else torch.randn(2, 12, 6))
        self.down = nn.Parameter(torch.randn(2, 12, 6) if transposed else torch.randn(2, 6, 12))

    def forward(self, x):
        form = "bi,eio->beo" if hasattr(self, "is_transposed") else "bi,eoi->beo"
        hidden = torch.tanh(torch.einsum(form, x, self.up))
        form = "beo,eoi->bi" if hasattr(self, "is_transposed") else "beo,eio->bi"
        return torch.einsum(form, hidden, self.down)


class EmbeddingConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(11, 6)
        self.conv1d = Conv1D(7, 6)
        self.head = nn.Linear(7, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.conv1d(self.embed(ids))))


def conv(dim: int, groups: int = 1, **options) -> nn.Module:
    kind, pool = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1], nn.Flatten()
    return nn.Sequential(kind(4, 4, 3, padding=1, groups=groups, **options), nn.Tanh(), kind(4, 4, 1), pool)


def wide(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


ZOO = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)), wide(5, 6), ("0", "2")),
    "embedding and Conv1D": Case(EmbeddingConv1D, lambda: torch.randint(11, (5, 3)), ("embed", "conv1d")),
    "conv1d": Case(lambda: conv(1), wide(2, 4, 5), ("0", "2")),
    "conv2d": Case(lambda: conv(2, stride=2), wide(2, 4, 5, 5), ("0", "2")),
    "conv2d reflecting, dilated": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"), nn.Flatten()),
        wide(2, 4, 5, 5),
        ("0",),
        no=frozenset({"peft"}),
    ),
    # PEFT 0.21 fails to merge a Conv3d of kernel 1, which it takes for a Conv2d.
    "conv3d": Case(lambda: conv(3), wide(2, 4, 3, 3, 3), ("0", "2"), no=frozenset({"peft merge"})),
    "grouped conv2d": Case(lambda: conv(2, groups=2), wide(2, 4, 5, 5), ("0",), no=frozenset({"merge", "dora", "ia3"})),
    "attention": Case(Attention, wide(2, 4, 8), ("attention",), no=frozenset({"dora", "ia3", "rows", "dropout"})),
    "experts": Case(
        lambda: nn.Sequential(Experts(), nn.Linear(6, 2)),
        wide(5, 6),
        (),
        ("0.up", "0.down"),
        no=frozenset({"dora", "ia3", "rows", "dropout"}),
    ),
    "transposed experts": Case(
        lambda: nn.Sequential(Experts(transposed=True), nn.Linear(6, 2)),
        wide(5, 6),
        (),
        ("0.up",),
        no=frozenset({"dora", "ia3", "rows", "dropout"}),
    ),
}


def build(case: Case) -> nn.Module:
    """The network in float64, in eval mode."""
    return case.build().double().eval()


def stir(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Move everything that trains away from where it started."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


def three_steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Train what trains, as both libraries would be told to."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

"""Pooling that learns which tokens count."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AttentionPool(nn.Module):
    """Average tokens with weights of a learned query: ``sum_t softmax(q . h_t / sqrt(width)) h_t``.

    The first layer of a head, ``nn.Sequential(AttentionPool(width), nn.Linear(width, classes))``. The query starts at zero, which
    is the mean over the tokens. Yang et al. 2016, "Hierarchical Attention Networks", section 2.2, without its inner layer.

    Args:
        width: Of a token.

    >>> AttentionPool(1)((torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))).tolist()
    [[2.0]]
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """Pool ``(rows, tokens, width)`` under a mask, ``(rows, tokens)``, to ``(rows, width)``."""
        states, mask = tokens
        scores = states @ self.query / states.shape[-1] ** 0.5
        weights = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
        pooled: Tensor = (weights.unsqueeze(-1) * states).sum(-2)
        return pooled

"""Gradients that were computed outside of autograd's reach, handed to automatic optimization."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def surrogate_loss(value: Tensor, gradients: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return a loss of a given value whose gradient by each tensor is the given one.

    ``sum p * g - sum p * g + value``, of which only the first term has a gradient. So Lightning scales, clips and accumulates it,
    and DDP averages it, as any other; tensors without a gradient stay without.

    Args:
        value: What the loss shall be.
        gradients: A tensor that requires a gradient, and the gradient.

    >>> import torch
    >>> weight = torch.ones(2, requires_grad=True)
    >>> loss = surrogate_loss(torch.tensor(3.0), [(weight, torch.tensor([1.0, -2.0]))])
    >>> loss.backward(); loss.item(), weight.grad
    (3.0, tensor([ 1., -2.]))
    """
    products = [(tensor * gradient.detach()).sum() for tensor, gradient in gradients if gradient is not None]
    total = sum(products[1:], products[0]) if products else value.detach()
    return total + (value - total).detach()

"""Gradients that were computed outside of autograd's reach, handed to automatic optimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:  # noqa: ARG004
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *(torch._foreach_mul(ctx.gradients, outer[0]) if ctx.gradients else ())


def surrogate_loss(value: Tensor, gradients: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return a loss of a given value whose gradient by each tensor is the given one.

    So Lightning scales, clips and accumulates it, and DDP averages it, as any other; tensors without a gradient stay without.

    Args:
        value: What the loss shall be.
        gradients: A tensor that requires a gradient, and the gradient.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> loss = surrogate_loss(torch.tensor(3.0), [(weight, torch.tensor([1.0, -2.0]))])
    >>> (2 * loss).backward(); loss.item(), weight.grad
    (3.0, tensor([ 2., -4.]))
    """
    known = [(tensor, gradient.detach()) for tensor, gradient in gradients if gradient is not None]
    found: Tensor = _WithGradients.apply(
        value.detach(), [gradient for _, gradient in known], *(tensor for tensor, _ in known)
    )  # type: ignore[no-untyped-call]
    return found

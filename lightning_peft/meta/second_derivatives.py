"""Convolution and batch normalisation whose second derivatives run in the kernels of the first.

torch writes the second derivative of a normalisation as two dozen elementwise operations, and of a grouped convolution, which is
what vmap makes of stacked tasks, as a loop over groups. Here both are a few calls of the kernels that the first derivative uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Grads = tuple[Tensor | None, ...]


class Geometry(NamedTuple):
    """What a convolution does besides its weights."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def convolution(inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of ``(rows, channels, ...)``; it can be differentiated any number of times."""
    result: Tensor = _Convolution.apply(inputs, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return result


def batch_norm(inputs: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return ``(rows, channels, ...)`` normalised by its own statistics; it can be differentiated twice."""
    result: Tensor = _BatchNorm.apply(inputs, weight, bias, eps)[0]  # type: ignore[no-untyped-call]
    return result


def _gradient(geometry: Geometry, grad: Tensor, inputs: Tensor, weight: Tensor, of: int) -> Tensor:
    """Return the gradient of a convolution by its inputs (0) or weight (1)."""
    stride, padding, dilation, groups = geometry
    mask = [of == 0, of == 1, False]
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, inputs, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
    )[of]
    return found


class _Convolution(torch.autograd.Function):
    """A convolution ``y`` of ``x`` with ``w``: ``<g, y>`` is linear in each of the three, so every derivative is one of three."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        stride, padding, dilation, groups = geometry
        y: Tensor = torch.ops.aten.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        x, w, _, ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        x, w = ctx.saved_tensors
        by_x = _ByInputs.apply(outer[0], w, x.detach(), ctx.geometry) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        by_w = _ByWeight.apply(outer[0], x, w.detach(), ctx.geometry) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
        by_b = outer[0].sum([d for d in range(x.ndim) if d != 1]) if ctx.needs_input_grad[2] else None
        return by_x, by_w, by_b, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *others: Any) -> tuple[Tensor, int]:
        """Run the tasks as groups of one convolution."""
        w, b, geometry = others
        tasks = info.batch_size
        rows = _second(x, in_dims[0], tasks).flatten(1, 2)
        weights = _first(w, in_dims[1], tasks).flatten(0, 1)
        b = None if b is None else _first(b, in_dims[2], tasks).flatten()
        y = convolution(rows, weights, b, geometry._replace(groups=geometry.groups * tasks))
        return y.view(len(y), tasks, -1, *y.shape[2:]), 1


class _ByInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(g, w)
        return _gradient(geometry, g, like, w, 0)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        g, w = ctx.saved_tensors
        by_g = _Convolution.apply(outer[0], w, None, ctx.geometry) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        by_w = _ByWeight.apply(g, outer[0], w.detach(), ctx.geometry) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
        return by_g, by_w, None, None


class _ByWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(g, x)
        return _gradient(geometry, g, x, like, 1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        g, x = ctx.saved_tensors
        by_g = _Convolution.apply(x, outer[0], None, ctx.geometry) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        by_x = _ByInputs.apply(g, outer[0], x.detach(), ctx.geometry) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
        return by_g, by_x, None, None


class _BatchNorm(torch.autograd.Function):
    """``y = gamma xhat + beta`` with ``xhat = (x - mean) r`` and ``r = (var + eps)^-1/2``, over all dimensions but the second."""

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, r = torch.ops.aten.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)
        return y, mean, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, gamma, _, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(x, gamma, mean, r)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return *_NormGradient.apply(outer[0], *ctx.saved_tensors, ctx.eps), None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *others: Any) -> Any:
        """Run the tasks as so many times the channels."""
        gamma, beta, eps = others
        tasks = info.batch_size
        rows = _second(x, in_dims[0], tasks)
        gamma, beta = (_first(t, d, tasks).flatten() for t, d in zip((gamma, beta), in_dims[1:3], strict=True))
        y, mean, r = _BatchNorm.apply(rows.flatten(1, 2), gamma, beta, eps)  # type: ignore[no-untyped-call]
        return (y.view(len(y), tasks, -1, *y.shape[2:]), mean.view(tasks, -1), r.view(tasks, -1)), (1, 0, 0)


class _NormGradient(torch.autograd.Function):
    """The gradient of a normalisation, ``gx = gamma r (g - <g> - xhat <g xhat>)`` with means ``<.>``, and its own.

    Given ``v`` for ``gx`` and ``vgamma``, ``vbeta`` for the others, with ``a = <g xhat>``, ``b = <v xhat>``:
    by ``g`` it is the same kernel on ``v`` plus ``vgamma xhat + vbeta``; by ``gamma``, ``n r S`` with ``S = <v g> - <v><g> - a b``;
    by ``x``, with ``u = (vgamma - gamma r b) g - gamma r a v``, ``r (u - <u> - xhat <u xhat>) - gamma r^2 S xhat``.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, *others: Any) -> Any:
        gamma, mean, r, ctx.eps = others
        found = _norm_gradient(g, x, gamma, mean, r, ctx.eps)
        ctx.save_for_backward(g, x, gamma, mean, r, *found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> _Grads:
        v, v_gamma, v_beta = outer
        g, x, gamma, mean, r, g_gamma, g_beta = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        by_g, v_x, v_sum = _norm_gradient(v, x, gamma, mean, r, ctx.eps)
        a, mean_g, b, mean_v = g_gamma / n, g_beta / n, v_x / n, v_sum / n
        s = (v * g).sum([d for d in range(x.ndim) if d != 1]) / n - mean_v * mean_g - a * b
        of_g, of_v = v_gamma - gamma * r * b, -gamma * r * a
        of_xhat = -(of_g * a + of_v * b) - gamma * r * s
        constant = -(of_g * mean_g + of_v * mean_v) - of_xhat * r * mean

        def wide(values: Tensor) -> Tensor:
            return values.view(1, -1, *[1] * (x.ndim - 2))

        by_x = (
            (wide(r * of_g) * g).addcmul_(wide(r * of_v), v).addcmul_(wide(r * r * of_xhat), x).add_(wide(r * constant))
        )
        by_g = by_g.addcmul_(wide(v_gamma * r), x).add_(wide(v_beta - v_gamma * r * mean))
        return by_g, by_x, n * r * s, None, None, None


def _norm_gradient(g: Tensor, x: Tensor, gamma: Tensor, *statistics: Any) -> Sequence[Tensor]:
    mean, r, eps = statistics
    found: Sequence[Tensor] = torch.ops.aten.native_batch_norm_backward(
        g.contiguous(), x, gamma, None, None, mean, r, True, eps, [True, True, True]
    )
    return found


def _first(tensor: Tensor, dim: int | None, tasks: int) -> Tensor:
    """Return a tensor with the tasks first; one that they share is repeated."""
    return tensor.expand(tasks, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _second(tensor: Tensor, dim: int | None, tasks: int) -> Tensor:
    """Return a tensor with the tasks second, as groups of channels are."""
    return _first(tensor, dim, tasks).transpose(0, 1)

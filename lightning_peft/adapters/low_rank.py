"""The linear map ``x W^T + b`` with a low-rank update, as one differentiable operation.

The cost of an update is bytes, not arithmetic, so the operation touches a tensor of the size of the activations as
seldom as it can: the scale rides in the GEMM that adds the update (to the output or, where there are more rows than
features and precision allows, to the weight), ``x`` is kept by reference and not copied, float32
adapters are cast and never the activations, and a dropout mask is drawn twice from one seed instead of kept, or kept as
a byte per entry on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor


def low_rank_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    gain: Tensor | None = None,
) -> Tensor:
    """Return ``t + gain * (t - b)`` with ``t = x W^T + b + scale * drop(x) A^T B^T``.

    ``gain`` is zero for plain LoRA and ``m / ||W + scale BA|| - 1`` for DoRA. The update is computed in the dtype of the
    output; under autocast in autocast's. All derivatives exist, second ones too.

    Args:
        input: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``, or None.
        down: ``A``, ``(rank, in)``.
        up: ``B``, ``(out, rank)``.
        scale: The factor of the update.
        dropout: Probability of dropping an entry of the update's input; 0 outside of training.
        gain: ``(out,)``, or None for zero.

    >>> x, w = torch.randn(5, 4), torch.randn(3, 4)
    >>> a, b = torch.randn(2, 4), torch.randn(3, 2)
    >>> torch.allclose(low_rank_linear(x, w, None, a, b, scale=0.5), x @ (w + 0.5 * b @ a).T, atol=1e-5)
    True
    """
    kind = input.device.type
    autocast = torch.is_autocast_enabled(kind)
    plain = (
        torch.compiler.is_compiling()  # inductor fuses the plain form by itself
        or torch._C._are_functorch_transforms_active()
        or type(weight) not in (Tensor, torch.nn.Parameter)  # quantised: it has kernels of its own
    )
    if plain:
        return _plain(input, weight, bias, down, up, scale=scale, dropout=dropout, gain=gain)
    result: Tensor
    if not autocast:
        result = _LowRankLinear.apply(input, weight, bias, down, up, gain, scale, dropout, input.dtype)  # type: ignore[no-untyped-call]
        return result
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        result = _LowRankLinear.apply(input, weight, bias, down, up, gain, scale, dropout, dtype)  # type: ignore[no-untyped-call]
    return result


def _plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float,
    dropout: float,
    gain: Tensor | None,
) -> Tensor:
    output = F.linear(input, weight, bias)
    low = F.linear(F.dropout(input, dropout), down.to(input.dtype))
    output = torch.add(output, F.linear(low, up.to(low.dtype)), alpha=scale)
    if gain is None:
        return output
    gain = gain.to(output.dtype)
    return torch.addcmul(output, output if bias is None else output - bias, gain)


HALF_PAYS = 2**16
"""On CPUs narrow products of fewer entries than this are faster in float32, whose kernels are called in a third of the time."""


def gemm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which narrow matrix products with ``x`` are taken: on CPUs float32, where halves do not pay.

    Without units for halves a product of bfloat16 matrices is many times slower than a cast and a product in float32.
    """
    if dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu":
        return dtype
    known = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return dtype if x.numel() >= HALF_PAYS and known() else torch.float32


def _keeps_mask(device: torch.device) -> bool:
    """Whether a mask is kept, a byte per entry, and not drawn twice: on CPUs drawing is dear."""
    return device.type == "cpu"


def _mask(x: Tensor, dropout: float, generator: torch.Generator | None = None) -> Tensor:
    """Return 1 for every entry of ``x`` that is kept, 0 for the others. Four are drawn from one random number.

    As int8: CPUs take three times as long to multiply by a bool.
    """
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    first = min(round(dropout * 2**16) - 2**15, 2**15 - 1)
    return draws.view(torch.int16)[: x.numel()].ge_(first).to(torch.int8).view(x.shape)


def _drawn_again(x: Tensor, dropout: float, seed: int) -> Tensor:
    return _mask(x, dropout, torch.Generator(x.device).manual_seed(seed))


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd takes no keywords
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x = _rows(input, dtype)
        mask = seed = None
        if dropout and _keeps_mask(x.device):
            mask = _mask(x, dropout)
        elif dropout:
            # From the CPU's generator: checkpointed regions restore it, and no device has to be waited for.
            seed = int(torch.empty((), dtype=torch.int64).random_().item())
        scale = scale / (1 - dropout)  # the part of the mask that is the same for all entries
        narrow = gemm_dtype(x, dtype)
        wide, offset = _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
        a, b, low = _cast(down, narrow), _cast(up, narrow), None
        if not dropout and _merges(dtype, *x.shape):
            output = F.linear(x, torch.addmm(wide, b, a, alpha=scale), offset)
        else:
            drop = _drawn_again(x, dropout, seed) if seed is not None else mask
            low = F.linear(_cast(x if drop is None else x * drop, narrow), a)
            output = _add_product(F.linear(x, wide, offset), low, b.t(), scale)
        kept = None
        if gain is not None:
            kept, factor = output, _cast(gain, dtype)
            output = torch.addcmul(output, output, factor)
            if offset is not None:
                output.sub_(factor * offset)
        ctx.save_for_backward(input, weight, bias, down, up, gain, low, kept, mask)
        ctx.scale, ctx.dropout, ctx.seed, ctx.dtype, ctx.narrow = scale, dropout, seed, dtype, narrow
        return output if input.dim() == 2 else output.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        # Gradients of gradients come here with gradients enabled. Then only inputs may enter the formulas: what the
        # forward pass computed on its way, ``low`` and ``kept``, is computed again so that it can be differentiated.
        input, weight, bias, down, up, gain, low, kept, mask = ctx.saved_tensors
        again, dtype, narrow, scale = torch.is_grad_enabled(), ctx.dtype, ctx.narrow, ctx.scale
        x, dy = _rows(input, dtype), _rows(outputs[0], dtype)
        a, b, w = _cast(down, narrow), _cast(up, narrow), _cast(weight, dtype)
        mask = _drawn_again(x, ctx.dropout, ctx.seed) if ctx.seed is not None else mask
        dropped = _cast(x if mask is None else x * mask, narrow)
        if again or low is None:
            low = F.linear(dropped, a)
        grads: list[Tensor | None] = [None] * 9
        if bias is not None and ctx.needs_input_grad[2]:
            grads[2] = _cast(dy.sum(0), bias.dtype)
        if gain is not None:
            if again:
                kept = _add_product(F.linear(x, w), low, b.t(), scale)
            elif bias is not None:
                kept = kept - _cast(bias, dtype)
            grads[5] = _cast((dy * kept).sum(0), gain.dtype)
            dy = torch.addcmul(dy, dy, _cast(gain, dtype))
        wide = _cast(dy, narrow)
        g = wide @ b
        if ctx.needs_input_grad[3]:
            grads[3] = _cast(_scaled_product(a, g.t(), dropped, scale), down.dtype)
        if ctx.needs_input_grad[4]:
            grads[4] = _cast(_up_gradient(b, low, wide, scale), up.dtype)
        if ctx.needs_input_grad[0]:
            grads[0] = _cast(_input_gradient(dy, w, a, b, g, scale, mask), input.dtype).view(input.shape)
        if ctx.needs_input_grad[1]:
            grads[1] = _cast(dy.t() @ x, weight.dtype)
        return tuple(grads)


def _up_gradient(b: Tensor, low: Tensor, wide: Tensor, scale: float) -> Tensor:
    if len(wide) < 256:  # few rows: the faster product does not make up for the copy that brings it into B's layout
        return _scaled_product(b, wide.t(), low, scale)
    return _scaled_product(b.t(), low.t(), wide, scale).t()


def _input_gradient(  # noqa: PLR0917 - all that one formula has
    dy: Tensor, w: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    if mask is not None:
        return (dy @ w).addcmul_(g @ a, mask, value=scale)
    if _merges(dy.dtype, *dy.shape):
        return dy @ torch.addmm(w, b, a, alpha=scale)
    return _add_product(dy @ w, g, a, scale)


def _merges(dtype: torch.dtype, rows: int, width: int) -> bool:
    """Whether one product takes the weight with the update in it: that is less to compute and to move where rows are many.

    Never in half precision, whose weights would round the update away.
    """
    return dtype in (torch.float32, torch.float64) and rows > width


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call that does nothing still takes microseconds


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return _cast(tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1]), dtype)


def _scaled_product(like: Tensor, one: Tensor, two: Tensor, scale: float) -> Tensor:
    """Return ``scale * one @ two``, of the shape of ``like``, which is not read: the GEMM does the scaling."""
    return torch.addmm(like, one, two, beta=0, alpha=scale)


def _add_product(target: Tensor, one: Tensor, two: Tensor, scale: float) -> Tensor:
    """Add ``scale * one @ two`` to ``target`` in place: the GEMM does it, where it is of the target's dtype."""
    if one.dtype == target.dtype:
        return target.addmm_(one, two, alpha=scale)
    return target.add_(one @ two, alpha=scale)

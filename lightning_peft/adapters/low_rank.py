"""The linear map ``x W^T + b`` with a low-rank update, as one differentiable operation.

The cost of an update is bytes, not arithmetic, so the operation touches a tensor of the size of the activations as
seldom as it can: the scale rides in the GEMM that adds the update, ``x`` is kept by reference and not copied, float32
adapters are cast and never the activations, and a dropout mask is drawn twice from one seed instead of kept.
"""

from __future__ import annotations

from contextlib import nullcontext
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
    dtype = torch.get_autocast_dtype(kind) if autocast else input.dtype
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        result: Tensor = _LowRankLinear.apply(input, weight, bias, down, up, gain, scale, dropout, dtype)  # type: ignore[no-untyped-call]
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


def gemm_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which narrow matrix products are taken: float32 where a CPU has no units for halves.

    There a product of bfloat16 matrices is many times slower than a cast and a product in float32.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    known = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return dtype if known() else torch.float32


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Return which entries of ``x`` are kept; one seed keeps the same ones. Four are drawn from one random number."""
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(dropout * 2**16) - 2**15


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
        x = input.reshape(-1, input.shape[-1]).to(dtype)
        # From the CPU's generator: checkpointed regions restore it, and no device has to be waited for.
        seed = int(torch.empty((), dtype=torch.int64).random_().item()) if dropout else 0
        output = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        narrow = gemm_dtype(x.device, dtype)
        low = (x * _mask(x, dropout, seed) if dropout else x).to(narrow) @ down.to(narrow).t()
        scale = scale / (1 - dropout)  # the part of the mask that is the same for all entries
        _add_product(output, low, up.to(narrow).t(), scale)
        kept = None
        if gain is not None:
            kept, tight = output, gain.to(dtype)
            output = torch.addcmul(output, output, tight)
            if bias is not None:
                output.sub_(tight * bias.to(dtype))
        ctx.save_for_backward(input, weight, bias, down, up, gain, low, kept)
        ctx.scale, ctx.dropout, ctx.seed, ctx.dtype, ctx.narrow = scale, dropout, seed, dtype, narrow
        return output.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        # Gradients of gradients come here with gradients enabled. Then only inputs may enter the formulas: what the
        # forward pass computed on its way, ``low`` and ``kept``, is computed again so that it can be differentiated.
        input, weight, bias, down, up, gain, low, kept = ctx.saved_tensors
        again, dtype, narrow, scale = torch.is_grad_enabled(), ctx.dtype, ctx.narrow, ctx.scale
        x, dy = input.reshape(-1, input.shape[-1]).to(dtype), outputs[0].reshape(-1, outputs[0].shape[-1]).to(dtype)
        a, b = down.to(narrow), up.to(narrow)
        mask = _mask(x, ctx.dropout, ctx.seed) if ctx.dropout else None
        dropped = (x if mask is None else x * mask).to(narrow)
        if again:
            low = dropped @ a.t()
        grads: list[Tensor | None] = [None] * 9
        if bias is not None and ctx.needs_input_grad[2]:
            grads[2] = dy.sum(0).to(bias.dtype)
        if gain is not None:
            if again:
                kept = _add_product(F.linear(x, weight.to(dtype)), low, b.t(), scale)
            elif bias is not None:
                kept = kept - bias.to(dtype)
            grads[5] = (dy * kept).sum(0).to(gain.dtype)
            dy = torch.addcmul(dy, dy, gain.to(dtype))
        wide = dy.to(narrow)
        g = (wide @ b).mul_(scale)
        if ctx.needs_input_grad[3]:
            grads[3] = (g.t() @ dropped).to(down.dtype)
        if ctx.needs_input_grad[4]:
            grads[4] = (low.t() @ wide).mul_(scale).t().to(up.dtype)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dtype)
            dx = _add_product(dx, g, a, 1.0) if mask is None else dx.add_((g @ a).mul_(mask))
            grads[0] = dx.to(input.dtype).view(input.shape)
        if ctx.needs_input_grad[1]:
            grads[1] = (dy.t() @ x).to(weight.dtype)
        return tuple(grads)


def _add_product(target: Tensor, one: Tensor, two: Tensor, scale: float) -> Tensor:
    """Add ``scale * one @ two`` to ``target`` in place: the GEMM does it, where it is of the target's dtype."""
    if one.dtype == target.dtype:
        return target.addmm_(one, two, alpha=scale)
    return target.add_(one @ two, alpha=scale)

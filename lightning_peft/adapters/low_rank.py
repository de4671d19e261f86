"""The linear map ``x W^T + b`` with a low-rank update, as one differentiable operation.

The cost of an update is bytes, not arithmetic, so the operation touches a tensor of the size of the activations as
seldom as it can: the scale rides in the GEMM that adds the update, ``x`` is kept by reference and not copied, float32
adapters are cast and never the activations, and a dropout mask is drawn twice from one seed instead of kept.
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
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    plain = (
        torch.compiler.is_compiling()  # inductor fuses the plain form by itself
        or torch._C._are_functorch_transforms_active()
        or type(weight) not in (Tensor, torch.nn.Parameter)  # quantised: it has kernels of its own
    )
    if plain:
        return _plain(input, weight, bias, down, up, scale=scale, dropout=dropout, gain=gain)
    with torch.autocast(kind, enabled=False):
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


def _dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Return ``drop(x)``; the same seed drops the same entries."""
    return x * _mask(x, dropout, seed) if dropout else x


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - dropout, generator=generator)
    return mask.div_(1 - dropout)


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
        low = _dropped(x, dropout, seed) @ down.to(dtype).t()
        output.addmm_(low, up.to(dtype).t(), alpha=scale)
        kept = None
        if gain is not None:
            kept, tight = output, gain.to(dtype)
            output = torch.addcmul(output, output, tight)
            if bias is not None:
                output.sub_(tight * bias.to(dtype))
        ctx.save_for_backward(input, weight, bias, down, up, gain, low, kept)
        ctx.scale, ctx.dropout, ctx.dtype, ctx.seed = scale, dropout, dtype, seed
        return output.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        # Gradients of gradients come here with gradients enabled. Then only inputs may enter the formulas: what the
        # forward pass computed on its way, ``low`` and ``kept``, is computed again so that it can be differentiated.
        input, weight, bias, down, up, gain, low, kept = ctx.saved_tensors
        again, dtype, scale = torch.is_grad_enabled(), ctx.dtype, ctx.scale
        x, dy = input.reshape(-1, input.shape[-1]).to(dtype), outputs[0].reshape(-1, outputs[0].shape[-1]).to(dtype)
        a, b = down.to(dtype), up.to(dtype)
        mask = _mask(x, ctx.dropout, ctx.seed) if ctx.dropout else None
        dropped = x if mask is None else x * mask
        if again:
            low = dropped @ a.t()
        grads: list[Tensor | None] = [None] * 9
        if bias is not None and ctx.needs_input_grad[2]:
            grads[2] = dy.sum(0).to(bias.dtype)
        if gain is not None:
            if again:
                kept = torch.addmm(F.linear(x, weight.to(dtype)), low, b.t(), alpha=scale)
            elif bias is not None:
                kept = kept - bias.to(dtype)
            grads[5] = (dy * kept).sum(0).to(gain.dtype)
            dy = torch.addcmul(dy, dy, gain.to(dtype))
        g = (dy @ b).mul_(scale)
        if ctx.needs_input_grad[3]:
            grads[3] = (g.t() @ dropped).to(down.dtype)
        if ctx.needs_input_grad[4]:
            grads[4] = (dy.t() @ low).mul_(scale).to(up.dtype)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dtype)
            dx = dx.addmm_(g, a) if mask is None else dx.addcmul_(g @ a, mask)
            grads[0] = dx.to(input.dtype).view(input.shape)
        if ctx.needs_input_grad[1]:
            grads[1] = (dy.t() @ x).to(weight.dtype)
        return tuple(grads)

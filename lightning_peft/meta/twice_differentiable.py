"""Second derivatives: kernels that have them, and the names of those that have not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.function import once_differentiable as once
from torch.nn.attention import SDPBackend, sdpa_kernel

# The last two are of torch.compile, which says the one or the other.
_SIGNS = ("is not implemented", "does not currently support double backward", "donated buffers")


@contextmanager
def math_attention(needed: bool) -> Iterator[None]:
    """Let attention run in the math kernels: only they have a second derivative, and a rule for vmap; nothing if not needed."""
    if not needed:
        yield
        return
    # nn.MultiheadAttention and nn.TransformerEncoderLayer have a kernel of their own, in eval mode without gradients.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def no_checkpointing(owner: str) -> AbstractContextManager[None]:
    """Refuse gradient checkpointing inside.

    **The trap:** it runs a layer a second time when its gradient is taken. The adapted weights have left their places by then, and
    the gradient would be that of the module's own, without an error.
    """
    refused: AbstractContextManager[None] = torch.autograd.graph.disable_saved_tensors_hooks(
        f"{owner}: gradient checkpointing (a hook on saved tensors) runs a layer again when the adapted weights have left their "
        "places, so its gradients would be wrong. Switch it off; to save memory use MetaConfig(memory='recompute'), task_chunk or "
        "task_batching='loop'."
    )
    return refused


def explained(error: RuntimeError, owner: str) -> RuntimeError:
    """Return what to tell of torch's error about a second derivative; any other error is returned as it is."""
    if not any(sign in str(error) for sign in _SIGNS):
        return error
    return no_second_derivative(f"an operation ({error})", owner)


def no_second_derivative(what: str, owner: str) -> RuntimeError:
    """Return the error about something that cannot be differentiated twice, with its cure."""
    return RuntimeError(
        f"{owner}: second-order meta-gradients need second derivatives, which {what} has not. Use MetaConfig(second_order=False), "
        "adapt parameters that it does not depend on, or replace the operation."
    )


def once_differentiable(loss: Tensor) -> set[str]:
    """Return the names of the custom autograd functions in the graph of a loss whose backward cannot be differentiated.

    **The trap:** such a function raises only under ``backward()``. ``torch.autograd.grad`` finds no way through it and gives
    gradients without its part.
    """
    found: set[str] = set()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = getattr(node, "_forward_cls", None)
        if isinstance(node, BackwardCFunction) and _is_once(getattr(kind, "backward", None)):
            found.add(kind.__name__)
        waiting += [following for following, _ in node.next_functions]
    return found


def _is_once(backward: Any) -> bool:
    """Return whether ``once_differentiable`` is among a function's decorators; others, as ``torch.amp.custom_bwd``, wrap it too."""
    while backward is not None:
        if getattr(backward, "__code__", None) is _ONCE:
            return True
        backward = getattr(backward, "__wrapped__", None)
    return False


_ONCE = once(_is_once).__code__
"""What ``once_differentiable`` makes of every function."""

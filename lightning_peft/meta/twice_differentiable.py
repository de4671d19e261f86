"""Second derivatives: kernels that have them, and the names of those that have not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

_SIGN = "is not implemented"


@contextmanager
def math_attention(needed: bool) -> Iterator[None]:
    """Let attention run in the math kernels: only they have a second derivative, and a rule for vmap; nothing if not needed."""
    if not needed:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def explained(error: RuntimeError, owner: str) -> RuntimeError:
    """Return what to tell of torch's error about a second derivative; any other error is returned as it is."""
    if _SIGN not in str(error):
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
        if isinstance(node, BackwardCFunction) and hasattr(getattr(kind, "backward", None), "__wrapped__"):
            found.add(kind.__name__)
        waiting += [following for following, _ in node.next_functions]
    return found

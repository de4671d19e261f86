"""The recursion of a meta-gradient, compiled: all derivatives are inside, since a compiled graph cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.meta.inner_loop import InnerLoop, recomputed
from lightning_peft.meta.task_losses import Params, TaskCalls

_SHAPES = 64
"""How many shapes of tasks, or other modules, torch compiles for before it gives up."""


class CompiledRecursion:
    """What :func:`~lightning_peft.meta.inner_loop.recomputed` returns, from code that torch has compiled for one shape of tasks.

    Args:
        owner: Who is meant in messages.
        backend: Of ``torch.compile``.

    Raises:
        RuntimeError: By a torch that cannot; when called, for several steps with losses that draw random numbers: a step that is
            computed twice would draw others.
        ValueError: When called, for adapting embeddings with a padding row: vmap gives it a gradient in all tasks but the first.
    """

    def __init__(self, owner: str, backend: str = "inductor") -> None:
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            raise RuntimeError(
                f"{owner}: MetaConfig(compile=True) needs a torch that compiles torch.autograd.grad, as 2.13 does; this is "
                f"{torch.__version__}. Use compile=False."
            )
        self._owner = owner
        # Its derivatives are all inside: torch traces autograd.grad only if asked to. Each shape of tasks is compiled anew.
        self._tracing = torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=_SHAPES)
        self._compiled: Callable[..., Any] = torch.compile(recomputed, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, loop: InnerLoop, calls: TaskCalls, inner: Params, others: Sequence[Tensor]) -> Any:
        """Return the outcome, the gradients by what adapts, and by what else the losses depend on."""
        for owner in calls.places.owners:
            if isinstance(owner, nn.Embedding) and owner.padding_idx is not None:
                raise ValueError(
                    f"{self._owner}: MetaConfig(compile=True) cannot adapt an embedding with padding_idx={owner.padding_idx}. Use "
                    "compile=False, or leave it out by adapt=."
                )
        device, twice = next(iter(inner.values())).device, loop.steps > 1 and loop.generators is not None
        before = _generators(device) if twice else []
        # As tensors, weights that change from epoch to epoch are no new code.
        weights = [None if weight is None else torch.tensor(weight, dtype=torch.float64) for weight in loop.weights]
        with self._tracing:
            found = self._compiled(
                replace(loop, weights=weights, generators=None), calls, inner, others, keep_last=True
            )
        if twice and not all(map(torch.equal, before, _generators(device))):
            raise RuntimeError(
                f"{self._owner}: MetaConfig(compile=True) with several steps, and losses that draw random numbers, as of dropout: "
                "a step is computed twice, and would draw others. Use compile=False, or no dropout."
            )
        return found


def _generators(device: torch.device) -> list[Tensor]:
    """Return the states of torch's generators that losses on a device draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

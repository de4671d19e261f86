"""Methods of a module under weights that it does not hold: of one task, or of many at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lightning_peft.meta.episode import Episode, over_tensors

Params = dict[str, Tensor]
"""Fast weights by name; of stacked tasks, each with the tasks for its first dimension."""
Method = Callable[[Any], Any]


class _Caller(nn.Module):
    """Runs any method of a module, where torch swaps parameters for a ``forward``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: Method, batch: Any) -> Any:
        return method(batch)


@dataclass(frozen=True)
class TaskCalls:
    """Some tasks of an episode and the module whose methods judge them.

    ``task_batching="stacked"`` runs the *forward* of all tasks under ``torch.vmap`` and leaves derivatives to ordinary autograd.
    **The trap** is to put a derivative inside: ``vmap(grad(loss))``, differentiated again, is wrong through every normalisation
    layer (3e-3 through LayerNorm, without an error; pytorch/functorch#534).

    Args:
        module: Whose methods are called.
        episode: Of stacked tasks with their first dimension, of a single task without it.
        tasks: How many tasks are stacked; None for a single one.
        aliases: All names of every parameter that adapts: several where weights are tied.
    """

    module: nn.Module
    episode: Episode
    tasks: int | None
    aliases: Mapping[str, Sequence[str]]

    def start(self, parameters: Params) -> Params:
        """Return the weights that all tasks begin with."""
        if self.tasks is None:
            return parameters
        return {name: value.expand(self.tasks, *value.shape) for name, value in parameters.items()}

    def summed(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of ``start``'s input, given those of its output."""
        return [v if v is None or self.tasks is None else v.sum(0) for v in values]

    def support(self, method: Method, parameters: Params) -> Any:
        """Call a method on the support sets, each task under its own weights; results have the tasks first."""
        return self._call(method, parameters, self.episode.support)

    def query(self, method: Method, parameters: Params) -> Any:
        """Call a method on the query sets."""
        return self._call(method, parameters, self.episode.query)

    def _call(self, method: Method, parameters: Params, batch: Any) -> Any:
        caller, aliases = _Caller(self.module), self.aliases

        def one(parameters: Params, batch: Any) -> Any:
            swapped = {f"module.{alias}": value for name, value in parameters.items() for alias in aliases[name]}
            return functional_call(caller, swapped, (method, batch), tie_weights=False)

        if self.tasks is None:
            return over_tensors(one(parameters, batch), lambda result: result[None])
        dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        return torch.vmap(one, in_dims=(0, dims), randomness="different")(parameters, batch)

"""Methods of a module under weights that it does not hold: of one task, or of many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_peft.meta.episode import Episode, over_tensors
from lightning_peft.meta.places import Places
from lightning_peft.meta.stacking import over_tasks

Params = dict[str, Tensor]
"""Fast weights by name; of stacked tasks, each with the tasks for its first dimension."""
Method = Callable[[Any], Any]


@dataclass(frozen=True)
class TaskCalls:
    """Some tasks of an episode, and the places of a module where its methods find the weights of each.

    ``task_batching="stacked"`` runs the *forward* of all tasks under ``torch.vmap`` and leaves derivatives to ordinary autograd.
    **The trap** is to put a derivative inside: ``vmap(grad(loss))``, differentiated again, is wrong through every normalisation
    layer (3e-3 through LayerNorm, without an error; pytorch/functorch#534).

    Args:
        episode: Of stacked tasks with their first dimension, of a single task without it.
        tasks: How many tasks are stacked; None for a single one.
        places: Where the parameters that adapt live.
    """

    episode: Episode
    tasks: int | None
    places: Places

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
        if self.tasks is None:
            with self.places.holding(list(parameters.values())):
                return over_tensors(method(batch), lambda result: result[None])

        leaves, structure = pytree.tree_flatten(batch)
        stacked = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def one(*tensors: Tensor) -> Any:
            filled = list(leaves)
            for place, tensor in zip(stacked, tensors[len(parameters) :], strict=True):
                filled[place] = tensor
            with self.places.holding(tensors[: len(parameters)], stacked=True):
                return method(pytree.tree_unflatten(filled, structure))

        return over_tasks(one, [*parameters.values(), *(leaves[place] for place in stacked)])

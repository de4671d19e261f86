"""Norms of many tensors as of one vector, also of sharded ones, and what one optimizer step does to blocks of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def norm_of(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm of a tensor, in ``float32`` or wider; of a sharded one still in parts (:func:`join_norms`).

    Args:
        tensor: Of any shape; sparse and sharded (``DTensor``) ones too.
    """
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm


def join_norms(norms: Iterable[Tensor]) -> Tensor:
    """Return the norm of the vector whose parts have these norms: the root of the sum of their squares.

    Of sharded tensors it is that of the whole ones, the same on every rank; all ranks must call it.

    Args:
        norms: What :func:`norm_of` returned.

    >>> float(join_norms([torch.tensor(3.0), torch.tensor(4.0)]))
    5.0
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for norm in norms:
        by_mesh.setdefault(getattr(norm, "device_mesh", None), []).append(norm)
    joined: list[Any] = [torch.linalg.vector_norm(torch.stack(found)) for found in by_mesh.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in joined]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


class StepFlow:
    """What one optimizer step does, by block: the gradients that come in, and how far it moves the weights.

    Made between backward and the step, finished after it. In between it keeps a copy of the weights.

    Args:
        blocks: Parameters with gradients, by block.

    >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> (weight * torch.tensor([0.0, 2.0])).sum().backward()
    >>> flow = StepFlow({"block": [weight]})
    >>> torch.optim.SGD([weight], lr=0.25).step()
    >>> flow.finish()
    >>> float(flow.gradients["block"]), float(flow.moved["block"]), float(flow.weights["block"])
    (2.0, 0.5, 5.0)
    """

    def __init__(self, blocks: Mapping[str, Sequence[Tensor]]) -> None:
        self.gradients = {block: _norm(p.grad for p in found if p.grad is not None) for block, found in blocks.items()}
        self.weights = {block: _norm(found) for block, found in blocks.items()}
        self.moved: dict[str, Tensor] = {}
        self._blocks = blocks
        self._before = {block: [p.detach().clone() for p in found] for block, found in blocks.items()}

    @property
    def finished(self) -> bool:
        """Whether the step was taken."""
        return bool(self.moved)

    def finish(self) -> None:
        """Take the norm of the difference that the step made, and drop the copy."""
        self.moved = {
            block: _norm(p.detach() - old for p, old in zip(self._blocks[block], before, strict=True))
            for block, before in self._before.items()
        }
        self._before, self._blocks = {}, {}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return join_norms(map(norm_of, tensors))

"""Count what a network moves and keeps: operations, bytes, activations; exact, and the same on every machine.

An operation moves every tensor that it is given and every tensor that it returns, each in full and in its own dtype. An
operation in place is given its target and returns it, so it counts twice; a cast counts its source and its result; views
(``view``, ``t``, ``as_strided``, ``detach``, ...), ``empty`` and the reading of a scalar move nothing. What happens inside one
operation is not seen, and the counts are those of the CPU, where dropout is several operations, and of one that can
multiply bfloat16 matrices: a library may go around CPUs that cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOTHING_MOVED = {
    "_unsafe_view",
    "_local_scalar_dense",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
}


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: lambda a, b: a.new_zeros(a.shape[0], b.shape[1]),
    torch.ops.aten.addmm_.default: lambda target, _a, _b: target,
}
"""Results of the right shape: for a count no product has to be computed, and some CPUs take seconds for one in bfloat16."""


class Traffic(TorchDispatchMode):
    """Count the operations that run inside, and the bytes that they move."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        product = PRODUCTS.get(func)
        result = product(*args) if product else func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.moved.append((str(func), sum(tensor.nbytes for tensor in tensors)))
        return result

    @property
    def total(self) -> int:
        """Bytes moved so far."""
        return sum(size for _, size in self.moved)


def _moves_nothing(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or func.overloadpacket.__name__ in NOTHING_MOVED


def with_half_units() -> Any:
    """Let the CPU pass for one that can multiply bfloat16 and float16 matrices, so that counts are the same on all."""
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    return mock.patch.multiple(torch.ops.mkldnn, **dict.fromkeys(names, lambda: True))


def saved_bytes(network: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the bytes of all storages that the forward pass keeps, without those of parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors too: as long as they live, no other storage gets their address

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with (
        Traffic(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):  # no products: sizes are enough
        output = network(**inputs)
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)

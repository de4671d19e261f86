"""Let a module read tensors instead of its parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def in_place_of(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module read tensors instead of its parameters; an instance attribute goes before a registered parameter.

    Args:
        module: The module.
        values: Tensors by the parameters' dotted names in it.
    """
    places = [(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path) for path in values]
    for owner, name, path in places:
        vars(owner)[name] = values[path]
    try:
        yield
    finally:
        for owner, name, _ in places:
            del vars(owner)[name]

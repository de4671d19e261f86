"""Where the parameters that adapt live in a module, and tensors put there instead of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.matching import nearest
from lightning_peft.meta.stacking import STACKED

Parts = list[tuple[str, nn.Module]]
"""A module and all below it, with their dotted names; one that has several has several places."""


def tree(module: nn.Module) -> Parts:
    """Return what ``module.named_modules(remove_duplicate=False)`` yields, sooner: a meta-step of a small network is short.

    >>> [name for name, _ in tree(nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU()))]
    ['', '0', '0.0', '1']
    """
    found: Parts = []
    waiting = [("", module)]
    while waiting:
        path, one = place = waiting.pop()
        found.append(place)
        prefix = f"{path}." if path else ""
        waiting += [(prefix + key, child) for key, child in reversed(one._modules.items()) if child is not None]
    return found


class Places:
    """Every place of some parameters of a module: several where weights are tied.

    Args:
        module: The module.
        names: Dotted names of the parameters.

    Attributes:
        parameters: The parameters, by name.
        owners: The modules that hold them.
        parts: The module and all below it.

    Raises:
        ValueError: For a name that is no parameter's.

    >>> net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    >>> net["b"].weight = net["a"].weight
    >>> places = Places(net, ["a.weight"])
    >>> with places.holding([net["a"].weight.new_zeros(2, 2)]):
    ...     print(net["b"].weight.sum().item())
    0.0
    """

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        self.parts = tree(module)
        named: dict[str, Tensor] = {}
        tables: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for path, owner in self.parts:
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    named[f"{path}.{key}" if path else key] = parameter
                    tables.setdefault(id(parameter), []).append((owner._parameters, key))
        if unknown := [name for name in names if name not in named]:
            raise ValueError(
                f"Places: {unknown[0]!r} is no parameter of {type(module).__name__}. Nearest: {nearest(unknown[0], named)}."
            )
        self.parameters = {name: named[name] for name in names}
        self._tables = [tables[id(parameter)] for parameter in self.parameters.values()]
        touched = {id(table) for found in self._tables for table, _ in found}
        once = {id(owner): owner for _, owner in self.parts}.values()
        self.owners = [owner for owner in once if id(owner._parameters) in touched]
        # Of exactly these classes, whose forward is known; not where something else has taken its place already.
        known = [*self.owners, *(owner for owner in once if not owner._parameters)]
        self._forwards: list[tuple[dict[str, Any], Callable[..., Tensor]]] = [
            (vars(owner), partial(STACKED[type(owner)], owner))
            for owner in known
            if type(owner) in STACKED and "forward" not in vars(owner)
        ]

    def trainable(self) -> list[Tensor]:
        """Return all parameters of the module that require a gradient, each once."""
        every = (parameter for _, part in self.parts for parameter in part._parameters.values())
        return list({id(p): p for p in every if p is not None and p.requires_grad}.values())

    @contextmanager
    def holding(self, values: Sequence[Tensor], *, stacked: bool = False) -> Iterator[None]:
        """Let the module find tensors in the places of its parameters; all of its own code sees them.

        Args:
            values: One for each parameter, in order.
            stacked: Whether this is inside ``vmap`` over tasks: layers that have a faster form for many weights then use it.
        """
        forwards = self._forwards if stacked and not torch.compiler.is_compiling() else []
        for found, value in zip(self._tables, values, strict=True):
            for table, key in found:
                table[key] = value
        for attributes, forward in forwards:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in forwards:
                del attributes["forward"]
            for found, own in zip(self._tables, self.parameters.values(), strict=True):
                for table, key in found:
                    table[key] = own

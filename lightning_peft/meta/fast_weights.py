"""The weights of one task after adaptation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_peft.matching import nearest


@dataclass(frozen=True)
class FastWeights:
    """What one task adapted.

    Args:
        parameters: Values by name, of the shapes of the module's own.
        steps: How many steps led there.
    """

    parameters: dict[str, Tensor]
    steps: int


def aliases(module: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Return all names of each parameter: several where weights are tied.

    Raises:
        ValueError: For a name that is no parameter's.

    >>> net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    >>> net["b"].weight = net["a"].weight
    >>> aliases(net, ["a.weight"])
    {'a.weight': ['a.weight', 'b.weight']}
    """
    places: dict[int, list[str]] = {}
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        places.setdefault(id(parameter), []).append(name)
    if unknown := [name for name in names if name not in named]:
        raise ValueError(
            f"aliases: {unknown[0]!r} is no parameter of {type(module).__name__}. Nearest: {nearest(unknown[0], named)}."
        )
    return {name: places[id(named[name])] for name in names}

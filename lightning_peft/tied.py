"""Modules that share a weight, such as an output embedding with the input's."""

from __future__ import annotations

from torch import nn


def tied_weights(model: nn.Module) -> dict[str, list[str]]:
    """Return the modules whose ``weight`` also belongs to others, each with the names of those.

    >>> net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "output": nn.Linear(4, 9)})
    >>> net["output"].weight = net["embed"].weight
    >>> tied_weights(net)
    {'embed': ['output'], 'output': ['embed']}
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    shared = [names for names in owners.values() if len(names) > 1]
    return {name: [other for other in names if other != name] for names in shared for name in names}

"""Choose among the parameters that a network has itself, whatever adapters it carries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_peft.adapters.updates import hosts
from lightning_peft.matching import match_names


def base_parameters(model: nn.Module) -> list[str]:
    """Return the names of a network's own parameters, those of adapters left out.

    >>> from lightning_peft import LoRA, add_adapter
    >>> base_parameters(add_adapter(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2)))
    ['0.weight', '0.bias']
    """
    added = {id(parameter) for _, _, updates in hosts(model) for parameter in updates.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in added]


def own_parameters(model: nn.Module, globs: Sequence[str], *, owner: str) -> list[str]:
    """Return the network's own parameters that globs choose, in the network's order.

    A weight that several modules share goes by its first name: it trains in all of them and stays shared.

    Args:
        model: The network.
        globs: Over names of modules or parameters; a module stands for all its parameters.
        owner: Whose globs they are, for the error message.

    Raises:
        ValueError: If a glob matches nothing.

    >>> own_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["1"], owner="LoRA: train_also")
    ['1.weight', '1.bias']
    """
    own = set(base_parameters(model))
    first = {id(parameter): name for name, parameter in model.named_parameters() if name in own}
    parameters = {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in first
    }
    modules = {path for name in parameters for path in _and_parents(name.rpartition(".")[0])} - {""}
    named = match_names(sorted(modules | parameters.keys()), globs, owner=owner, kind="module or parameter")
    chosen = {
        kept for name, kept in parameters.items() if name in named or any(name.startswith(f"{path}.") for path in named)
    }
    return [name for name in first.values() if name in chosen]


def _and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]

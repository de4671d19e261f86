"""PEFT's rules by which a configuration chooses modules by their names, and names that choose exactly what we mean."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_peft.adapters.layer_kinds import kind_of
from lightning_peft.adapters.lora_targets import LINEAR, adaptable, heads_of
from lightning_peft.adapters.own_parameters import own_parameters
from lightning_peft.tied import tied_weights

CONFIG = "adapter_config.json"


def exactly(names: Iterable[str]) -> str | list[str]:
    r"""Return an expression that matches these names whole: PEFT compares names in a list with the end of longer ones too.

    >>> exactly(["layer.0", "layer.1"])
    'layer\\.0|layer\\.1'
    """
    return "|".join(re.escape(name) for name in names) or []


def as_globs(names: Iterable[str]) -> list[str]:
    """Return globs that match these names and no others.

    >>> as_globs(["layers.0", "odd[1]"])
    ['layers.0', 'odd[[]1]']
    """
    return [glob.escape(name) for name in names]


def refuse_missing(config: Mapping[str, Any], *keys: str) -> None:
    """Refuse a configuration without these fields.

    Raises:
        ValueError: With those that it lacks.
    """
    if missing := [key for key in keys if config.get(key) is None]:
        raise ValueError(f"load_adapter: {CONFIG} lacks {missing}; PEFT would guess them, and a wrong guess is silent.")


def saved_modules(model: nn.Module, globs: Iterable[str]) -> list[str]:
    """Return the modules that PEFT would save whole for parameters that train beside an adapter.

    Raises:
        ValueError: If only a part of a module trains.
    """
    trained = own_parameters(model, list(globs), owner="save_adapter: train_also")
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in trained))
    if tied := sorted(tied_weights(model).keys() & set(modules)):
        raise ValueError(
            f"save_adapter: {tied[0]!r} trains and shares its weight, and PEFT would untie it: its file means something else. "
            "Lightning's checkpoints hold it."
        )
    for path in modules:
        left = [key for key, _ in model.get_submodule(path).named_parameters(path) if key not in trained]
        if left:
            raise ValueError(
                f"save_adapter: {path!r} trains without {left[0]!r}, and PEFT's format holds whole modules. "
                f"Put the whole module into train_also."
            )
    return modules


def matching_modules(model: nn.Module, names: Iterable[str] | None) -> list[str]:
    """Return the modules whose name ends in one of the given names, as ``modules_to_save`` does."""
    wanted = list(names or [])
    return [
        path for path, _ in model.named_modules() if any(path == name or path.endswith(f".{name}") for name in wanted)
    ]


def heads_and_targets(config: Mapping[str, Any], model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the modules that are saved whole, and the targets outside them.

    Raises:
        ValueError: If nothing is a target.
    """
    heads = matching_modules(model, config.get("modules_to_save"))
    return heads, [name for name in target_names(config, model) if not any(inside(name, head) for head in heads)]


def target_names(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return what ``target_modules``, ``target_parameters`` and their restrictions choose, by PEFT's rules.

    Raises:
        ValueError: If that is nothing.
    """
    known = adaptable(model)
    layers = [name for name, target in known.items() if target.host == name]
    targets, exclude = config.get("target_modules"), config.get("exclude_modules")
    if not config.get("target_parameters"):
        refuse_missing(config, "target_modules")
    if targets == "all-linear":
        bypassed = heads_of(model)
        names = [name for name in layers if kind_of(known[name].module) in LINEAR and name not in bypassed]
    else:
        names = [name for name in layers if matches(targets or [], name) and _in_layers(config, targets, name)]
    names = [name for name in names if not (exclude and matches(exclude, name))]
    parameters = list(config.get("target_parameters") or [])
    names += [name for p in parameters for name in known if known[name].host != name and matches([p], name)]
    if not names:
        raise ValueError(f"load_adapter: target_modules={targets!r} matches no layer of {type(model).__name__}.")
    return names


def inside(name: str, module: str) -> bool:
    """Whether a name is that of a module or of something in it."""
    return name == module or name.startswith(f"{module}.")


def matches(targets: str | Iterable[str], name: str) -> bool:
    """Whether a name is chosen: by an expression that matches it whole, or by a list that has it or its end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(config: Mapping[str, Any], targets: Any, name: str) -> bool:
    chosen = config.get("layers_to_transform")
    if chosen is None or isinstance(targets, str) or name in (targets or []):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    for pattern in patterns:
        if found := re.match(rf".*?(?:^|\.){pattern}\.(\d+)\.", name):
            return int(found[1]) in indices
    return False

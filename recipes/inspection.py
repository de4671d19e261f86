"""Look at a network: its layers as a tree, the globs that select them, and what LoRA would adapt."""

from __future__ import annotations

import argparse
import functools
import glob
import importlib
import itertools
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.adapters import LoRA
from lightning_peft.adapters.backbone import WHOLE, find_backbone, parameter_count, prefix_of, submodule
from lightning_peft.adapters.lora_targets import linear_layers
from lightning_peft.mixins.adapter_mixin import AdapterMixin


def model_tree(model: nn.Module, *, name: str = "") -> Tree:
    """Return the layers of a network as a tree to print.

    Neighbours that look the same (the layers of an encoder) stand as one, with ``*`` in their globs.

    Args:
        model: The network; it may be on the meta device.
        name: What stands at the root.
    """
    path = place_of_adapters(model)[0] or WHOLE
    try:
        chosen = {prefix_of(path) + name for name in LoRA(rank=1).select(submodule(model, path) or model)}
    except ValueError:
        chosen = set()
    leaves = [name for name, module in model.named_modules() if name and _is_leaf(module)]
    tree = Tree(f"[bold]{escape(name or type(model).__name__)}[/]  {parameter_count(model):,} parameters")
    _grow(tree, model, [], leaves, chosen)
    return tree


def _grow(tree: Tree, module: nn.Module, above: list[list[str]], leaves: list[str], chosen: set[str]) -> None:
    for names, child in _alike(module):
        path = [*above, names]
        label = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
        text = (
            f"{escape(label)}  [dim]{type(child).__name__}[/] {_shape(child)} {parameter_count(child) * len(names):,}"
        )
        if _is_leaf(child) and any(True for _ in child.parameters()):
            here = ".".join(step[0] for step in path)
            text += f"  [cyan]{escape(', '.join(globs_of(path, leaves)))}[/]" + (
                "  [green]LoRA[/]" if here in chosen else ""
            )
        _grow(tree.add(text), child, path, leaves, chosen)


def _is_leaf(module: nn.Module) -> bool:
    return not any(module.children())


def globs_of(path: list[list[str]], leaves: list[str]) -> list[str]:
    """Return the fewest globs that select certain layers and no other.

    Args:
        path: At each level of the tree the name, or the names of neighbours that look the same.
        leaves: The names of all layers.

    >>> globs_of([["layer"], ["0", "1"], ["q"]], ["layer.0.q", "layer.1.q", "layer.1.k"])
    ['layer.*.q']
    >>> globs_of([["layer"], ["0", "1"], ["q"]], ["layer.0.q", "layer.1.q", "layer.2.q"])
    ['layer.[0-1].q']
    """
    meant = {".".join(names) for names in itertools.product(*path)}
    wide = ".".join("*" if len(names) > 1 else glob.escape(names[0]) for names in path)
    if {name for name in leaves if fnmatchcase(name, wide)} <= meant:
        return [wide]
    return [".".join(steps) for steps in itertools.product(*map(_ranges, path))]


def _ranges(names: list[str]) -> list[str]:
    """Return globs for numbers: 8 to 11 are ``[8-9]`` and ``1[0-1]``."""
    if len(names) == 1:
        return [glob.escape(names[0])]
    tens = itertools.groupby(names, key=lambda name: name[:-1])
    return [f"{ten}[{(ends := [name[-1] for name in found])[0]}-{ends[-1]}]" for ten, found in tens]


def _alike(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Yield children, neighbours of one form as one."""
    names: list[str] = []
    first: nn.Module | None = None
    for name, child in module.named_children():
        if first is not None and name.isdigit() and _form(child) == _form(first):
            names.append(name)
            continue
        if first is not None:
            yield names, first
        names, first = [name], child
    if first is not None:
        yield names, first


def _form(module: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
    kinds = [(name, type(child).__name__, ()) for name, child in module.named_modules()]
    return kinds + [
        (name, "", () if is_lazy(value) else tuple(value.shape)) for name, value in module.named_parameters()
    ]


def _shape(module: nn.Module) -> str:
    shapes = [
        f"{name} {'lazy' if is_lazy(value) else 'x'.join(map(str, value.shape))}"
        for name, value in module.named_parameters(recurse=False)
    ]
    return escape(f"({', '.join(shapes)})") if shapes else ""


def load_model(model: str) -> nn.Module:
    """Make a network to look at, on the meta device where that is possible: no weights are read.

    Args:
        model: ``package.module:Class`` (a class or function that needs no arguments), or a hub id or folder of a
            transformers model.

    Raises:
        ValueError: If there is no such thing, or it cannot be made.
    """
    if ":" in model:
        module, _, attribute = model.partition(":")
        sys.path.insert(0, "")  # the user's own modules, as python -m would find them
        try:
            found: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
            made = found()
            if isinstance(made, AdapterMixin):
                made.adapter = None  # what an adapter would find
            if isinstance(made, pl.LightningModule):
                made.configure_model()
        except Exception as error:
            raise ValueError(
                f"inspect: {model!r} cannot be made ({type(error).__name__}: {error}). Name a class or a function that "
                "needs no arguments, as package.module:Name."
            ) from error
        if not isinstance(made, nn.Module):
            raise ValueError(f"inspect: {model!r} gives a {type(made).__name__}; it must give an nn.Module.")
        return made
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 - slow to import

    try:
        with torch.device("meta"):
            network: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"inspect: {model!r} is no folder or hub id of a transformers model that can be reached ({error}). For a "
            "class of your own write package.module:Class."
        ) from error
    return network


def place_of_adapters(model: nn.Module) -> tuple[str | None, list[str]]:
    """Return the name of what adapters would be put on, None if it must be given, and what there is to say of it."""
    if not isinstance(model, pl.LightningModule):
        return WHOLE, []
    said = "Schedules take globs over parameter names: those above and .weight, .bias or .*"
    try:
        given = model.backbone_name if isinstance(model, AdapterMixin) else None
        path = given or find_backbone(model, LoRA(rank=1), owner="inspect")
    except ValueError as error:
        return None, [said, str(error)]
    return path, [said, f"Adapters go on backbone={path!r}; their globs begin inside it."]


def advice(model: nn.Module) -> list[str]:
    """Return what the tree means for adapters and schedules, a sentence a line."""
    path, lines = place_of_adapters(model)
    if path is None:
        return lines
    network = submodule(model, path) or model
    try:
        chosen = LoRA(rank=1).select(network)
    except ValueError as error:
        return [*lines, f'targets="all-linear" does not fit: {error}']
    size = sum(target.width + target.out for target in chosen.values())
    linear = len(linear_layers(network))
    return [
        *lines,
        f'targets="all-linear" adapts {len(chosen)} of its {linear} linear layers: {size:,} x rank numbers.',
    ]


def main(args: list[str] | None = None) -> None:
    """Print the tree of a network."""
    parser = argparse.ArgumentParser(
        "lightning-peft inspect",
        description="Print the layers of a network, with shapes and parameter counts; in blue the glob that selects "
        "a layer (relative to the network, as adapters take it), in green what LoRA's all-linear would adapt.",
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder, or package.module:Class")
    parsed = parser.parse_args(args)
    try:
        model = load_model(parsed.model)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    console.width = max(console.width, 160)  # a piped tree would be cut at 80
    console.print(model_tree(model, name=parsed.model))
    print("\n".join(advice(model)))

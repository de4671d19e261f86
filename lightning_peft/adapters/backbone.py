"""Find the pretrained network inside a module that nobody here wrote."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.matching import nearest

WHOLE = "."
"""The name that stands for the module itself."""


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """Return the module of that dotted name, the module itself for ``"."``, None if there is none."""
    return module if name == WHOLE else dict(module.named_modules()).get(name) if name else None


def prefix_of(name: str) -> str:
    """Return what stands before the names of a submodule's parameters: ``"encoder."``, nothing for ``"."``."""
    return "" if name == WHOLE else f"{name}."


def find_backbone(module: nn.Module, adapter: Adapter, *, owner: str = "find_backbone") -> str:
    """Return the name of the child that an adapter is for.

    That is the child called ``backbone``, else the only child that is a network (it has modules of its own) and that
    the adapter fits.

    Args:
        module: What holds the pretrained network, usually a LightningModule.
        adapter: What is to be added.
        owner: Who asks; the error message begins with it.

    Raises:
        ValueError: If no child fits, or several do; the message lists them with their parameter counts.

    >>> from lightning_peft import LoRA
    >>> net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), "head": nn.Linear(9, 2)})
    >>> find_backbone(net, LoRA())
    'encoder'
    """
    children = dict(module.named_children())
    if "backbone" in children:
        return "backbone"
    refusals = {name: _refusal(child, adapter) for name, child in children.items()}
    fitting = [name for name, reason in refusals.items() if reason is None]
    if len(fitting) == 1:
        return fitting[0]
    found = f"{len(fitting)} children fit" if fitting else "no child fits"
    listed = "".join(
        f"\n  {name} ({type(child).__name__}, {parameter_count(child):,})"
        + (f": {refusals[name]}" if refusals[name] else "")
        for name, child in children.items()
        if name in fitting or (not fitting and parameter_count(child))
    )
    raise ValueError(
        f"{owner}: backbone is not given, and {found} {adapter!r}. Pass backbone= with the dotted name of the pretrained "
        f'network, or "." for the module itself. Children with their parameter counts:{listed or " none"}'
    )


def _refusal(child: nn.Module, adapter: Adapter) -> str | None:
    return adapter.refusal(child) if any(child.children()) else "one layer, no network"


def unknown_backbone(module: nn.Module, name: str, *, owner: str) -> ValueError:
    """Return the error for a name that is none of a module's modules."""
    names = [path for path, _ in module.named_modules() if path]
    return ValueError(
        f"{owner}: backbone={name!r} is none of its modules. Nearest: {nearest(name, names)}. "
        'Pass backbone="name" with the name of the pretrained network, or "." for the module itself.'
    )


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers a module has, without those of lazy layers that have not seen a batch yet."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))

"""Which parameters the inner loop of meta-learning changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.matching import match_names, nearest
from lightning_peft.meta.places import tree


def inner_names(module: nn.Module, adapt: str | Sequence[str], *, owner: str) -> list[str]:
    """Return the names of parameters that require a gradient and that ``adapt`` means, in the module's order.

    Args:
        module: Whose parameters.
        adapt: ``"all"``, ``"head"`` (what is called ``head``, ``classifier`` or ``fc``), ``"adapters"``, or globs.
        owner: Who asks; the error message begins with it.

    Raises:
        ValueError: If there is none.

    >>> inner_names(nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), "head", owner="here")
    ['head.weight', 'head.bias']
    """
    named: dict[int, str] = {}
    for path, child in tree(module):
        for key, parameter in child._parameters.items():
            if parameter is not None and parameter.requires_grad:
                named.setdefault(id(parameter), f"{path}.{key}" if path else key)
    trainable = list(named.values())
    if not trainable:
        raise ValueError(f"{owner}: no parameter requires a gradient, so nothing can adapt.")
    if adapt == "all":
        return trainable
    if adapt == "adapters":
        return _of_adapters(module, trainable, owner)
    if adapt == "head":
        heads = [name for name in trainable if {"head", "classifier", "fc"} & set(name.split("."))]
        if not heads:
            raise ValueError(
                f"{owner}: adapt='head' finds no module called head, classifier or fc among what trains. Nearest: "
                f"{nearest('head', trainable)}. Give globs over the names of parameters, as adapt=['last.*']."
            )
        return heads
    return match_names(trainable, adapt, owner=f"{owner}: adapt", kind="trainable parameter")


def _of_adapters(module: nn.Module, trainable: Sequence[str], owner: str) -> list[str]:
    added = set()
    for path, child in module.named_modules():
        if (attachment := attachment_of(child)) is not None:
            names = attachment.trained.get(attachment.active or "", set()) - attachment.flags.keys()
            added |= {f"{path}.{name}".lstrip(".") for name in names}
    found = [name for name in trainable if name in added]
    if not found:
        raise ValueError(
            f"{owner}: adapt='adapters' finds no adapter that trains. Write class Mine({owner}, LoRAMixin, MyModule), or put "
            "one on with add_adapter."
        )
    return found

"""Find the output layer of a head, and start it at zero."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft.matching import nearest
from lightning_peft.tied import tied_weights


def output_layer(module: nn.Module, head: str, *, owner: str = "output_layer") -> nn.Linear:
    """Return the last linear layer of a head.

    Args:
        module: The module that holds the head.
        head: Dotted name of the head: a linear layer, or a module whose last linear layer gives the output.
        owner: Who asks; the error message begins with it.

    Raises:
        ValueError: If the name is unknown, the head holds no linear layer, or its weight is another module's too.

    >>> output_layer(nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))}), "head")
    Linear(in_features=4, out_features=2, bias=True)
    """
    modules = {name: child for name, child in module.named_modules() if name}
    if head not in modules:
        raise ValueError(
            f"{owner}: head={head!r} is no module of {type(module).__name__}. Nearest: {nearest(head, modules)}."
        )
    linear = [child for child in modules[head].modules() if isinstance(child, nn.Linear)]
    if not linear:
        raise ValueError(
            f"{owner}: head={head!r} ({type(modules[head]).__name__}) holds no linear layer. Name the module that "
            "turns features into outputs."
        )
    layer = linear[-1]
    shared = tied_weights(module).get(next(name for name, child in modules.items() if child is layer))
    if shared:
        raise ValueError(
            f"{owner}: head={head!r} shares its weight with {shared}, so zeroing it would wreck what is pretrained. Name a "
            "head that is new."
        )
    return layer


@torch.no_grad()
def zero_init(layer: nn.Linear) -> None:
    """Set weight and bias to zero: with ``logits = W h``, the gradient that reaches ``h`` is then exactly zero.

    >>> layer = nn.Linear(3, 2); zero_init(layer); layer(torch.ones(1, 3))
    tensor([[0., 0.]], grad_fn=<AddmmBackward0>)
    """
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()

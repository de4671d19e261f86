"""Find the output layer of a head, and start it at zero, or at what the targets are on average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.distributed import gather_objects
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


@dataclass
class _Targets:
    """What is known of some targets: how many there are, their sums (of classes, the counts), and what they may be."""

    rows: int
    sums: Tensor
    kinds: set[str]

    def __add__(self, other: _Targets) -> _Targets:
        return _Targets(self.rows + other.rows, self.sums + other.sums, self.kinds | other.kinds)


def prior_bias(targets: Iterable[Tensor], outputs: int, *, owner: str = "prior_bias") -> Tensor:
    """Return the bias with which a head of zero weight predicts the average of the targets, over all processes.

    ``log p_c`` of the class frequencies for whole numbers and several outputs; ``log p - log(1 - p)`` of each column for targets
    that are all 0 or 1, as binary cross-entropy takes them; else each column's mean, for regression. A class that no row has
    counts as seen once; negative classes are targets that losses ignore.

    Lin et al. 2017, arXiv:1708.02002, section 3.3 (a prior in the last bias).

    Args:
        targets: This process's targets, batch by batch.
        outputs: How many outputs the head has.
        owner: Who asks; the error message begins with it.

    Raises:
        ValueError: If there is no target, or they do not fit the outputs.

    >>> prior_bias([torch.tensor([0, 0, 0, 1])], outputs=2).exp()
    tensor([0.7500, 0.2500], dtype=torch.float64)
    >>> prior_bias([torch.tensor([1.0, 2.0, 6.0])], outputs=1)
    tensor([3.], dtype=torch.float64)
    """
    none = _Targets(0, torch.zeros(outputs, dtype=torch.float64), set())
    own = sum((_summed(batch.detach().cpu(), outputs, owner) for batch in targets), none)
    found = sum(gather_objects(own), none)
    if not found.rows:
        raise ValueError(f"{owner}: the training data gave no target.")
    if found.kinds == {"classes"}:
        counts = found.sums.clamp(min=1)
        return (counts / counts.sum()).log()
    if "classes" in found.kinds:
        raise ValueError(f"{owner}: some batches have whole numbers as targets and some have not.")
    if found.kinds == {"binary"}:  # one batch with another value makes it a regression
        return (found.sums.clamp(min=1, max=max(found.rows - 1, 1)) / found.rows).logit()
    return found.sums / found.rows


def _summed(targets: Tensor, outputs: int, owner: str) -> _Targets:
    if targets.dtype != torch.bool and not targets.is_floating_point() and outputs > 1:
        kept = targets[targets >= 0]
        if kept.numel() and int(kept.max()) >= outputs:
            raise ValueError(f"{owner}: a target is class {int(kept.max())}, and the head has {outputs} outputs.")
        counts = torch.bincount(kept.flatten(), minlength=outputs).double()
        return _Targets(kept.numel(), counts, {"classes"} if kept.numel() else set())
    if targets.numel() % outputs or (outputs > 1 and targets.shape[-1] != outputs):
        raise ValueError(f"{owner}: targets of shape {tuple(targets.shape)} do not fit a head of {outputs} outputs.")
    columns = targets.double().reshape(-1, outputs)
    binary = bool(((columns == 0) | (columns == 1)).all())
    return _Targets(len(columns), columns.sum(0), {"binary" if binary else "values"})

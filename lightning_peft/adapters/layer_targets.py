"""Targets that must be layers of certain kinds, for adapters that do not fit everything a LoRA fits."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from lightning_peft.adapters.layer_kinds import AdaptedLinear, kind_of, own_forward
from lightning_peft.adapters.lora_targets import Target, select_targets
from lightning_peft.adapters.quantised import is_quantised


def select_layers(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: Sequence[str],
    kinds: Collection[type[AdaptedLinear]],
    *,
    owner: str,
) -> dict[str, Target]:
    """Return the layers that globs choose, all of them of the given kinds.

    Args:
        model: The network.
        targets: Globs over names of layers, or ``"all-linear"``.
        exclude: Globs of layers to leave out.
        kinds: The kinds that the adapter fits.
        owner: Whose targets they are, for the error messages.

    Raises:
        ValueError: If a glob matches nothing, or what is chosen is another kind of module or computes by itself.

    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    >>> list(select_layers(net, ["1"], [], [AdaptedLinear], owner="IA3"))
    ['1']
    """
    chosen = select_targets(model, targets, exclude, owner=owner)
    unfit = {
        name: type(target.module).__name__
        for name, target in chosen.items()
        if kind_of(target.module) not in kinds or (own_forward(target.module) and not is_quantised(target.module))
    }
    if unfit:
        name, kind = next(iter(unfit.items()))
        raise ValueError(
            f"{owner}: {name!r} is a {kind}, which it does not fit: it goes on layers of torch's own linear or "
            f"convolutional classes. Leave out with exclude={list(unfit)}."
        )
    return chosen

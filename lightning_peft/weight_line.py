"""The straight line between two states of a network, also where adapters hold the difference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.adapters.lora_update import LoRAUpdate, ParametersLoRA
from lightning_peft.adapters.updates import ATTRIBUTE, Update, hosts
from lightning_peft.adapters.vera_update import VeRAUpdate

_HELD = ("lora_A", "vera_lambda_d")
_SCALED = ("lora_B", "vera_lambda_b")
_LOW_RANK = (LoRAUpdate, ParametersLoRA, VeRAUpdate)


class WeightLine:
    """The line ``w(alpha) = (1 - alpha) * start + alpha * end`` from given weights to the present ones of a module.

    Of LoRA and VeRA it is the line of the weights that they amount to, ``W + alpha * (update)``: the factor ``B`` (``b``) is
    scaled and the other stays. Interpolating both would not be a straight line.

    Args:
        module: At its end of the line. Everything is kept on the CPU.
        start: Values at the other end, by names of parameters and buffers. What is not among them does not move.

    Raises:
        ValueError: For a LoRA with magnitudes (DoRA) or with a start other than zero, and for layers of the package peft.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(net.weight, 4.0)
    >>> WeightLine(net, {"weight": torch.tensor([[2.0]])}).go_to(0.25)
    >>> net.weight.item()
    2.5
    """

    def __init__(self, module: nn.Module, start: Mapping[str, Tensor]) -> None:
        refuse_curved(module, "WeightLine")
        tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._factors = _factors(module)
        self._ways: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, value in start.items():
            if name in tensors:
                end = tensors[name].detach().to("cpu", copy=True)
                if not torch.equal(value.cpu(), end):  # also keeps infinities, which have no line between them
                    self._ways[name] = tensors[name], value.cpu().to(end.dtype), end

    @torch.no_grad()
    def go_to(self, alpha: float) -> None:
        """Put the weights of a point into the module; 0 and 1 are the ends, bit for bit.

        Args:
            alpha: Share of the way from the start.
        """
        for name, (tensor, start, end) in self._ways.items():
            wide = torch.promote_types(end.dtype, torch.float32)
            kind = self._factors.get(name)
            if kind == "held":
                tensor.copy_(end)
            elif kind == "scaled":
                tensor.copy_(end.to(wide) * alpha)
            else:
                tensor.copy_(torch.lerp(start.to(wide), end.to(wide), alpha))


def _factors(module: nn.Module) -> dict[str, str]:
    """Return the names of the factors of low-rank updates, and whether each is ``scaled`` or ``held`` along the line."""
    kinds = {}
    for path, _, updates in hosts(module):
        for name, update in updates.named_children():
            for parameter, _ in update.named_parameters() if isinstance(update, _LOW_RANK) else ():
                factor = parameter.partition(".")[0]
                if factor in (*_HELD, *_SCALED):
                    whole = ".".join([*filter(None, [path]), ATTRIBUTE, name, parameter])
                    kinds[whole] = "scaled" if factor in _SCALED else "held"
    return kinds


def refuse_curved(module: nn.Module, owner: str, *, begins: bool = False) -> None:
    """Refuse adapters whose updates cannot be scaled along the line.

    Args:
        module: With or without adapters.
        owner: Who asks; the error message begins with it.
        begins: Whether its present weights are the start of the line, where an update must be zero.

    Raises:
        ValueError: With the cure.
    """
    for path, layer in module.named_modules():
        if type(layer).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{owner}: {path!r} is a {type(layer).__name__} of the package peft, whose factors cannot be told from "
                "weights. Take the adapter over with lightning_peft.from_peft, or merge it before training."
            )
    for path, _, updates in hosts(module):
        update = updates.current
        if isinstance(update, LoRAUpdate) and (update.lora_magnitude_vector is not None or update.start_A is not None):
            raise ValueError(
                f"{owner}: the LoRA of {path!r} has magnitudes (dora=True) or an init= of its own, so no scaling of its "
                "factors is the line between the weights. Use LoRA(dora=False, init='default')."
            )
        if begins and update is not None and _acts(update):
            raise ValueError(
                f"{owner}: the adapter of {path!r} has been trained before: both its factors are other than zero, so scaling one "
                "does not lead to where this training begins. Merge it (merge_adapter, remove_adapter) and add a new one."
            )


def _acts(update: Update) -> bool:
    if not isinstance(update, _LOW_RANK):
        return False
    parts = [
        [p for name, p in update.named_parameters() if name.partition(".")[0] in names] for names in (_HELD, _SCALED)
    ]
    return all(any(bool(p.any()) for p in part) for part in parts)

"""Rates of the inner loop that the outer loop learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.meta.config import LearnedRates

Rate = float | list[Tensor]
"""Of one step: a number, or a tensor for each adapted tensor, that broadcasts to it."""


class InnerRates(nn.Module):
    """Learned rates: one, one for each tensor, for each tensor and step, or for each weight.

    Rates may become negative, as in the papers (Li et al. 2017, arXiv:1707.09835, section 3.1; Antoniou et al. 2019,
    arXiv:1810.09502, section 4).

    Args:
        kind: What has a rate of its own.
        parameters: What is adapted.
        start: The rate that all begin with.
        steps: Steps that have rates of their own under ``"layer_step"``; a later step uses those of the last.

    >>> rates = InnerRates("layer_step", {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, start=0.5, steps=2)
    >>> rates.values.shape, [rate.item() for rate in rates.at(7, ["bias"])]
    (torch.Size([2, 2]), [0.5])
    """

    def __init__(self, kind: LearnedRates, parameters: Mapping[str, Tensor], *, start: float, steps: int) -> None:
        super().__init__()
        self.kind, self.places = kind, {name: place for place, name in enumerate(parameters)}
        like = next(iter(parameters.values()))
        self.values: Any  # a list of parameters, or one
        if kind == "parameter":
            self.values = nn.ParameterList(nn.Parameter(torch.full_like(p, start)) for p in parameters.values())
            return
        shape = {"global": (), "layer": (len(parameters),), "layer_step": (steps, len(parameters))}[kind]
        self.values = nn.Parameter(torch.full(shape, start, device=like.device, dtype=like.dtype))

    def at(self, step: int, names: Sequence[str] | None = None) -> list[Tensor]:
        """Return the rates of a step, in the order of what is adapted; unset, of all that have one.

        Raises:
            ValueError: For a name that has no rate.
        """
        names = list(self.places) if names is None else names
        if self.kind == "global":
            return [self.values] * len(names)
        if unknown := [name for name in names if name not in self.places]:
            raise ValueError(
                f"InnerRates: {unknown[0]!r} adapts and has no rate; configure_model gave one to {len(self.places)} others. What "
                "trains later, or comes from a mixin that stands before, gets none: train it then, or use learn_inner_lr='global'."
            )
        if self.kind == "layer_step":
            rates = self.values[min(step, len(self.values) - 1)].unbind()
        else:
            rates = list(self.values) if self.kind == "parameter" else self.values.unbind()
        return [rates[self.places[name]] for name in names]

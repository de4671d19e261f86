"""How far a weight is from where it began, and which part of the way weight decay made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, NAdam, Optimizer, RAdam

from lightning_peft.gradient_norms import norm_of

_BY_FLAG = (Adam, AdamW, NAdam, RAdam)
_ALWAYS = (Adafactor, Muon)


def decay_rate(optimizer: Optimizer, group: dict[str, Any]) -> float | None:
    """Return the fraction ``lr * weight_decay`` that a step takes off each weight of a group, beside its gradient's part.

    Known for decoupled decay (Loshchilov & Hutter 2019, arXiv:1711.05101): torch's ``AdamW``, ``Adafactor``, ``Muon``, and
    ``Adam``, ``NAdam`` and ``RAdam`` with ``decoupled_weight_decay=True``; and for ``SGD`` without momentum, where decay that is
    added to the gradient comes to the same. Where it goes through momentum or a divisor it is no such fraction.

    Args:
        optimizer: Of one of these very classes: what a subclass does is not known.
        group: One of its groups, as it is while the step is taken.

    Returns:
        0 for a group without decay, whatever the optimizer; ``None`` if the optimizer is none of these.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizers = AdamW([weight], lr=0.5, weight_decay=0.25), SGD([weight], lr=0.5, momentum=0.9, weight_decay=0.25)
    >>> [decay_rate(optimizer, optimizer.param_groups[0]) for optimizer in optimizers]
    [0.125, None]
    """
    decay, kind = float(group.get("weight_decay", 0)), type(optimizer)
    if not decay:
        return 0.0
    by_flag = kind in _BY_FLAG and group["decoupled_weight_decay"]
    plain = kind is SGD and not group["momentum"]
    return float(group["lr"]) * decay if by_flag or plain or kind in _ALWAYS else None


@dataclass
class Drift:
    """The way of one weight since its first step, and the part that decay made of it.

    Decay has moved the weight by ``-sum_t r_t w_t`` with the rates ``r_t`` of :func:`decay_rate`. The rates are summed at every
    step, the weights are seen at looks only, and between two looks they are taken to move on a straight line: the trapezoid
    rule with the rates of every step. Its error falls with the square of the steps between two looks. What is left of the
    distance is the gradient's part, so that both add up to it exactly.

    The weight at a look has a share in the interval before and in the one after. The second is booked in advance, for rates that
    stay as they are, and put right at the next look with the weight that stands there then: an error of the same order,
    for which no third copy has to be kept.

    Args:
        reference: The weight before its first step.
        decayed: What decay did, and the share that is booked in advance, in ``float32`` or wider; unset while there was none.
        booked: That share.
        rate: Of the last step.
        rates: Sum of the rates since the last look.
        area: Sum over the steps since then of the sum up to each.
        steps: Number of those steps.
        looks: Number of looks that were settled.
        known: Whether the rate of every step so far was known.

    >>> drift = Drift(torch.tensor([2.0]))
    >>> drift.count(rate=0.5)
    >>> {name: float(norm) for name, norm in drift.look(torch.tensor([2.0 - 0.5 * 2.0 + 3.0])).items()}
    {'start': 2.0, 'weight': 4.0, 'distance': 2.0, 'decay': 1.0, 'gradient': 3.0}
    """

    reference: Tensor
    decayed: Tensor | None = None
    booked: float = 0.0
    rate: float = 0.0
    rates: float = 0.0
    area: float = 0.0
    steps: int = 0
    looks: int = 0
    known: bool = True

    def count(self, rate: float | None) -> None:
        """Note a step that the weight has taken.

        Args:
            rate: What :func:`decay_rate` returned for it.
        """
        self.known = self.known and rate is not None
        self.rate = rate or 0.0
        self.rates += self.rate
        self.area += self.rates
        self.steps += 1

    @torch.no_grad()
    def look(self, weight: Tensor) -> dict[str, Tensor]:
        """Return norms (:func:`~lightning_peft.gradient_norms.norm_of`): of start, weight, distance, and its two parts.

        Args:
            weight: As it is now.

        Returns:
            ``decay`` and ``gradient`` are missing if a step's rate was not known.
        """
        moved = _wide(weight) - self.reference
        norms = {"start": norm_of(self.reference), "weight": norm_of(weight), "distance": norm_of(moved)}
        if not self.known:
            return norms
        if self.decayed is None and not self.rates:
            return norms | {"decay": torch.zeros_like(norms["distance"]), "gradient": norms["distance"]}
        decay = self._decay(weight)
        return norms | {"decay": norm_of(decay), "gradient": norm_of(moved.sub_(decay))}

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """End an interval: add its decay to what was before, and book the share of the next one.

        Args:
            weight: As it is now.
        """
        if not self.known:
            self.decayed = None
        elif self.rates or self.decayed is not None:
            booked = self.rate * (self.steps + 1) / 2  # of an interval of as many steps with this rate
            if self.decayed is None:
                self.decayed = self._decay(weight).add_(weight, alpha=-booked)
            else:
                self.decayed.add_(weight, alpha=self.booked - self.rates - booked)
            self.booked = booked
        self.rates, self.area, self.steps, self.looks = 0.0, 0.0, 0, self.looks + 1

    def _decay(self, weight: Tensor) -> Tensor:
        if self.decayed is not None:
            return self.decayed.add(weight, alpha=self.booked - self.rates)
        # The first interval begins at a weight that is still known, and that has its exact share in it.
        share = self.area / self.steps if self.looks == 0 else 0.0
        return (_wide(self.reference) * -share).add_(weight, alpha=share - self.rates)

    def place(self, weight: Tensor) -> None:
        """Put copies that come from a checkpoint where the weight is: on its device, sharded like it.

        Args:
            weight: Whose copies they are.
        """
        self.reference = _like(self.reference, weight)
        self.decayed = None if self.decayed is None else _like(self.decayed, weight)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and whole tensors; of sharded weights all ranks must call it."""
        return {field.name: _whole(getattr(self, field.name)) for field in fields(self)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    copied: Tensor = tensor.to(weight.device, copy=True)
    if hasattr(weight, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - only where weights are sharded

        return distribute_tensor(copied, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
    return copied


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value

"""Losses that hold a network to what it was, and the network as it was: its reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from lightning_peft.adapters.attachment import Attachment, attachment_of
from lightning_peft.adapters.layer import is_merged
from lightning_peft.adapters.switch import adapter_disabled
from lightning_peft.adapters.updates import ATTRIBUTE
from lightning_peft.randomness import random_state_kept

IGNORED = -100
"""The label of rows and tokens that have none."""


def kl_to_reference(
    logits: Tensor,
    reference: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    excluded: Tensor | None = None,
) -> Tensor:
    """Return how far a network's distributions are from the reference's, in nats: the mean over rows or tokens.

    ``KL(reference || model) = sum_c q_c (log q_c - log p_c)``, with ``p`` from the logits and ``q`` from the reference, each
    ``softmax(logits / T)``; times ``T^2``, so that the gradient keeps its size. A class with ``q_c = 0`` counts 0.
    Hinton et al. 2015, arXiv:1503.02531; Li & Hoiem 2017, arXiv:1606.09282 (LwF). Computed in ``float32`` or wider.

    Args:
        logits: ``(..., classes)``; the gradient goes here.
        reference: Of the same shape.
        temperature: ``T``.
        mask: ``(...)``, true (or a weight) for rows or tokens that count; with none, the loss is 0.
        excluded: ``(...)``, the index of a class that is left out of both distributions, which then add up to 1 without it;
            negative for none. Leaving out the target lets the new task move it freely ("Mask the Target", arXiv:2605.29498).

    Raises:
        ValueError: For shapes that do not fit, or a temperature that is not positive.

    >>> model, reference = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(float(kl_to_reference(model, reference)), 6)
    0.143841
    """
    _check_pair(logits, reference, mask, "kl_to_reference")
    if not temperature > 0:
        raise ValueError(f"kl_to_reference: temperature={temperature!r} must be above 0; 1 changes nothing.")
    _check_each(excluded, logits, "kl_to_reference: excluded")
    out = None if excluded is None else _one_hot(excluded, logits)
    log_p, log_q = _log_softmax(logits, temperature, out), _log_softmax(reference.detach(), temperature, out)
    terms = log_q.exp() * (log_q - log_p)
    divergence = terms.masked_fill(log_q == -torch.inf, 0).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def mse_to_reference(features: Tensor, reference: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of features, the mean over rows or tokens.

    Romero et al. 2015, arXiv:1412.6550 (FitNets: hints). Computed in ``float32`` or wider.

    Args:
        features: ``(..., width)``; the gradient goes here.
        reference: Of the same shape.
        mask: ``(...)``, true (or a weight) for rows or tokens that count; with none, the loss is 0.

    Raises:
        ValueError: For shapes that do not fit.

    >>> float(mse_to_reference(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)))
    5.0
    """
    _check_pair(features, reference, mask, "mse_to_reference")
    return _mean((_wide(features) - _wide(reference.detach())).square().mean(-1), mask)


def der_loss(
    logits: Tensor, stored: Tensor, labels: Tensor, *, alpha: float = 0.5, beta: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """Return the loss of DER++ on memory rows: ``alpha * MSE(logits, stored) + beta * CE(logits, labels)``.

    Buzzega et al. 2020, arXiv:2004.07211. The mean squared difference is over rows or tokens and classes. The paper draws other
    rows for each term; here both are on the same ones. With ``beta=0`` it is DER.

    Args:
        logits: ``(..., classes)``; the gradient goes here.
        stored: Logits of an earlier network, of the same shape.
        labels: ``(...)``, class indices; -100 for a row or token without a label.
        alpha: Weight of the logits.
        beta: Weight of the labels.
        mask: ``(...)``, true (or a weight) for rows or tokens whose stored logits count.

    Raises:
        ValueError: For shapes that do not fit.

    >>> float(der_loss(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0]), alpha=0.5, beta=0.0))
    0.5
    """
    _check_each(labels, logits, "der_loss: labels")
    flat = _wide(logits).flatten(0, -2)
    entropies = F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORED)
    return alpha * mse_to_reference(logits, stored, mask=mask) + beta * _mean(entropies, labels.flatten() != IGNORED)


def _check_pair(outputs: Tensor, reference: Tensor, mask: Tensor | None, owner: str) -> None:
    if outputs.shape != reference.shape or outputs.ndim < 2:
        raise ValueError(
            f"{owner}: shapes {tuple(outputs.shape)} and {tuple(reference.shape)} must be the same, (rows, ..., classes). An "
            "adapter that lengthens sequences (a soft prompt) needs its own positions cut off."
        )
    _check_each(mask, outputs, f"{owner}: mask")


def _check_each(found: Tensor | None, outputs: Tensor, what: str) -> None:
    if found is not None and found.shape != outputs.shape[:-1]:
        raise ValueError(
            f"{what} has shape {tuple(found.shape)} beside outputs of {tuple(outputs.shape)}. It needs one entry for each of "
            "their rows or tokens."
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    hit = (index >= 0).unsqueeze(-1)
    return torch.zeros_like(like, dtype=torch.bool).scatter(-1, index.clamp(min=0).unsqueeze(-1), hit)


def _log_softmax(logits: Tensor, temperature: float, out: Tensor | None) -> Tensor:
    scaled = _wide(logits) / temperature
    return F.log_softmax(scaled if out is None else scaled.masked_fill(out, -torch.inf), dim=-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weighted mean; 0, with a gradient of 0, where nothing counts."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    weights = mask.to(values)
    total = weights.sum()
    return (values.masked_fill(weights == 0, 0) * weights).sum() / torch.where(total > 0, total, 1)


@dataclass
class Reference:
    """A network as it was: its adapters off or as they were, and all else that trains or moves at the values it had.

    What an adapter adds needs no copy. Of parameters outside of it that train, and of floating point buffers (running
    statistics), it keeps one, made before they move. Plain tensors: in no optimizer, in no ``state_dict``.

    Args:
        adapters_on: The reference has the adapters as they were, too, instead of none: what they add is copied then.

    >>> net, reference = nn.Linear(1, 1, bias=False), Reference()
    >>> _ = net.weight.data.fill_(2.0)
    >>> reference.keep(net)
    >>> _ = net.weight.data.fill_(5.0)
    >>> with reference.acting(net):
    ...     net.weight.item()
    2.0
    >>> net.weight.item()
    5.0
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    adapters_on: bool = False

    @torch.no_grad()
    def keep(self, module: nn.Module) -> None:
        """Take down what trains and is not kept yet; buffers at the first call only.

        Args:
            module: The network, before what trains in it has taken a step.
        """
        if not self.buffers:
            places = _buffers(module).items()
            self.buffers = {name: getattr(owner, key).detach().clone() for name, (owner, key) in places}
        added, moved = (set(), set()) if self.adapters_on else _adapters_own(module)
        copies: dict[int, Tensor] = {id(p): self.parameters[n] for n, p in _named(module) if n in self.parameters}
        for name, parameter in _named(module):
            if (parameter.requires_grad or name in moved) and name not in added and name not in self.parameters:
                if id(parameter) not in copies:
                    copies[id(parameter)] = parameter.detach().clone()
                self.parameters[name] = copies[id(parameter)]

    def place(self, module: nn.Module) -> None:
        """Move copies that came with a checkpoint to where the network is."""
        for name, parameter in _named(module):
            if name in self.parameters:
                self.parameters[name] = self.parameters[name].to(parameter.device)
        for name, (owner, key) in _buffers(module).items():
            if name in self.buffers:
                self.buffers[name] = self.buffers[name].to(getattr(owner, key).device)

    @contextmanager
    def acting(self, module: nn.Module) -> Iterator[None]:
        """Let the module be the reference for a while, without gradient, in eval mode; it is untouched afterwards.

        So are the train or eval mode of every single module, running statistics and the generators of random numbers.

        Args:
            module: The network whose reference this is; its adapter may be merged.

        Raises:
            ValueError: If weights below an adapter have trained that nobody kept; for a merged adapter that should be on.
        """
        rest = dict(self.parameters)
        with ExitStack() as stack:
            stack.enter_context(_inert(module))
            if self.adapters_on and is_merged(module):
                raise ValueError(
                    "Reference: the adapter is merged, so it cannot be put back to what it was. Unmerge it."
                )
            for path, network, attachment in [] if self.adapters_on else adapted_networks(module):
                own = {key: rest.pop(f"{path}{key}") for key in attachment.flags if f"{path}{key}" in rest}
                stack.enter_context(_without_adapter(network, attachment, own))
            _put_in(module, rest, self.buffers, stack)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors by name."""
        return {
            "parameters": dict(self.parameters),
            "buffers": dict(self.buffers),
            "adapters_on": self.adapters_on,
        }


def adapted_networks(module: nn.Module) -> list[tuple[str, nn.Module, Attachment]]:
    """Return the networks in a module that carry adapters: the prefix of their parameters' names, they, and their record."""
    found = [(path, child, attachment_of(child)) for path, child in module.named_modules()]
    return [(f"{path}." if path else "", child, record) for path, child, record in found if record is not None]


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(remove_duplicate=False))  # a tied weight under each of its names


def _adapters_own(module: nn.Module) -> tuple[set[str], set[str]]:
    """Return the parameters that adapters look after themselves, and those below them that have trained."""
    own: set[str] = set()
    moved: set[str] = set()
    for path, _, attachment in adapted_networks(module):
        added = set().union(*attachment.trained.values()) - attachment.flags.keys()
        own |= {path + name for name in added | attachment.found.keys()}
        moved |= {path + name for name in attachment.ever_trained & attachment.flags.keys()}
    return own, moved


def _buffers(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return where floating point buffers and counters are; adapters are off, and packed weights do not move."""
    return {
        f"{path}.{key}".lstrip("."): (child, key)
        for path, child in module.named_modules()
        if ATTRIBUTE not in path.split(".")
        for key, value in child.named_buffers(recurse=False)
        if value.is_floating_point() or value.numel() == 1
    }


@contextmanager
def _inert(module: nn.Module) -> Iterator[None]:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    training = [child for child in module.modules() if child.training]
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it knows a weight by its object, whose values are changed here
    for child in training:
        child.training = False
    try:
        with random_state_kept(device), torch.no_grad():
            yield
    finally:
        for child in training:
            child.training = True
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def _without_adapter(network: nn.Module, attachment: Attachment, own: dict[str, Tensor]) -> Iterator[None]:
    found = attachment.found
    attachment.found = {**found, **own}  # what adapter_disabled puts back
    try:
        with adapter_disabled(network):
            yield
    finally:
        attachment.found = found


def _put_in(module: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], stack: ExitStack) -> None:
    for name, parameter in _named(module):
        if name in parameters:
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameters[name].to(parameter.device, parameter.dtype)
    for name, (owner, key) in _buffers(module).items():
        if name in buffers:
            here = getattr(owner, key)
            stack.callback(owner._buffers.__setitem__, key, here)
            owner._buffers[key] = buffers[name].to(here.device, here.dtype)

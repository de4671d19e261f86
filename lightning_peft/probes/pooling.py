"""One vector for a row of tokens: which layers of a network are read, and how their tokens are put together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pooling = Literal["mean", "cls", "last", "attention"]
"""How tokens become one vector; ``"attention"`` leaves them to an :class:`AttentionPool`, which trains."""


def pool(states: Tensor, mask: Tensor, how: Pooling = "mean") -> Tensor:
    """Put the tokens of each row together, ``(..., tokens, features)`` to ``(..., features)``.

    Args:
        states: ``(rows, tokens, features)``, or with further dimensions, such as layers, between the first two.
        mask: ``(rows, tokens)``, 1 for tokens and 0 for padding, which may be on either side.
        how: ``"mean"`` over the tokens; ``"cls"``, the first token, of encoders that were trained so; ``"last"``, the last
            one, the only one that has seen the whole row in a causal model.

    Raises:
        ValueError: For another word.

    >>> states = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> [pool(states, torch.tensor([[1, 1, 0]]), how).item() for how in ("mean", "cls", "last")]
    [2.0, 1.0, 3.0]
    """
    wide = mask.view(len(mask), *[1] * (states.dim() - 3), mask.shape[1])
    if how == "mean":
        weights = wide.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(-2) / weights.sum(-2)
    places = torch.arange(mask.shape[1], device=mask.device)
    if how == "cls":
        at = mask.argmax(1)
    elif how == "last":
        at = (places * mask).argmax(1)
    else:
        raise ValueError(f"pool: pooling={how!r} must be 'mean', 'cls' or 'last'.")
    index = at.view(len(mask), *[1] * (states.dim() - 1)).expand(*states.shape[:-2], 1, states.shape[-1])
    return states.gather(-2, index).squeeze(-2)


def hidden_features(
    network: nn.Module, inputs: Mapping[str, Tensor], *, layers: Sequence[int] = (-1,), pooling: Pooling = "mean"
) -> Any:
    """Return what the layers of a transformers model say about each row.

    Args:
        network: The model. Of one with a head only the body runs, so a language model pays for no vocabulary.
        inputs: A tokenised batch. What the model does not take, and labels, are left out.
        layers: Numbers of hidden states: 0 is the embedding, -1 the last layer; several stand side by side.
        pooling: How tokens become one vector.

    Returns:
        ``(rows, layers x width)``; with ``pooling="attention"`` the tokens, ``(rows, tokens, layers x width)``, and their mask.

    Raises:
        ValueError: For a layer that the model does not have, or a model that gives no hidden states.
    """
    states = hidden_states(network, inputs)
    if wrong := [layer for layer in layers if not -len(states) <= layer < len(states)]:
        raise ValueError(
            f"hidden_features: layers={list(layers)!r}: there is no {wrong[0]}. {type(network).__name__} has the hidden states 0 "
            f"(the embedding) to {len(states) - 1}."
        )
    chosen = [states[layer] for layer in layers]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(chosen[0].shape[:2], dtype=torch.long, device=chosen[0].device)
    if pooling == "attention":
        return torch.cat(chosen, -1), mask
    return torch.cat([pool(one, mask, pooling) for one in chosen], -1)


def hidden_states(network: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the embedding and every layer's output of a transformers model, ``(rows, tokens, width)`` each.

    Raises:
        ValueError: If it gives none.
    """
    body: Any = getattr(network, "base_model", network)
    taken = inspect.signature(body.forward).parameters
    given = {name: inputs[name] for name in inputs if name in taken and name != "labels"}
    extra = {"use_cache": False} if "use_cache" in taken else {}
    if not given:
        raise ValueError(
            f"hidden_features: the batch has {sorted(inputs)}, of which {type(body).__name__} takes nothing. Define "
            "features(self, inputs) in the module."
        )
    output = body(**given, **extra, output_hidden_states=True)
    states: tuple[Tensor, ...] | None = getattr(output, "hidden_states", None)
    if not states:
        raise ValueError(
            f"hidden_features: {type(body).__name__} gives no hidden states. Define features(self, inputs) in the module."
        )
    return states

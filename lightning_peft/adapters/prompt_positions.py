"""How a network numbers its tokens when the caller does not say, and how a prompt moves the numbers on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def bound_call(inputs: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    return {**dict(zip(inputs, args)), **kwargs}  # noqa: B905 - torch up to 2.9 cannot compile strict=


def check_length(length: int, tokens: int, max_length: int | None, *, owner: str, kind: str) -> None:
    """Check that a network has learned as many positions as an input needs with its prompt.

    Raises:
        ValueError: If it has not.
    """
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{owner}: input and {kind} of {tokens} tokens have {length} together, and the network has learned "
            f"{max_length} positions. Shorten the input to {max_length - tokens} tokens."
        )


def past_length(call: Mapping[str, Any]) -> int:
    """Return how many entries the cache of a call holds already."""
    cache = call.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def counted_positions(call: Mapping[str, Any], *, padding: int | None) -> Tensor:
    """Return the position of every token of a call: the number of real tokens before it.

    Args:
        call: The arguments of a base model: ``input_ids`` or ``inputs_embeds``, ``attention_mask``, ``past_key_values``.
        padding: For networks that count as RoBERTa does, the id and position of padding; the rest counts from there.

    Returns:
        Of shape ``(batch or 1, tokens)``.

    >>> counted_positions({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, padding=None)
    tensor([[0, 1, 2],
            [0, 0, 1]])
    """
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    entries: Tensor = call["inputs_embeds"] if ids is None else ids
    length, past = entries.shape[1], past_length(call)
    if padding is not None and ids is not None and not past:
        real = ids.ne(padding).long()
    elif mask is not None:
        real = mask.long()
    else:
        real = torch.ones(1, past + length, dtype=torch.long, device=entries.device)
    counted: Tensor = real.cumsum(1)
    positions = (counted - 1).clamp_min(0) if padding is None else counted * real + padding
    return positions[:, -length:]

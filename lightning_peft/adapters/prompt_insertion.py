"""Put a block of entries into every row of a batch, and take it out again: a prompt stands before the first real token.

In a left-padded batch that place differs from row to row. It could stand in front of the padding as well, but then
a sliding window, or a distance that is counted in entries, would see the padding between prompt and text.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Start: TypeAlias = int | Tensor
"""Index of a row's first prompt entry: one for all rows, or of shape ``(batch,)``."""


def prompt_start(mask: Tensor | None, *, after_first: bool) -> Start:
    """Return where the prompt goes: before a row's first real token, or after it.

    Args:
        mask: 1 or True for real tokens, of shape ``(batch, tokens)``; None for no padding. It may be the mask without the
            prompt or with it: the answer is the same.
        after_first: Leave the first real token in front of the prompt.

    >>> prompt_start(torch.tensor([[1, 1, 1], [0, 0, 1]]), after_first=False).tolist()
    [0, 2]
    """
    return int(after_first) if mask is None else mask.long().argmax(1) + int(after_first)


def insert(entries: Tensor, block: Tensor, start: Start) -> Tensor:
    """Put ``block`` into every row, so that it begins at ``start``.

    Args:
        entries: Of shape ``(batch, tokens, ...)``.
        block: Of shape ``(batch, count, ...)``.
        start: Where it goes.

    >>> insert(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 0], [0, 0]]), torch.tensor([0, 2])).tolist()
    [[0, 0, 1, 2, 3], [4, 5, 0, 0, 6]]
    """
    if isinstance(start, int):  # an empty slice would cost a tensor of zeros in the backward pass
        return torch.cat([entries[:, :start], block, entries[:, start:]] if start else [block, entries], 1)
    count, length = block.shape[1], entries.shape[1]
    at, start = torch.arange(count + length, device=entries.device)[None], start[:, None]
    source = torch.where(at < start, at + count, torch.where(at < start + count, at - start, at))
    return torch.cat([block, entries], 1)[_rows(source), source]


def strip(entries: Tensor, count: int, start: Start) -> Tensor:
    """Take ``count`` entries from ``start`` on out of every row.

    >>> strip(torch.tensor([[0, 0, 1, 2, 3], [4, 5, 0, 0, 6]]), 2, torch.tensor([0, 2])).tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    if isinstance(start, int):
        behind = entries[:, start + count :]
        return torch.cat([entries[:, :start], behind], 1) if start else behind
    at = torch.arange(entries.shape[1] - count, device=entries.device)[None]
    source = at + count * (at >= start[:, None])
    return entries[_rows(source), source]


def replace(entries: Tensor, block: Tensor, start: Start) -> Tensor:
    """Put ``block``, of shape ``(count, ...)``, in the place of what every row has from ``start`` on.

    >>> replace(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 0]), torch.tensor([0, 1])).tolist()
    [[0, 0, 3], [4, 0, 0]]
    """
    count = len(block)
    blocks = block.expand(len(entries), *block.shape)
    if isinstance(start, int):
        return torch.cat([entries[:, :start], blocks, entries[:, start + count :]], 1)
    target = start[:, None] + torch.arange(count, device=entries.device)
    return entries.index_put((_rows(target), target), blocks)


def strip_output(output: Any, length: int, count: int, start: Start) -> Any:
    """Take a prompt out of all hidden states of a network's output, a tuple or transformers' ``ModelOutput``.

    Args:
        output: What the base model returned.
        length: Number of entries with the prompt.
        count: Number of entries of the prompt.
        start: Where it begins.
    """

    def taken(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(taken(entry) for entry in value)
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == length:
            return strip(value, count, start)
        return value

    if isinstance(output, tuple):
        return taken(output)
    for key in ("last_hidden_state", "hidden_states"):
        if output.get(key) is not None:
            output[key] = taken(output[key])
    return output


def shift_positions(positions: Tensor, count: int, start: Start, *, after_first: bool) -> Tensor:
    """Number the tokens anew around a prompt, which takes the numbers from its place on.

    Args:
        positions: Numbers of the tokens without the prompt, of shape ``(batch or 1, tokens)``.
        count: Length of the prompt.
        start: Where it goes.
        after_first: Whether the token before ``start`` is the first real one.

    >>> shift_positions(torch.tensor([[0, 1, 2], [0, 0, 1]]), 2, torch.tensor([0, 1]), after_first=False).tolist()
    [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    """
    at = torch.arange(positions.shape[1], device=positions.device)[None]
    if isinstance(start, int):
        first, behind = positions[:, start - after_first, None], at >= start
    else:
        positions = positions.expand(len(start), -1)
        first, behind = positions.gather(1, start[:, None] - int(after_first)), at >= start[:, None]
    block = first + int(after_first) + torch.arange(count, device=positions.device)
    return insert(positions + count * behind, block, start)


def _rows(index: Tensor) -> Tensor:
    return torch.arange(len(index), device=index.device)[:, None]

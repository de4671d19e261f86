"""Rows of a causal language model, put together into a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100
"""The label of tokens that do not count."""
TokenRow = dict[str, list[int]]
"""Token ids and labels of a text."""


def causal_batch(rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """Return a batch, padded on the right; what is padding is masked and has no label.

    >>> causal_batch([{"ids": [5, 6], "labels": [-100, 6]}, {"ids": [7], "labels": [7]}])["labels"].tolist()
    [[-100, 6], [7, -100]]
    """
    longest = max(len(row["ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    counts = torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows])
    return {"input_ids": padded("ids", 0), "attention_mask": counts, "labels": padded("labels", IGNORED)}

"""The rows of a batch that a causal language model goes on with, and what they cost."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.budget import Usage


@dataclass
class Rows:
    """Texts that grow by one token a forward, with the keys and values of what stands there already.

    A prompt is read once, however many rows go on from it; rows that have ended leave the batch. Every forward is on the
    account of each problem that has a row in it, every position on that of its row's problem: the prompt's, padding included, as
    ``prompt_tokens``, later ones as ``tokens``.

    Args:
        model: A causal language model of transformers.
        usage: An account for each problem; is added to.
    """

    model: Any
    usage: Sequence[Usage]

    def __post_init__(self) -> None:
        """Find out what the model's forward takes."""
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise TypeError(f"Rows: {type(self.model).__name__} is an encoder and a decoder; give a decoder alone.")
        # A compiled network would be compiled anew for every length, and hides what it takes.
        self.model = getattr(self.model, "_orig_mod", self.model)
        taken = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self.owners: list[int] = []
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._next = torch.empty(0, dtype=torch.long)

    def start(self, ids: Tensor, mask: Tensor, owners: Sequence[int]) -> Tensor:
        """Read prompts.

        Args:
            ids: ``(prompts, tokens)``, padded on the left.
            mask: 1 where there is a token, else 0.
            owners: The problem of each prompt.

        Returns:
            Logits of the first new token, ``(prompts, vocabulary)``.
        """
        self.owners, self._next = list(owners), mask.sum(1)
        # Without padding there is no mask: attention is then causal by itself, which is faster.
        self._mask = None if bool(mask.all()) else mask
        for owner in owners:
            self.usage[owner].prompt_tokens += ids.shape[1]
        return self._forward(ids, (mask.cumsum(1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row: ``(rows,)``; return logits of the next one, ``(rows, vocabulary)``."""
        for owner in self.owners:
            self.usage[owner].tokens += 1
        positions, self._next = self._next[:, None], self._next + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        return self._forward(tokens[:, None], positions)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one that is named twice goes on twice."""
        if list(rows) == list(range(len(self.owners))):
            return  # most steps of a search change nothing, and moving a cache costs as much as reading it
        index = torch.tensor(rows, device=self._next.device)
        if not hasattr(self._cache, "reorder_cache"):
            raise TypeError(
                f"Rows: {type(self.model).__name__} keeps its past as {type(self._cache).__name__}, whose rows cannot be chosen; "
                "a search needs a cache of keys and values."
            )
        self._cache.reorder_cache(index)
        self.owners = [self.owners[row] for row in rows]
        self._next = self._next[index]
        self._mask = None if self._mask is None else self._mask[index]

    def fork(self, rows: Sequence[int]) -> Rows:
        """Return a copy that goes on with these rows while this one stays."""
        other = copy.copy(self)
        other._cache = copy.deepcopy(self._cache)
        other.keep(rows)
        return other

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        for owner in Counter(self.owners):
            self.usage[owner].forwards += 1
        where = {"position_ids": positions} if self._takes_positions else {}
        out = self.model(
            ids, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, **where, **self._options
        )
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits

"""Rows of a causal language model that grow token by token, in its key-value cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Rows:
    """Texts under way: what the model has seen of each, and the log-probabilities of what comes next.

    Args:
        model: A causal language model of transformers.
        input_ids: Prompts, padded on the left, ``(rows, tokens)``.
        attention_mask: 1 where there is a token, 0 where there is padding.

    The prompts go through the model at once, without being repeated for the beams that will follow.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._fixed: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in accepted:
            self._fixed["logits_to_keep"] = 1
        self._positions = "position_ids" in accepted
        self._mask, self._cache = attention_mask, None
        self._feed(input_ids)

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def width(self) -> int:
        """Positions of each row so far, padding included."""
        return self._mask.shape[1]

    def _feed(self, tokens: Tensor) -> None:
        given: dict[str, Any] = {"input_ids": tokens, "attention_mask": self._mask, "past_key_values": self._cache}
        if self._positions:
            given["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self._model(**given, **self._fixed)
        if output.past_key_values is None:
            raise ValueError(
                f"decoding: {type(self._model).__name__} returns no past_key_values; a search needs its cache."
            )
        self._cache = output.past_key_values
        self.log_probabilities = output.logits[:, -1].float().log_softmax(-1)
        """Of the next token, ``(rows, vocabulary)``."""

    def keep(self, parents: Sequence[int]) -> None:
        """Go on with copies of some rows, in the order given; a row may be named often, or not at all."""
        if list(parents) == list(range(len(self))):
            return
        index = torch.tensor(parents, device=self._mask.device)
        self._mask = self._mask[index]
        self.log_probabilities = self.log_probabilities[index]
        cache: Any = self._cache
        cache.batch_select_indices(index)

    def append(self, tokens: Sequence[int]) -> None:
        """Let every row go on by one token, in one forward."""
        column = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(column)], 1)
        self._feed(column)

    def fork(self) -> Rows:
        """Return an independent copy."""
        other = copy.copy(self)
        other._cache = copy.deepcopy(self._cache)
        return other


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode without gradients, and leave it as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

"""Prompts as a model reads them, and drafts of what is written after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.decoding.draft import Draft

_BROKEN = "\ufffd"


@dataclass
class Prompts:
    """Some prompts of one call.

    Args:
        texts: As they were given.
        input_ids: Padded on the left, ``(prompts, tokens)``.
        attention_mask: 1 where there is a token.
        tokenizer: Of transformers.
        ends: Tokens that end a text.
        first: Place of the first prompt among those of the call.
    """

    texts: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    tokenizer: Any
    ends: frozenset[int]
    first: int = 0

    def __post_init__(self) -> None:
        """Read every prompt once as the tokenizer writes it."""
        self._ids = [row[mask.bool()].tolist() for row, mask in zip(self.input_ids, self.attention_mask, strict=True)]
        self._read = [self._decoded(ids) for ids in self._ids]

    def __len__(self) -> int:
        return len(self.texts)

    def length(self, problem: int) -> int:
        """Return how many tokens a prompt has, without padding."""
        return len(self._ids[problem])

    def draft(self, problem: int, tokens: Sequence[int]) -> Draft:
        """Return the text of a prompt with tokens after it, without an end token, and without half a character at its end.

        The whole is decoded, since a token may read otherwise at the beginning of a text.
        """
        whole = self._decoded([*self._ids[problem], *(token for token in tokens if token not in self.ends)])
        return Draft(
            whole[len(self._read[problem]) :].rstrip(_BROKEN), prompt=self.texts[problem], problem=self.first + problem
        )

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def read_prompts(model: nn.Module, tokenizer: Any, prompts: Sequence[str], first: int = 0) -> Prompts:
    """Return prompts padded on the left, whatever the tokenizer's own side.

    Raises:
        ValueError: Without prompts, for an empty one, and without a token that ends a text.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"decode: prompts={prompts!r} must be a list of at least one text.")
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise ValueError(
            f"decode: prompt {empty[0]} ({prompts[empty[0]]!r}) has no token. Begin it with a word or a BOS token."
        )
    longest = max(map(len, ids))
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    fill = min(ends)
    return Prompts(
        list(prompts),
        torch.tensor([[fill] * (longest - len(row)) + row for row in ids], device=device),
        torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device),
        tokenizer,
        ends,
        first,
    )


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: the model's own, as ``generate`` uses them, else the tokenizer's."""
    config: Any = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise ValueError(
            f"decode: neither {type(model).__name__} nor the tokenizer has an eos_token_id, so no text can end."
        )
    return frozenset([found] if isinstance(found, int) else map(int, found))

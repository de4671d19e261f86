"""A search as a function that transformers' ``generate`` runs in place of its own loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.decoding.texts import Texts

if TYPE_CHECKING:
    from lightning_peft.decoding.beam_search import BeamSearch  # it offers this function as its method

_CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}


def custom_generate(search: BeamSearch, tokenizer: Any) -> Callable[..., Tensor]:
    """Return a function for ``model.generate(..., custom_generate=...)``.

    From ``generate`` come prompts, the greatest length, the tokens that end a text, padding and logits processors; all else is
    the search's. It returns prompts and texts, ``(prompts * num_return, tokens)``.

    Args:
        search: The search.
        tokenizer: The model's.

    Raises:
        ValueError: When run, for ``num_beams`` above 1 in ``generate`` (the search has its own), for ``return_dict_in_generate``,
            for stopping criteria of other kinds, and where there are fewer texts than ``num_return``.
    """

    def run(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **options: Any,
    ) -> Tensor:
        if generation_config.num_beams != 1:
            raise ValueError(
                f"custom_generate: num_beams={generation_config.num_beams} was given to generate, which repeats prompts; leave it "
                f"out, the search has num_beams={search.num_beams}."
            )
        if generation_config.return_dict_in_generate:
            raise ValueError(
                "custom_generate: return_dict_in_generate=True, and it gives tokens alone. Leave that out; BeamSearch.decode gives "
                "scores, too."
            )
        other = {type(one).__name__ for one in stopping_criteria or ()} - _CRITERIA
        if other:
            raise ValueError(
                f"custom_generate: {sorted(other)} would be ignored; only the length and end tokens can stop a search."
            )
        mask = options.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        ids = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        pad, ends = generation_config._pad_token_tensor, generation_config._eos_token_tensor
        texts = Texts(
            tokenizer, tokenizer.batch_decode(ids, skip_special_tokens=True), ids, 0 if pad is None else int(pad)
        )
        length = generation_config.max_length - input_ids.shape[1]
        result = replace(search, max_new_tokens=length, batch_size=len(ids)).search(
            model,
            texts,
            frozenset() if ends is None else frozenset(ends.flatten().tolist()),
            logits_processor or None,
        )
        written = [[one.ids for one in pool] for pool in result.n_best]
        return torch.cat(
            [
                input_ids.repeat_interleave(search.num_return, 0),
                _filled(written, search.num_return, texts.pad).to(input_ids.device),
            ],
            1,
        )

    return run


def _filled(written: list[list[tuple[int, ...]]], num_return: int, pad: int) -> Tensor:
    short = min(map(len, written))
    if short < num_return:
        raise ValueError(
            f"custom_generate: num_return={num_return}, but of one prompt there are {short} texts. Lower it, or raise the budget."
        )
    rows = [one for pool in written for one in pool]
    width = max(map(len, rows))
    return torch.tensor([[*one, *[pad] * (width - len(one))] for one in rows])

"""Prompts as tokens, and tokens as drafts of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.decoding.draft import Draft

CUT = "�"
"""What a tokenizer writes for a character of which only the first bytes are there."""


class Texts:
    """The prompts of a call, and what is written after them.

    A text is decoded from all of its tokens, prompt included: what a token means may depend on those before it.

    Args:
        tokenizer: The model's; its padding side does not matter, and padding may be the end's token.
        prompts: Texts. One that is a ``Draft`` keeps the number of its problem, which drafts of what is written after it have, too;
            another has its place. A process that writes after a part of the prompts says so which ones they are.
        ids: Their tokens where they are known already.
        pad: What stands at padding; the model never sees it.

    Raises:
        ValueError: For a prompt without a token, for one text in place of a list, and for two drafts of one problem.
    """

    def __init__(
        self, tokenizer: Any, prompts: Sequence[str], ids: Sequence[list[int]] | None = None, pad: int = 0
    ) -> None:
        if isinstance(prompts, str):
            raise ValueError(f"Texts: prompts={str(prompts)!r} must be a list of texts.")
        self.tokenizer, self.prompts, self.pad = tokenizer, list(prompts), pad
        self.ids = [list(tokenizer(prompt)["input_ids"]) for prompt in self.prompts] if ids is None else list(ids)
        for prompt, tokens in zip(self.prompts, self.ids, strict=True):
            if not tokens:
                raise ValueError(
                    f"Texts: the prompt {prompt!r} has no token; begin with one, such as the tokenizer's bos_token."
                )
        self.numbers = [one.problem if isinstance(one, Draft) else place for place, one in enumerate(self.prompts)]
        if len(set(self.numbers)) < len(self.numbers):
            raise ValueError(
                f"Texts: the prompts are drafts of the problems {self.numbers}; each needs a number of its own, for its account."
            )
        self._bases = self._decoded(self.ids)

    def padded(self, problems: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the tokens of some prompts, padded on the left, and where there are any: twice ``(problems, tokens)``."""
        chosen = [self.ids[problem] for problem in problems]
        width = max(map(len, chosen))
        ids = torch.tensor([[self.pad] * (width - len(one)) + one for one in chosen], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in chosen], device=device)
        return ids, mask

    def drafts(self, written: Sequence[tuple[int, Sequence[int]]]) -> list[Draft]:
        """Return what was written, by problem, as text; a character that is cut in its middle is left out.

        Args:
            written: Pairs of a problem and the tokens after its prompt, without the end's.
        """
        whole = self._decoded([[*self.ids[problem], *tokens] for problem, tokens in written])
        return [self._draft(problem, text) for (problem, _), text in zip(written, whole, strict=True)]

    def _draft(self, problem: int, text: str) -> Draft:
        return Draft(
            text[len(self._bases[problem]) :].rstrip(CUT),
            prompt=str(self.prompts[problem]),
            problem=self.numbers[problem],
        )

    def _decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        if not rows:
            return []
        found: list[str] = self.tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: those of the model's generation config, else the tokenizer's; there may be none."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    # A number, several, or a tensor of either: generate takes them all.
    return frozenset() if ends is None else frozenset(torch.as_tensor(ends).flatten().tolist())

"""Answers that a language model writes after a prompt, and the label that they mean."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import torch

from lightning_peft.budget import Usage
from lightning_peft.old_task import untouched
from lightning_peft.prompts.label_scores import batches_by_length, prompt_tokens
from lightning_peft.prompts.template import PromptTemplate, Row
from lightning_peft.prompts.verbalizer import Verbalizer


def write_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    template: PromptTemplate,
    *,
    max_new_tokens: int = 8,
    batch_size: int = 32,
    usage: Usage | None = None,
) -> list[str]:
    """Return what a model writes after each prompt, greedily, without special tokens.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's; its padding side does not matter.
        rows: Inputs.
        template: The prompt.
        max_new_tokens: Most tokens that are written.
        batch_size: Inputs that are written together.
        usage: Is added to.
    """
    usage, start, device = Usage() if usage is None else usage, time.perf_counter(), next(model.parameters()).device
    prompts, written = [prompt_tokens(template, row, tokenizer) for row in rows], [""] * len(rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad(), untouched(model, device):
        for chosen in batches_by_length(prompts, batch_size):
            longest = len(prompts[chosen[-1]])
            spare = [longest - len(prompts[row]) for row in chosen]
            ids = torch.tensor(
                [[pad] * gap + prompts[row] for gap, row in zip(spare, chosen, strict=True)], device=device
            )
            mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in spare], device=device)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
            )
            for row, tokens in zip(chosen, output[:, longest:].tolist(), strict=True):
                written[row] = tokenizer.decode(tokens, skip_special_tokens=True)
            new = output.shape[1] - longest
            usage.forwards += new
            usage.tokens += len(chosen) * (longest + new - 1)
    usage.seconds += time.perf_counter() - start
    return written


def parsed_label(text: str, verbalizer: Verbalizer) -> int | None:
    """Return the label whose answer comes first in a text, as a whole word, in any case; None if none does.

    Of two that begin at one place the longer one counts.

    >>> parsed_label("It is Not bad, good even", Verbalizer([["bad"], ["good", "not bad"]]))
    1
    """
    found = []
    for label, answers in enumerate(verbalizer.answers):
        for answer in answers:
            match = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)
            if match:
                found.append((match.start(), -len(answer), label))
    return min(found)[2] if found else None

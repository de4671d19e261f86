"""How probable a language model finds each label's answer: one forward for many inputs, nothing is generated.

All prompts of a template begin alike. What they share goes through the model once, and its keys and values are used for all.
The shared part is found in the tokens of the whole prompts, so that no text is cut where a tokenizer would not cut it.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from lightning_peft.budget import Usage
from lightning_peft.old_task import untouched
from lightning_peft.prompts.template import PromptTemplate, Row
from lightning_peft.prompts.verbalizer import Tokens, Verbalizer


def label_log_probabilities(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    template: PromptTemplate,
    verbalizer: Verbalizer,
    *,
    batch_size: int = 32,
    share_prefix: bool = True,
    usage: Usage | None = None,
) -> Tensor:
    """Return the log-probability of each label's answers after each prompt, ``(rows, labels)``, in ``float32``.

    ``log sum_a p(a | prompt)`` over the answers of a label, each ``p`` the product over its tokens (or their geometric mean, as the
    verbalizer says). The model runs in eval mode, without gradient; modes and generators are as before.

    Args:
        model: A causal language model of transformers, or a masked one (whose config says so by its tokenizer's mask token and
            a head for it).
        tokenizer: The model's.
        rows: Inputs.
        template: The prompt.
        verbalizer: The labels' answers.
        batch_size: Inputs of a forward.
        share_prefix: Whether to run what all prompts share once. Without it each prompt goes through whole.
        usage: Is added to.

    Raises:
        ValueError: For a prompt that is longer than the model's positions, an answer that a tokenizer joins with the prompt, or a
            template that does not fit the model.
    """
    usage = Usage() if usage is None else usage
    start = time.perf_counter()
    device = next(model.parameters()).device
    if not rows:
        return torch.empty(0, len(verbalizer))
    with torch.no_grad(), untouched(model, device):
        if is_masked(model):
            found = _masked_scores(model, tokenizer, rows, template, verbalizer, batch_size=batch_size, usage=usage)
        else:
            prompts = [prompt_tokens(template, row, tokenizer) for row in rows]
            answers = verbalizer.tokens(tokenizer, template.gap(tokenizer))
            _check_length(model, prompts)
            _check_joints(tokenizer, template, rows[0], verbalizer)
            found = _Causal(model, answers, usage).scores(prompts, batch_size, share_prefix=share_prefix)
    usage.seconds += time.perf_counter() - start
    # found[label][answer] is (rows, tokens of the answer)
    joined = [[one.mean(1) if verbalizer.length == "mean" else one.sum(1) for one in answers] for answers in found]
    return torch.stack([torch.stack(answers, 1).logsumexp(1) for answers in joined], 1)


def scoring_cost(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    template: PromptTemplate,
    verbalizer: Verbalizer,
    *,
    batch_size: int = 32,
    share_prefix: bool = True,
) -> Usage:
    """Return the forwards and tokens that :func:`label_log_probabilities` would spend, exactly, without spending them."""
    usage = Usage()
    if rows and is_masked(model):
        for texts in _masked_texts(tokenizer, rows, template, verbalizer, batch_size):
            usage += Usage(forwards=1, tokens=len(texts) * max(len(ids) for ids in tokenizer(texts)["input_ids"]))
    elif rows:
        prompts = [prompt_tokens(template, row, tokenizer) for row in rows]
        leaves = answer_stems(verbalizer.tokens(tokenizer, template.gap(tokenizer)))
        shared = shared_length(prompts) if share_prefix else 0
        usage += Usage(forwards=1, tokens=shared) if shared else Usage()
        for chosen in batches_by_length(prompts, batch_size):
            longest = len(prompts[chosen[-1]]) - shared + max(map(len, leaves))
            usage += Usage(forwards=1, tokens=len(chosen) * len(leaves) * longest)
    return usage


def is_masked(model: Any) -> bool:
    """Whether a model fills in masks instead of going on."""
    return "MaskedLM" in type(model).__name__


def prompt_tokens(template: PromptTemplate, row: Row, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt, with what a tokenizer puts in front and without what it puts behind."""
    special = not template.chats(tokenizer)  # a chat template writes its own
    ids: list[int] = tokenizer(template.prompt(row, tokenizer), add_special_tokens=special)["input_ids"]
    behind = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None} if special else set()
    return ids[:-1] if len(ids) > 1 and ids[-1] in behind else list(ids)


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; at least one token of each is its own.

    >>> shared_length([[1, 2, 3], [1, 2, 4, 5]])
    2
    """
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns)) if len(prompts) > 1 else 0


def answer_stems(answers: list[list[Tokens]]) -> list[Tokens]:
    """Return the paths that the answers lie on, each without its last token; none begins another.

    >>> answer_stems([[(5,), (6, 7, 8)], [(6, 9)]])
    [(6, 7)]
    """
    stems = {tokens[:-1] for one in answers for tokens in one}
    return sorted(one for one in stems if not any(other != one and other[: len(one)] == one for other in stems))


def batches_by_length(prompts: list[list[int]], batch_size: int) -> list[list[int]]:
    """Return the numbers of the prompts of each forward: those of like lengths together."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check_length(model: Any, prompts: list[list[int]]) -> None:
    longest, limit = max(map(len, prompts)), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"label_log_probabilities: a prompt has {longest} tokens and the model {limit} positions. Set max_slot_tokens, or give "
            "fewer demonstrations."
        )


def _check_joints(tokenizer: Any, template: PromptTemplate, row: Row, verbalizer: Verbalizer) -> None:
    """Check that a prompt and an answer have the tokens that they have alone."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    text, gap = template.prompt(row, tokenizer), template.gap(tokenizer)
    for answer in (answer for answers in verbalizer.answers for answer in answers):
        if tokens(text + gap + answer) != tokens(text) + tokens(gap + answer):
            raise ValueError(
                f"label_log_probabilities: the tokenizer joins the answer {answer!r} with the end of the prompt ({text[-20:]!r}). "
                "Put a blank before {answer} in the form, or another one."
            )


class _Causal:
    """Scores of a causal model's answers after prompts.

    Answers are paths in a tree of tokens. A sequence is a prompt and a path to a leaf, without its last token; whatever
    answer lies on a path is read from it, so that answers of one token cost nothing beyond the prompt.
    """

    def __init__(self, model: Any, answers: list[list[Tokens]], usage: Usage) -> None:
        self.model, self.answers, self.usage = model, answers, usage
        self.leaves = answer_stems(answers)
        self.device = next(model.parameters()).device
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def scores(self, prompts: list[list[int]], batch_size: int, *, share_prefix: bool) -> list[list[Tensor]]:
        """Return ``scores[label][answer]``, ``(rows, tokens of the answer)`` each."""
        shared = shared_length(prompts) if share_prefix else 0
        past = self._prefill(prompts[0][:shared]) if shared else None
        shared = shared if past is not None else 0
        found = [[torch.empty(len(prompts), len(tokens)) for tokens in answers] for answers in self.answers]
        for rows in batches_by_length(prompts, batch_size):
            sequences = [prompts[row][shared:] + list(leaf) for row in rows for leaf in self.leaves]
            lengths = [len(prompts[row]) - shared for row in rows]
            table = self._forward(sequences, lengths, past, shared)
            for label, answers in enumerate(self.answers):
                for number, tokens in enumerate(answers):
                    found[label][number][rows] = self._read(table, tokens)
        return found

    def _prefill(self, ids: list[int]) -> Any:
        """Return the keys and values of the shared tokens; None for a model that gives none that can be used for several rows."""
        output = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            use_cache=True,
            **({"logits_to_keep": 1} if self.keeps else {}),
        )
        self.usage.forwards += 1
        self.usage.tokens += len(ids)
        past = getattr(output, "past_key_values", None)
        return past if hasattr(past, "batch_repeat_interleave") else None

    def _forward(self, sequences: list[list[int]], lengths: list[int], past: Any, shared: int) -> Tensor:
        """Return log-probabilities after a prompt's last token and the tokens behind it, ``(rows, leaves, depth, vocabulary)``."""
        longest = max(map(len, sequences))
        # On the right: pads between a cached prefix and a row would push the prefix out of a sliding window.
        ids = torch.tensor([one + [0] * (longest - len(one)) for one in sequences], device=self.device)
        mask = torch.tensor(
            [[1] * (shared + len(one)) + [0] * (longest - len(one)) for one in sequences], device=self.device
        )
        options: dict[str, Any] = {"use_cache": past is not None}
        if past is not None:
            cache = copy.deepcopy(past)  # a forward lengthens the one that it is given
            cache.batch_repeat_interleave(len(sequences))
            options["past_key_values"] = cache
            options["position_ids"] = torch.arange(shared, shared + longest, device=self.device).expand(len(ids), -1)
        depth = 1 + max(map(len, self.leaves))
        ends = torch.tensor([length - 1 for length in lengths for _ in self.leaves], device=self.device)
        places = (ends[:, None] + torch.arange(depth, device=self.device)).clamp_max(longest - 1)
        if self.keeps:  # a vocabulary of logits is dear, so only where one is read
            kept, places = places.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            options["logits_to_keep"] = kept
        logits = self.model(input_ids=ids, attention_mask=mask, **options).logits
        self.usage.forwards += 1
        self.usage.tokens += ids.numel()
        chosen = logits[torch.arange(len(ids), device=self.device)[:, None], places]
        table: Tensor = chosen.float().log_softmax(-1).view(len(lengths), len(self.leaves), depth, -1).cpu()
        return table

    def _read(self, table: Tensor, tokens: Tokens) -> Tensor:
        stem = tokens[:-1]
        leaf = next(number for number, leaf in enumerate(self.leaves) if leaf[: len(stem)] == stem)
        return torch.stack([table[:, leaf, depth, token] for depth, token in enumerate(tokens)], 1)


def _masked_scores(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    template: PromptTemplate,
    verbalizer: Verbalizer,
    *,
    batch_size: int,
    usage: Usage,
) -> list[list[Tensor]]:
    """Return ``scores[label][answer]``, ``(rows, tokens of the answer)`` each, where as many masks stand for the answer."""
    answers, device = verbalizer.tokens(tokenizer, template.gap()), next(model.parameters()).device
    tables: dict[int, list[Tensor]] = {}
    for texts in _masked_texts(tokenizer, rows, template, verbalizer, batch_size):
        batch = tokenizer(texts, padding=True, return_tensors="pt").to(device)
        at = batch["input_ids"] == tokenizer.mask_token_id
        count = int(at[0].sum())
        if count not in {len(tokens) for one in answers for tokens in one} or (at.sum(1) != count).any():
            raise ValueError(
                f"label_log_probabilities: a text holds the mask {tokenizer.mask_token!r} itself. Take it out."
            )
        found = model(**batch).logits[at].float().log_softmax(-1)
        tables.setdefault(count, []).append(found.view(len(texts), count, -1).cpu())
        usage.forwards += 1
        usage.tokens += batch["input_ids"].numel()
    whole = {count: torch.cat(parts) for count, parts in tables.items()}
    return [
        [whole[len(tokens)][:, torch.arange(len(tokens)), torch.tensor(tokens)] for tokens in one] for one in answers
    ]


def _masked_texts(
    tokenizer: Any, rows: Sequence[Row], template: PromptTemplate, verbalizer: Verbalizer, batch_size: int
) -> Iterator[list[str]]:
    """Yield the texts of each forward: all rows with as many masks as an answer has tokens, for each such number."""
    for count in sorted({len(tokens) for one in verbalizer.tokens(tokenizer, template.gap()) for tokens in one}):
        for start in range(0, len(rows), batch_size):
            masks = tokenizer.mask_token * count
            yield [template.masked(row, masks, tokenizer) for row in rows[start : start + batch_size]]

"""Texts written token by token: the likeliest one, or drawn ones."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.budget import Budget, Usage
from lightning_peft.decoding.beam_search import NO_LIMIT
from lightning_peft.decoding.prompts import Prompts, read_prompts
from lightning_peft.decoding.result import DecodeResult, Hypothesis, result_of
from lightning_peft.decoding.rows import Rows, reading

Pick = Callable[[Tensor, list[int]], list[int]]
"""From log-probabilities ``(rows, vocabulary)`` and the problem of each row, the next token of each row."""


@dataclass(frozen=True)
class Greedy:
    """Write the likeliest token, again and again.

    Args:
        max_new_tokens: Longest text.
        budget: What a single prompt may cost.
        batch_size: Prompts at once.
    """

    max_new_tokens: int = 128
    budget: Budget = NO_LIMIT
    batch_size: int = 16

    def decode(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Write one text after each prompt; see :class:`DecodeResult`."""

        def pick(log_probabilities: Tensor, _: list[int]) -> list[int]:
            found: list[int] = log_probabilities.argmax(1).tolist()
            return found

        return _written(self, model, tokenizer, prompts, lambda _: pick, copies=1)


@dataclass(frozen=True)
class Sample:
    """Draw texts from the model.

    Every prompt has random numbers of its own, from ``seed`` and its text: neither the other prompts nor anyone else's draws
    change them, so the same prompt twice is answered twice the same. The first of a prompt's texts is its answer; the pool has
    all, in the order drawn.

    Args:
        n: Texts for each prompt.
        temperature: Of the softmax; 1 is the model's own.
        top_k: Draw from so many likeliest tokens only; 0 from all.
        top_p: Draw from the likeliest tokens that have this probability together; 1 from all.
        seed: Of the draws.
        max_new_tokens: Longest text.
        budget: What a single prompt may cost.
        batch_size: Prompts at once.

    Raises:
        ValueError: For settings out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    budget: Budget = NO_LIMIT
    batch_size: int = 4

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.n < 1:
            raise ValueError(f"Sample: n={self.n!r} must be at least 1.")
        if not self.temperature > 0:
            raise ValueError(
                f"Sample: temperature={self.temperature!r} must be above 0. Use Greedy for the likeliest text."
            )
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"Sample: top_p={self.top_p!r} must be in (0, 1], top_k={self.top_k!r} at least 0.")

    def decode(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Draw texts after each prompt; see :class:`DecodeResult`."""

        def picker(part: Prompts) -> Pick:
            generators = [_generator(self.seed, text) for text in part.texts]

            def pick(log_probabilities: Tensor, problems: list[int]) -> list[int]:
                chances = self._filtered(log_probabilities / self.temperature).softmax(-1).cpu()
                drawn: list[int] = []
                for problem in sorted(set(problems)):
                    rows = [row for row, owner in enumerate(problems) if owner == problem]
                    drawn += torch.multinomial(chances[rows], 1, generator=generators[problem]).flatten().tolist()
                return drawn

            return pick

        return _written(self, model, tokenizer, prompts, picker, copies=self.n)

    def _filtered(self, scores: Tensor) -> Tensor:
        from transformers import TopKLogitsWarper, TopPLogitsWarper  # noqa: PLC0415

        ids: Any = None  # neither looks at what was written
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(ids, scores)
        return TopPLogitsWarper(self.top_p)(ids, scores) if self.top_p < 1 else scores


def _generator(seed: int, prompt: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(slots=True)
class _Text:
    problem: int
    tokens: list[int]
    logprob: float = 0.0
    ended: bool = False


def _written(
    decoder: Greedy | Sample,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    picker: Callable[[Prompts], Pick],
    *,
    copies: int,
) -> DecodeResult:
    """Return what is written after each prompt, in batches."""
    pool: list[list[Hypothesis]] = []
    usage: list[Usage] = []
    stopped: list[str | None] = []
    with reading(model):
        for start in range(0, len(prompts), decoder.batch_size):
            part = read_prompts(model, tokenizer, prompts[start : start + decoder.batch_size], start)
            writing = _Writing(decoder, model, part, copies)
            texts = writing.write(picker(part))
            usage += writing.usage
            stopped += writing.stopped
            pool += [[_hypothesis(part, text) for text in texts if text.problem == i] for i in range(len(part))]
    return result_of(pool, usage, stopped)


class _Writing:
    """Texts of a batch of prompts under way.

    A text that ended leaves its row to nobody: the others go on without it, so that nothing is computed or counted for it.
    """

    def __init__(self, decoder: Greedy | Sample, model: nn.Module, prompts: Prompts, copies: int) -> None:
        self._decoder, self._prompts = decoder, prompts
        self._start = time.perf_counter()
        self.usage = [Usage() for _ in range(len(prompts))]
        self.stopped: list[str | None] = [None] * len(prompts)
        self.texts = [_Text(problem, []) for problem in range(len(prompts)) for _ in range(copies)]
        places = [p for p in range(len(prompts)) if self._booked(p, Usage(forwards=1, tokens=prompts.length(p)))]
        self._open = [text for text in self.texts if text.problem in places]
        if places:
            self._rows = Rows(model, prompts.input_ids[places], prompts.attention_mask[places])
            self._rows.keep([places.index(text.problem) for text in self._open])

    def write(self, pick: Pick) -> list[_Text]:
        """Write until all texts have ended."""
        while self._open:
            known = self._rows.log_probabilities
            tokens = pick(known, [text.problem for text in self._open])
            chosen = known.gather(1, torch.tensor(tokens, device=known.device)[:, None]).flatten().tolist()
            going = []
            for row, (text, token, logprob) in enumerate(zip(self._open, tokens, chosen, strict=True)):
                text.tokens.append(token)
                text.logprob += logprob
                text.ended = token in self._prompts.ends
                if not text.ended and len(text.tokens) < self._decoder.max_new_tokens:
                    going.append((row, text))
            counts = {p: sum(text.problem == p for _, text in going) for p in {text.problem for _, text in going}}
            paid = {p for p, count in counts.items() if self._booked(p, Usage(forwards=1, tokens=count))}
            going = [(row, text) for row, text in going if text.problem in paid]
            self._open = [text for _, text in going]
            if going:
                self._rows.keep([row for row, _ in going])
                self._rows.append([text.tokens[-1] for text in self._open])
        return self.texts

    def _booked(self, problem: int, coming: Usage) -> bool:
        account = self.usage[problem]
        account.seconds = time.perf_counter() - self._start
        self.stopped[problem] = self._decoder.budget.refuses(account, coming)
        if self.stopped[problem]:
            return False
        account.forwards += coming.forwards
        account.tokens += coming.tokens
        return True


def _hypothesis(prompts: Prompts, text: _Text) -> Hypothesis:
    tokens = tuple(text.tokens)
    return Hypothesis(prompts.draft(text.problem, tokens), text.logprob, text.logprob, tokens, text.ended)

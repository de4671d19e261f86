"""Texts drawn from the model, or its most likely tokens, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_peft.budget import Budget, Usage
from lightning_peft.counts import check_counts
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.result import Candidate, DecodeResult, result_of
from lightning_peft.decoding.rows import Rows
from lightning_peft.decoding.texts import Texts, end_tokens
from lightning_peft.old_task import untouched

Choose = Callable[[Tensor, Sequence[int], int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Take the most likely token at each step: ``generate(do_sample=False)``.

    Args:
        max_new_tokens: Greatest length.
        budget: Limits for each prompt.
        batch_size: Prompts that are written together.

    Raises:
        ValueError: For a number below 1.
    """

    max_new_tokens: int = 64
    budget: Budget = field(default_factory=Budget)
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Check the settings."""
        check_counts(self, "max_new_tokens", "batch_size")

    def decode(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Write after each prompt.

        Args:
            model: A causal language model of transformers; it is in eval mode meanwhile.
            tokenizer: The model's.
            prompts: Texts, of any lengths.
        """
        writing = Writing(
            model, Texts(tokenizer, prompts), end_tokens(model, tokenizer), self.max_new_tokens, self.budget
        )
        writing.write(1, lambda logits, _rows, _place: logits.argmax(-1), self.batch_size)
        return result_of(writing.pools, writing.usage, writing.stopped)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw texts from the model; the first one of each prompt is its text.

    A token is drawn by the inverse of its distribution function at a uniform number that belongs to seed, prompt, text and
    place: what is drawn depends neither on the batch nor on the state of a generator, and the first texts of a larger ``n`` are
    those of a smaller.

    Args:
        n: Texts of each prompt.
        temperature: What logits are divided by.
        seed: Of the uniform numbers.
        max_new_tokens: Greatest length.
        budget: Limits for each prompt; when the next tokens have no room, all its texts end there.
        batch_size: Prompts that are written together.

    Raises:
        ValueError: For a number below 1, or a temperature that is not above 0.
    """

    n: int = 1
    temperature: float = 1.0
    seed: int = 0
    max_new_tokens: int = 64
    budget: Budget = field(default_factory=Budget)
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Check the settings."""
        check_counts(self, "n", "max_new_tokens", "batch_size")
        if not self.temperature > 0:
            raise ValueError(
                f"{type(self).__name__}: temperature={self.temperature!r} must be above 0. For the most likely tokens use Greedy."
            )

    def decode(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Write after each prompt, as :meth:`Greedy.decode`."""
        writing = self.draw(model, tokenizer, prompts)
        judge = Judge(getattr(self, "final", None), dict(zip(writing.texts.numbers, writing.usage, strict=True)))
        pools = [self.select(pool, judge) for pool in writing.pools]
        return result_of(pools, writing.usage, writing.stopped, self.n)

    def select(self, pool: list[Candidate], judge: Judge) -> list[Candidate]:
        """Return texts of one prompt, the chosen one first; here, as they were drawn.

        Args:
            pool: The texts.
            judge: Asks the final scorer, if there is one.
        """
        return pool

    def draw(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> Writing:
        """Return texts as they were drawn, before any is chosen."""
        texts = Texts(tokenizer, prompts)
        writing = Writing(model, texts, end_tokens(model, tokenizer), self.max_new_tokens, self.budget)
        uniform = torch.stack([self._uniform(number) for number in texts.numbers]) if texts.prompts else None

        def choose(logits: Tensor, rows: Sequence[int], place: int) -> Tensor:
            assert uniform is not None
            numbers = uniform.flatten(0, 1)[list(rows), place].to(logits.device)
            # In float64: the sum over a large vocabulary would lose its rare tokens.
            below = torch.softmax(logits.double() / self.temperature, -1).cumsum(-1)
            return torch.searchsorted(below, (numbers * below[:, -1])[:, None], right=True)[:, 0]

        writing.write(self.n, choose, self.batch_size)
        return writing

    def _uniform(self, problem: int) -> Tensor:
        """Return a number in [0, 1) for each text and place: ``(n, max_new_tokens)``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + problem)
        return torch.rand(self.n, self.max_new_tokens, generator=generator, dtype=torch.float64)


class Writing:
    """Texts that are written side by side, with an account for each prompt."""

    def __init__(self, model: Any, texts: Texts, ends: frozenset[int], max_new_tokens: int, budget: Budget) -> None:
        self.model, self.texts, self.ends = model, texts, ends
        self.max_new_tokens, self.budget = max_new_tokens, budget
        self.usage = [Usage() for _ in texts.prompts]
        self.stopped: list[str | None] = [None] * len(texts.prompts)
        self.pools: list[list[Candidate]] = []

    def write(self, n: int, choose: Choose, batch_size: int) -> None:
        """Write ``n`` texts after each prompt.

        Args:
            n: How many.
            choose: Takes logits ``(rows, vocabulary)``, the rows' numbers (problem times ``n`` plus text) and the place after
                the prompt, and returns a token for each.
            batch_size: Prompts that are written together.
        """
        with torch.no_grad(), untouched(self.model, next(self.model.parameters()).device):
            for first in range(0, len(self.usage), batch_size):
                self._batch(list(range(first, min(first + batch_size, len(self.usage)))), n, choose)

    def _batch(self, problems: list[int], n: int, choose: Choose) -> None:
        start = time.perf_counter()
        ids: dict[int, list[int]] = {problem * n + text: [] for problem in problems for text in range(n)}
        logprobs = dict.fromkeys(ids, 0.0)
        rows, going = Rows(self.model, self.usage), list(ids)
        logits = rows.start(*self.texts.padded(problems, next(self.model.parameters()).device), problems)
        logits = logits.repeat_interleave(n, 0)
        rows.keep([place for place in range(len(problems)) for _ in range(n)])
        for place in range(self.max_new_tokens):
            tokens = choose(logits, going, place)
            chosen = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
            for row, token, logprob in zip(going, tokens.tolist(), chosen.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row] += logprob
            start = self._share_time({row // n for row in going}, start)
            kept = [one for one, row in enumerate(going) if ids[row][-1] not in self.ends]
            kept = self._with_room(kept, going, n)
            if not kept or place + 1 == self.max_new_tokens:
                break
            rows.keep(kept)
            going = [going[one] for one in kept]
            logits = rows.step(tokens[kept])
        self._gather(problems, n, ids, logprobs)

    def _with_room(self, kept: list[int], going: list[int], n: int) -> list[int]:
        problems = [going[one] // n for one in kept]
        for problem in set(problems):
            coming = Usage(forwards=1, tokens=problems.count(problem))
            self.stopped[problem] = self.budget.refuses(self.usage[problem], coming)
        return [one for one, problem in zip(kept, problems, strict=True) if self.stopped[problem] is None]

    def _gather(self, problems: list[int], n: int, ids: dict[int, list[int]], logprobs: dict[int, float]) -> None:
        ended = {row: one[-1] in self.ends for row, one in ids.items()}
        drafts = self.texts.drafts([(row // n, one[:-1] if ended[row] else one) for row, one in ids.items()])
        pools: dict[int, list[Candidate]] = {problem: [] for problem in problems}
        for (row, one), draft in zip(ids.items(), drafts, strict=True):
            score = logprobs[row] / len(one)
            pools[row // n].append(Candidate(draft, score, logprobs[row], ended[row], viable=True, ids=tuple(one)))
        self.pools += pools.values()

    def _share_time(self, problems: set[int], start: float) -> float:
        now = time.perf_counter()
        for problem in problems:
            self.usage[problem].seconds += (now - start) / len(problems)
        return now

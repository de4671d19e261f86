"""What decoding gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_peft.budget import Usage
from lightning_peft.decoding.draft import Draft


@dataclass(frozen=True)
class Hypothesis:
    """One text that a decoder has written.

    Args:
        draft: Prompt and what was written after it.
        score: What it is ranked by.
        logprob: Summed log-probability of what was written.
        tokens: What was written, the end token included.
        finished: Whether it ended by itself: neither cut by length nor by a budget.
        viable: Whether every scorer let it pass.
        final: What the final scorer gave it, None where it was not asked.
    """

    draft: Draft
    score: float
    logprob: float
    tokens: tuple[int, ...]
    finished: bool
    viable: bool = True
    final: float | None = None


@dataclass
class DecodeResult:
    """What a decoder wrote after some prompts.

    Args:
        texts: The best text after each prompt, without the prompt.
        scores: What it was ranked by.
        usage: What was spent on each prompt: tokens through the model, the prompt's included, without the padding that its
            neighbours cause; forwards that it took part in; texts that a scorer had to judge, and how long that took.
        pool: All texts of each prompt that were weighed against each other, best first.
        stopped: The limit that ended the search of each prompt, None where it came to its end.
    """

    texts: list[str]
    scores: list[float]
    usage: list[Usage]
    pool: list[list[Hypothesis]]
    stopped: list[str | None] = field(default_factory=list)

    @property
    def drafts(self) -> list[Draft]:
        """The best text after each prompt, with the prompt; the empty one where there is none."""
        return [found[0].draft for found in self.pool]

    @property
    def total(self) -> Usage:
        """What was spent in all; a forward that several prompts share counts for each."""
        return sum(self.usage, Usage())


def best_first(pool: list[Hypothesis]) -> list[Hypothesis]:
    """Return hypotheses in order: viable ones first, then by what the final scorer gave, then by score."""
    return sorted(pool, key=lambda h: (not h.viable, -(-math.inf if h.final is None else h.final), -h.score))


def result_of(pool: list[list[Hypothesis]], usage: list[Usage], stopped: list[str | None]) -> DecodeResult:
    """Return the result whose texts are the first of each pool."""
    scores = [p[0].score if p[0].final is None else p[0].final for p in pool]
    return DecodeResult([p[0].draft.completion for p in pool], scores, usage, pool, stopped)

"""Choosing one of several drawn texts: by a score, by the vote of the texts, or by what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_peft.budget import Usage
from lightning_peft.decoding.draft import Draft, Scorer
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.result import DecodeResult, Hypothesis, best_first, result_of
from lightning_peft.decoding.sampling import Sample


@runtime_checkable
class Selector(Protocol):
    """A decoder that chooses from a pool that ``sample`` draws; several can so share one pool."""

    @property
    def sample(self) -> Sample:
        """How the pool is drawn."""
        ...

    def order(self, pool: Sequence[Hypothesis], usage: Usage) -> list[Hypothesis]:
        """Return the texts of one prompt, the chosen one first, and book what choosing cost."""
        ...


@dataclass(frozen=True)
class BestOfN:
    """Draw ``n`` texts and take the one with the highest score.

    **The trap:** a scorer that errs is led astray the further, the more texts it may choose from.

    Args:
        sample: How to draw.
        final: What to choose by; None for the log-probability of a token.
    """

    sample: Sample
    final: Scorer | None = None

    def decode(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Draw and choose; see :class:`DecodeResult`."""
        return chosen(self, self.sample.decode(model, tokenizer, prompts))

    def order(self, pool: Sequence[Hypothesis], usage: Usage) -> list[Hypothesis]:
        """Return the texts of one prompt by score."""
        if self.final is None:
            return best_first([replace(h, score=h.logprob / max(len(h.tokens), 1), final=None) for h in pool])
        problem = pool[0].draft.problem
        values = Judge(self.final, [usage], problem).values([h.draft for h in pool])
        return best_first([replace(h, final=value) for h, value in zip(pool, values, strict=True)])


@dataclass(frozen=True)
class SelfConsistency:
    """Draw ``n`` texts and take the answer that most of them give.

    Wang et al. 2023, arXiv:2203.11171. A tie goes to the answer that was drawn first.

    Args:
        sample: How to draw.
        extract: The answer that a text gives, None for a text without one, which has no vote.
    """

    sample: Sample
    extract: Callable[[Draft], Hashable | None]

    def decode(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Draw and let the texts vote; see :class:`DecodeResult`."""
        return chosen(self, self.sample.decode(model, tokenizer, prompts))

    def order(self, pool: Sequence[Hypothesis], usage: Usage) -> list[Hypothesis]:
        """Return the texts of one prompt by the share of the votes that their answer has."""
        answers = [self.extract(h.draft) for h in pool]
        votes = Counter(answer for answer in answers if answer is not None)
        return best_first([replace(h, final=votes[a] / len(pool)) for h, a in zip(pool, answers, strict=True)])


@dataclass(frozen=True)
class MBR:
    """Draw ``n`` texts and take the one that is most like the others: minimum Bayes risk.

    ``argmax_a mean_b utility(a, b)`` over the pool without ``a`` itself (Eikema and Aziz 2020, arXiv:2005.10283).

    Args:
        sample: How to draw.
        utility: How good the first text is if the second is right; unset, the F1 of their words.
    """

    sample: Sample
    utility: Callable[[str, str], float] | None = None

    def decode(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Draw and compare; see :class:`DecodeResult`."""
        return chosen(self, self.sample.decode(model, tokenizer, prompts))

    def order(self, pool: Sequence[Hypothesis], usage: Usage) -> list[Hypothesis]:
        """Return the texts of one prompt by their mean utility."""
        utility = self.utility or word_f1
        texts = [h.draft.completion for h in pool]
        means = [
            sum(utility(a, b) for j, b in enumerate(texts) if j != i) / max(len(texts) - 1, 1)
            for i, a in enumerate(texts)
        ]
        return best_first([replace(h, final=mean) for h, mean in zip(pool, means, strict=True)])


def chosen(selector: Selector, drawn: DecodeResult) -> DecodeResult:
    """Return what a selector makes of a pool that was drawn."""
    usage = [replace(account) for account in drawn.usage]
    pool = [selector.order(texts, account) for texts, account in zip(drawn.pool, usage, strict=True)]
    return result_of(pool, usage, drawn.stopped)


def word_f1(one: str, other: str) -> float:
    """Return the F1 of two texts' words, counted with repetitions.

    >>> word_f1("a b b", "b b c d")
    0.5714285714285714
    """
    a, b = Counter(one.split()), Counter(other.split())
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())

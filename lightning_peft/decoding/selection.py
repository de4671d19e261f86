"""Draw several texts and keep one: the likeliest, the best by a scorer, what most agree on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from typing_extensions import override

from lightning_peft.decoding.draft import Draft, Scorer
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.picking import judged_by
from lightning_peft.decoding.result import Candidate
from lightning_peft.decoding.sample import Sample


@dataclass(frozen=True, kw_only=True)
class BestOfN(Sample):
    """Draw texts and return the best by a scorer; without one, the likeliest by the mean log-probability of its tokens.

    Args:
        n: Texts of each prompt.
        final: Judges texts that have ended.
        temperature: As in :class:`Sample`, like all others.
        seed: See there.
        max_new_tokens: See there.
        budget: See there.
        batch_size: See there.
    """

    n: int = 8
    final: Scorer | None = None

    @override
    def select(self, pool: list[Candidate], judge: Judge) -> list[Candidate]:
        likely = sorted(pool, key=lambda one: (one.finished, one.score), reverse=True)
        return likely if judge.scorer is None else judged_by(judge, likely, self.budget)


def completion_of(draft: Draft) -> Hashable:
    """Return the text itself, without blanks at its ends, as an answer to vote on."""
    return draft.completion.strip()


@dataclass(frozen=True, kw_only=True)
class SelfConsistency(Sample):
    """Draw texts and return one with the answer that most of them give (Wang et al. 2022, arXiv:2203.11171).

    Texts that were cut have no vote unless all were; of two answers with as many votes, the one that was drawn first wins. The
    score is the answer's share of the votes.

    Args:
        n: Texts of each prompt.
        extract: Takes a draft and returns its answer; None has no vote.
        temperature: As in :class:`Sample`, like all others.
        seed: See there.
        max_new_tokens: See there.
        budget: See there.
        batch_size: See there.
    """

    n: int = 8
    extract: Callable[[Draft], Hashable | None] = completion_of

    @override
    def select(self, pool: list[Candidate], judge: Judge) -> list[Candidate]:
        voters = [one for one in pool if one.finished] or pool
        answers = {id(one): self.extract(one.draft) for one in voters}
        votes = Counter(answer for answer in answers.values() if answer is not None)
        share = {key: votes[answer] / max(1, votes.total()) for key, answer in answers.items()}
        return sorted((one.scored(share.get(id(one), 0.0)) for one in pool), key=lambda one: -one.score)


def word_f1(text: str, other: str) -> float:
    """Return the F1 of the words that two texts share, each as often as in both; 1 for two without a word.

    >>> word_f1("a cat sat", "the cat sat down")
    0.5714285714285714
    """
    mine, theirs = Counter(re.findall(r"\w+", text)), Counter(re.findall(r"\w+", other))
    if not mine and not theirs:
        return 1.0
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())


@dataclass(frozen=True, kw_only=True)
class MBR(Sample):
    """Draw texts and return the one that is most like the others: minimum Bayes risk (Eikema & Aziz 2020, arXiv:2005.10283).

    The score of a text is its mean utility against the other ones; what was cut neither counts nor wins unless all were.

    Args:
        n: Texts of each prompt.
        utility: Takes a text and another that it is compared with; higher is more alike.
        temperature: As in :class:`Sample`, like all others.
        seed: See there.
        max_new_tokens: See there.
        budget: See there.
        batch_size: See there.
    """

    n: int = 8
    utility: Callable[[str, str], float] = word_f1

    @override
    def select(self, pool: list[Candidate], judge: Judge) -> list[Candidate]:
        voters = [one for one in pool if one.finished] or pool
        scored = []
        for place, one in enumerate(voters):
            against = [self.utility(one.text, other.text) for at, other in enumerate(voters) if at != place]
            scored.append(one.scored(sum(against) / max(1, len(against))))
        voted = {id(one) for one in voters}
        return sorted(scored, key=lambda one: -one.score) + [one for one in pool if id(one) not in voted]

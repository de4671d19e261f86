"""Which of the texts that were found comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_peft.budget import Budget
from lightning_peft.decoding.beams import Hypothesis
from lightning_peft.decoding.judge import Judge, affordable
from lightning_peft.decoding.result import Candidate
from lightning_peft.decoding.texts import Texts


def settled(found: Sequence[Hypothesis], texts: Texts, *, ended_first: bool) -> list[Candidate]:
    """Return hypotheses as candidates, best first.

    Args:
        found: Of one problem.
        texts: Turns tokens into drafts.
        ended_first: Whether what has ended comes before what was cut; transformers' beam search does not ask.
    """
    drafts = texts.drafts([(one.problem, one.written) for one in found])
    pool = [
        Candidate(draft, one.rank, one.logprob, one.ended and not one.dead, not one.dead, one.ids)
        for one, draft in zip(found, drafts, strict=True)
    ]
    return sorted(pool, key=lambda one: (one.viable, one.finished or not ended_first, one.score), reverse=True)


def judged_by(judge: Judge, pool: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Return candidates of one problem with a final scorer's values, best first; those that are not judged come last.

    Only texts that have ended are judged, the first ones first, as long as the budget has room.
    """
    ended = [one for one in pool if one.finished]
    ended = ended[: affordable(judge, [one.draft for one in ended], budget)]
    values = judge.values([one.draft for one in ended])
    judged = [replace(one, score=value, judged=True) for one, value in zip(ended, values, strict=True)]
    seen = {id(one) for one in ended}
    return sorted(judged, key=lambda one: -one.score) + [one for one in pool if id(one) not in seen]

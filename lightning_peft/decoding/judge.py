"""Scorers as a search asks them: each text once, with an account for each problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_peft.budget import Budget, Usage
from lightning_peft.decoding.draft import Draft, Scorer

Key = tuple[str, int, str]


class Judge:
    """Ask a scorer about texts, and remember what it said.

    Args:
        scorer: Any callable that takes drafts and returns a value for each; unset, every text is worth 0.
        usage: An account for each problem, by its number; is added to.

    Raises:
        ValueError: When asked, if the scorer returns no values, another number of them, or one that is NaN.
    """

    def __init__(self, scorer: Scorer | None, usage: Mapping[int, Usage] | Sequence[Usage]) -> None:
        self.scorer, self.usage = scorer, usage
        self.knows_ends = hasattr(scorer, "finished")
        self._answers: dict[Key, float] = {}

    def values(self, drafts: Sequence[Draft]) -> list[float]:
        """Return the value of each text; ``-inf`` is a dead one."""
        return [0.0] * len(drafts) if self.scorer is None else self._ask("value", drafts, self.scorer)

    def finished(self, drafts: Sequence[Draft]) -> list[bool]:
        """Return whether each text may end where it does; all may if the scorer does not say."""
        scorer: Any = self.scorer
        return (
            [bool(one) for one in self._ask("end", drafts, scorer.finished)]
            if self.knows_ends
            else [True] * len(drafts)
        )

    def coming(self, drafts: Sequence[Draft], ends: Sequence[Draft] = ()) -> Usage:
        """Return what it would cost to ask for the values of texts, and whether some may end."""
        if self.scorer is None:
            return Usage()
        new = {("value", *_place(draft)) for draft in drafts}
        if self.knows_ends:
            new |= {("end", *_place(draft)) for draft in ends}
        return Usage(scorer_calls=len(new - self._answers.keys()))

    def _ask(self, what: str, drafts: Sequence[Draft], scorer: Callable[[list[Draft]], Any]) -> list[float]:
        keys: list[Key] = [(what, *_place(draft)) for draft in drafts]
        new = {key: draft for key, draft in zip(keys, drafts, strict=True) if key not in self._answers}
        for draft in drafts:
            self.usage[draft.problem].cached += 1
        if new:
            self._answer(list(new), list(new.values()), scorer)
        return [self._answers[key] for key in keys]

    def _answer(self, keys: list[Key], drafts: list[Draft], scorer: Callable[[list[Draft]], Any]) -> None:
        start = time.perf_counter()
        said = scorer(drafts)
        name = type(scorer).__name__
        try:
            values = [float(one) for one in (said.tolist() if hasattr(said, "tolist") else said)]
        except TypeError as error:
            what = f"a tensor {tuple(said.shape)}" if hasattr(said, "shape") else repr(said)
            raise ValueError(
                f"Judge: {name} gave {what} for {len(drafts)} texts; it must give one value for each."
            ) from error
        each = (time.perf_counter() - start) / len(drafts)
        if len(values) != len(drafts):
            raise ValueError(
                f"Judge: {name} gave {len(values)} values for {len(drafts)} texts; it must give one for each."
            )
        for key, draft, value in zip(keys, drafts, values, strict=True):
            if math.isnan(value):
                raise ValueError(f"Judge: {name} gave NaN for {draft.completion!r}; -inf is what a dead text is worth.")
            self._answers[key] = value
            account = self.usage[draft.problem]
            account.scorer_calls, account.cached = account.scorer_calls + 1, account.cached - 1
            account.scorer_seconds += each


def refusal(budget: Budget, spent: Usage, coming: Usage) -> str | None:
    """Return the limit that has no room for questions to a scorer; those of the model's tokens and forwards do not count."""
    asked = Usage(seconds=spent.seconds, scorer_calls=spent.scorer_calls)
    return budget.refuses(asked, coming) if coming.scorer_calls else None


def affordable(judge: Judge, drafts: Sequence[Draft], budget: Budget) -> int:
    """Return how many of the first texts of one problem its budget has room to ask about."""
    room = 0
    while room < len(drafts):
        spent = judge.usage[drafts[0].problem]
        if refusal(budget, spent, judge.coming(drafts[: room + 1])):
            break
        room += 1
    return room


def _place(draft: Draft) -> tuple[int, str]:
    # The problem counts: two may share a prompt and differ in their tests.
    return draft.problem, str(draft)

"""Scorers asked with care: every text once, in one call for all prompts, and on the account of the prompt that asks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_peft.budget import Usage
from lightning_peft.decoding.draft import Draft, Scorer

_KEPT = 65_536


class Judge:
    """A scorer's answers by text, and what they cost each prompt.

    Args:
        scorer: The scorer, None for one to which all texts are alike.
        usage: The accounts of the prompts, by ``Draft.problem`` less ``first``.
        first: Problem of the first account.
    """

    def __init__(self, scorer: Scorer | None, usage: Sequence[Usage], first: int = 0) -> None:
        self._scorer, self._usage, self._first = scorer, usage, first
        self._values: OrderedDict[tuple[int, str], float] = OrderedDict()
        self._ended: OrderedDict[tuple[int, str], bool] = OrderedDict()

    @property
    def checks_ends(self) -> bool:
        """Whether the scorer knows where a text may end."""
        return hasattr(self._scorer, "finished")

    @property
    def scores(self) -> bool:
        """Whether there is a scorer."""
        return self._scorer is not None

    def coming(self, drafts: Sequence[Draft]) -> Usage:
        """Return what judging some texts would add to an account."""
        return Usage(scorer_calls=self.unknown(drafts))

    def unknown(self, drafts: Sequence[Draft]) -> int:
        """Return how many texts the scorer would have to judge."""
        return 0 if self._scorer is None else len({_key(draft) for draft in drafts} - self._values.keys())

    def values(self, drafts: Sequence[Draft]) -> list[float]:
        """Return the value of each text.

        Raises:
            ValueError: If the scorer gives another number of values, or one that is no number.
        """
        if self._scorer is None:
            return [0.0] * len(drafts)
        return self._asked(drafts, self._values, self._scored, calls=1)

    def ended(self, drafts: Sequence[Draft]) -> list[bool]:
        """Return whether each text may end where it is; always, for a scorer that does not know.

        A second question about a text is no further call; its time counts.
        """
        if not self.checks_ends:
            return [True] * len(drafts)
        scorer: Any = self._scorer
        return self._asked(drafts, self._ended, scorer.finished, calls=0)

    def _scored(self, drafts: list[Draft]) -> list[float]:
        assert self._scorer is not None
        values = torch.as_tensor(self._scorer(drafts)).flatten().tolist()
        if bad := [value for value in values if value != value]:  # noqa: PLR0124 - the test for nan
            raise ValueError(f"decode: the scorer {self._scorer!r} gives {bad[0]!r}.")
        return values

    def _asked(
        self, drafts: Sequence[Draft], known: OrderedDict[Any, Any], ask: Callable[[list[Draft]], Any], *, calls: int
    ) -> list[Any]:
        new = list({_key(draft): draft for draft in drafts if _key(draft) not in known}.values())
        for draft in drafts:
            if _key(draft) in known:
                self._usage[draft.problem - self._first].cached += calls
        answers = {_key(draft): known[_key(draft)] for draft in drafts if _key(draft) in known}
        if new:
            start = time.perf_counter()
            found = list(ask(new))
            each = (time.perf_counter() - start) / len(new)
            if len(found) != len(new):
                raise ValueError(f"decode: the scorer {self._scorer!r} gives {len(found)} values for {len(new)} texts.")
            for draft, value in zip(new, found, strict=True):
                account = self._usage[draft.problem - self._first]
                account.scorer_calls += calls
                account.scorer_seconds += each
                answers[_key(draft)] = known[_key(draft)] = value
            while len(known) > _KEPT:
                known.popitem(last=False)
        return [answers[_key(draft)] for draft in drafts]


def _key(draft: Draft) -> tuple[int, str]:
    return draft.problem, str(draft)

"""The beam of one problem: what goes on, what has ended, and whether anything better can come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

EarlyStopping = bool | Literal["never", "first"]


@dataclass(slots=True)
class Hypothesis:
    """A text on its way.

    Args:
        problem: Which prompt it goes on from.
        row: The row of the batch that its last token but one is in.
        ids: Its tokens after the prompt, the end's included.
        logprob: Their sum of log-probabilities.
        ended: Whether its last token is an end.
        value: What the partial scorer said.
        rank: ``logprob / len(ids) ** length_penalty + weight * value``.
    """

    problem: int
    row: int
    ids: tuple[int, ...]
    logprob: float
    ended: bool
    value: float = 0.0
    rank: float = 0.0

    @property
    def dead(self) -> bool:
        """Whether a scorer has ruled it out."""
        return self.value == -math.inf

    @property
    def written(self) -> tuple[int, ...]:
        """Its tokens without the end's."""
        return self.ids[:-1] if self.ended else self.ids


@dataclass
class Beam:
    """The search for one problem.

    Its rules, where no scorer speaks, are those of transformers' beam search: only what ends among the first ``width`` candidates
    counts as finished, ``width`` of those make it full, and what ``early_stopping`` says decides when a full one is done.

    Args:
        problem: Its number.
        width: Most hypotheses that go on, and number of finished ones that are compared.
        length_penalty: Power of the length that a log-probability is divided by.
        weight: Of the partial scorer's value; at 0 none counts, however great, but that of the dead.
        early_stopping: True ends a full beam at once, False when the best that goes on is no better at its present length than
            the worst finished one, ``"never"`` when it could not even be at the greatest length; ``"first"`` ends it with its
            first finished ones.
        enough: How many those are.
        max_new_tokens: The greatest length.
    """

    problem: int
    width: int
    length_penalty: float
    weight: float
    early_stopping: EarlyStopping
    max_new_tokens: int
    enough: int = 1
    running: list[Hypothesis] = field(default_factory=list)
    found: list[Hypothesis] = field(default_factory=list)
    closed: bool = False
    stopped: str | None = None

    def rank(self, hypothesis: Hypothesis) -> None:
        """Give a hypothesis its rank, by its present value."""
        hypothesis.rank = -math.inf if hypothesis.dead else self._worth(hypothesis, len(hypothesis.ids))

    def advance(self, candidates: Sequence[Hypothesis]) -> None:
        """Take the next step: what ends among the best candidates is found, the best others go on."""
        living = sorted((one for one in candidates if not one.dead), key=lambda one: -one.rank)
        self.running = []
        for place, one in enumerate(living):
            if one.ended or len(one.ids) == self.max_new_tokens:
                if place < self.width:
                    self.found.append(one)
            elif len(self.running) < self.width:
                self.running.append(one)
        if not living and not self.found:
            # Nothing can go on and nothing has ended: the most likely dead one, marked so, is better than no text.
            self.found = [max(candidates, key=lambda one: self._normalised(one, len(one.ids)))]
        self.closed = not self.running or self._done()

    def stop(self, limit: str) -> None:
        """End the search because a limit is reached; what was under way counts as found."""
        self.found += self.running
        self.closed, self.stopped, self.running = True, limit, []

    def _done(self) -> bool:
        if len(self.found) < (self.enough if self.early_stopping == "first" else self.width):
            return False
        if self.early_stopping in (True, "first"):
            return True
        best = self.running[0]
        far = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_new_tokens if far else len(best.ids)
        worst = sorted((one.rank for one in self.found), reverse=True)[self.width - 1]
        return self._worth(best, length) <= worst

    def _worth(self, hypothesis: Hypothesis, length: int) -> float:
        # Zero times what is infinitely good is no number: without weight, no value counts.
        return self._normalised(hypothesis, length) + (self.weight * hypothesis.value if self.weight else 0.0)

    def _normalised(self, hypothesis: Hypothesis, length: int) -> float:
        power: float = length**self.length_penalty
        return hypothesis.logprob / power

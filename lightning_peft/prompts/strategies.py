"""What a prompt search tries next. A strategy keeps nothing: what it proposes follows from what was found and the round's seed."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_peft.distributed import gather_objects
from lightning_peft.prompts.space import Candidate, PromptSpace
from lightning_peft.prompts.trials import Example, Result

Rounds = Sequence[Sequence[Result]]
"""What each round found, from the first on."""
Score = Callable[[Candidate, Sequence[Example]], list[bool]]
"""Says which examples a candidate gets right."""
PARTS = ("instruction", "demonstrations", "form", "verbalizer")


@dataclass(frozen=True)
class Trial:
    """A candidate, and on how many training rows it is tried: the first ones of an order that the search's seed fixes."""

    candidate: Candidate
    rows: int


class Strategy(ABC):
    """Proposes candidates, round by round."""

    def prepare(self, space: PromptSpace, right: Score) -> None:  # noqa: B027 - most need nothing
        """Look at the space before the first round.

        Args:
            space: What is searched.
            right: Says which examples a candidate gets right; what it costs is counted.
        """

    @abstractmethod
    def propose(self, space: PromptSpace, rounds: Rounds, generator: random.Random) -> list[Trial]:
        """Return the trials of the coming round; none ends the search."""


def best(rounds: Rounds, count: int = 1) -> list[Candidate]:
    """Return the best candidates of all rounds, each in its latest result."""
    latest = {result.candidate: result for found in rounds for result in found}
    return [result.candidate for result in sorted(latest.values(), key=lambda result: result.order)[:count]]


def new_draws(
    space: PromptSpace, rounds: Rounds, generator: random.Random, count: int, **options: Any
) -> list[Candidate]:
    """Return random candidates that no round has tried; fewer, where there are no more."""
    tried = {result.candidate for one in rounds for result in one}
    found: dict[Candidate, None] = {}
    for _ in range(20 * count):  # the space may be smaller than what is asked for
        candidate = space.draw(generator, **options)
        if candidate not in tried:
            found[candidate] = None
        if len(found) == count:
            break
    return list(found)


@dataclass
class RandomSearch(Strategy):
    """Random candidates, all on as many rows.

    Args:
        count: Of a round.
        rows: Training rows of each.
    """

    count: int = 8
    rows: int = 64

    def propose(self, space: PromptSpace, rounds: Rounds, generator: random.Random) -> list[Trial]:
        """Return new random candidates."""
        return [Trial(candidate, self.rows) for candidate in new_draws(space, rounds, generator, self.count)]


@dataclass
class Halving(Strategy):
    """Successive halving: many candidates on few rows, the better part of them on more, until one is left; then again.

    Jamieson & Talwalkar 2016, arXiv:1502.07943. Rows are nested, so what was computed counts on.

    Args:
        count: Candidates that begin.
        rows: Training rows at the beginning.
        factor: So many times fewer candidates and more rows in the next round.
    """

    count: int = 16
    rows: int = 16
    factor: int = 2

    def propose(self, space: PromptSpace, rounds: Rounds, generator: random.Random) -> list[Trial]:
        """Return the better part of the last round, on more rows, or new candidates."""
        last = rounds[-1] if rounds else ()
        if len(last) > 1:
            kept = sorted(last, key=lambda result: result.order)[: max(1, len(last) // self.factor)]
            return [Trial(result.candidate, result.rows * self.factor) for result in kept]
        return [Trial(candidate, self.rows) for candidate in new_draws(space, rounds, generator, self.count)]


@dataclass
class Coordinate(Strategy):
    """One part of the prompt at a time, in turns, beginning from the best ones so far.

    Args:
        beam: How many of the best ones are varied.
        count: Variants of each.
        rows: Training rows of each.
    """

    beam: int = 2
    count: int = 4
    rows: int = 64

    def propose(self, space: PromptSpace, rounds: Rounds, generator: random.Random) -> list[Trial]:
        """Return variants of the best candidates in the part whose turn it is."""
        if not rounds:
            return [Trial(one, self.rows) for one in new_draws(space, rounds, generator, self.beam * self.count)]
        parts = [part for part in PARTS if space.choices(part) > 1]
        tried = {result.candidate for one in rounds for result in one}
        for turn in range(len(parts)):  # a part may have nothing new left
            part = parts[(len(rounds) - 1 + turn) % len(parts)]
            near = [
                new for one in best(rounds, self.beam) for new in space.neighbours(one, part, generator, self.count)
            ]
            if found := [one for one in dict.fromkeys(near) if one not in tried]:
                return [Trial(one, self.rows) for one in found]
        return []


@dataclass
class Bootstrap(Strategy):
    """Random candidates whose demonstrations the model itself answers rightly without any.

    DSPy's BootstrapFewShot (Khattab et al. 2023, arXiv:2310.03714) with answers that the model only has to choose.

    Args:
        count: Candidates of a round.
        rows: Training rows of each.
    """

    count: int = 8
    rows: int = 64
    answered: tuple[int, ...] | None = None
    """The examples that may be shown; :meth:`prepare` finds them."""

    def prepare(self, space: PromptSpace, right: Score) -> None:
        """Find the examples that any prompt without demonstrations gets right: of the forms and instructions, the best one."""
        plain = [
            Candidate(form, instruction)
            for form in range(len(space.forms))
            for instruction in range(len(space.instructions))
        ]
        flags = max((right(candidate, space.examples) for candidate in plain), key=sum)
        self.answered = tuple(number for number, flag in enumerate(flags) if flag)
        if len(self.answered) < max(space.shots):
            raise ValueError(
                f"Bootstrap: the model answers {len(self.answered)} of {len(space.examples)} examples rightly, and "
                f"shots={space.shots} asks for more. Give more examples, or fewer shots."
            )

    def propose(self, space: PromptSpace, rounds: Rounds, generator: random.Random) -> list[Trial]:
        """Return new random candidates that show what the model knows."""
        found = new_draws(space, rounds, generator, self.count, among=self.answered)
        return [Trial(candidate, self.rows) for candidate in found]


@dataclass
class Rewrite(Strategy):
    """Instructions that a writer proposes: a language model, or any function.

    Args:
        writer: Gets the instructions so far with their accuracies, the best first, and returns new ones.
        rows: Training rows of each.
        keep: How many instructions the writer sees.
    """

    writer: Callable[[list[tuple[str, float]]], Sequence[str]]
    rows: int = 64
    keep: int = 8

    def propose(self, space: PromptSpace, rounds: Rounds, generator: random.Random) -> list[Trial]:
        """Return the best candidate with each new instruction; first, the ones that are given."""
        if not rounds:
            first = replace(space.draw(generator), instruction=0)
            return [Trial(replace(first, instruction=number), self.rows) for number in range(len(space.instructions))]
        told: dict[str, float] = {}
        for result in sorted((result for one in rounds for result in one), key=lambda result: result.order):
            told.setdefault(space.instructions[result.candidate.instruction], result.accuracy)
        # A writer may draw: what it wrote on the first process is taken on all of them.
        written = gather_objects(list(self.writer(list(told.items())[: self.keep])))[0]
        new = [text for text in dict.fromkeys(written) if text not in space.instructions]
        space.instructions += new
        chosen = best(rounds)[0]
        start = len(space.instructions) - len(new)
        return [Trial(replace(chosen, instruction=start + number), self.rows) for number in range(len(new))]

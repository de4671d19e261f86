"""The state of a beam search over some prompts, and its step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_peft.budget import Usage
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.prompts import Prompts
from lightning_peft.decoding.result import Hypothesis
from lightning_peft.decoding.rows import Rows

if TYPE_CHECKING:
    from lightning_peft.decoding.beam_search import BeamSearch


@dataclass(slots=True)
class Beam:
    """A text under way, or one that it may become.

    Args:
        tokens: What was written.
        logprob: Their summed log-probability.
        parent: Row that it goes on from.
        draft: Its text, where a scorer has seen it.
        value: What the partial scorer gave it last.
        rank: What it is compared by.
        ends: Whether its last token ends it.
    """

    tokens: tuple[int, ...]
    logprob: float
    parent: int = 0
    draft: Draft | None = None
    value: float = 0.0
    rank: float = 0.0
    ends: bool = False


@dataclass
class Problem:
    """One prompt of a search.

    Args:
        place: Its place among the prompts of the batch.
        beams: Texts under way.
        best: The ``num_beams`` best that ended, best first.
        pool: All that ended.
        usage: What was spent.
        stopped: The limit that ended the search.
    """

    place: int
    beams: list[Beam] = field(default_factory=list)
    best: list[Hypothesis] = field(default_factory=list)
    pool: list[Hypothesis] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    stopped: str | None = None


class SearchState:
    """A beam search under way over the prompts of a batch.

    Args:
        search: Its settings.
        model: The language model.
        prompts: The prompts.
    """

    def __init__(self, search: BeamSearch, model: nn.Module, prompts: Prompts) -> None:
        self.search, self.prompts = search, prompts
        self.problems = [Problem(place) for place in range(len(prompts))]
        self.open: list[Problem] = []
        self._judge = Judge(search.partial, [problem.usage for problem in self.problems], prompts.first)
        self._start = time.perf_counter()
        for problem in self.problems:
            problem.beams = [Beam((), 0.0)]
            if self._booked(problem, Usage(forwards=1, tokens=prompts.length(problem.place))):
                self.open.append(problem)
        if self.open:
            places = [problem.place for problem in self.open]
            self._rows = Rows(model, prompts.input_ids[places], prompts.attention_mask[places])

    def step(self) -> None:
        """Let every open problem go on by one token."""
        proposed = self._proposed()
        self._look_ahead(proposed)
        going = [
            problem for problem, beams in zip(list(self.open), proposed, strict=True) if self._chosen(problem, beams)
        ]
        self.open = [
            problem for problem in going if self._booked(problem, Usage(forwards=1, tokens=len(problem.beams)))
        ]
        if self.open:
            beams = [beam for problem in self.open for beam in problem.beams]
            self._rows.keep([beam.parent for beam in beams])
            self._rows.append([beam.tokens[-1] for beam in beams])

    def _booked(self, problem: Problem, coming: Usage) -> bool:
        """Book what is coming, or stop a problem that may not spend it."""
        problem.usage.seconds = time.perf_counter() - self._start
        problem.stopped = self.search.budget.refuses(problem.usage, coming)
        if problem.stopped:
            self._cut(problem)
            return False
        problem.usage.forwards += coming.forwards
        problem.usage.tokens += coming.tokens
        return True

    def _cut(self, problem: Problem) -> None:
        """End a problem where it is: without a text that ended, those under way are what there is."""
        if not problem.pool:
            problem.pool = [self._hypothesis(problem, beam, viable=True) for beam in problem.beams]

    # --- continuations --------------------------------------------------------------------------------------------------------

    def _proposed(self) -> list[list[Beam]]:
        """Return the likeliest continuations of every open problem, likeliest first."""
        beams = [beam for problem in self.open for beam in problem.beams]
        device = self._rows.log_probabilities.device
        sums = self._rows.log_probabilities + torch.tensor([beam.logprob for beam in beams], device=device)[:, None]
        count = min(self.width, sums.shape[1])
        found = sums.topk(count, dim=1)
        values, tokens = found.values.tolist(), found.indices.tolist()
        proposed, row = [], 0
        for problem in self.open:
            reach = range(row, row + len(problem.beams))
            row += len(problem.beams)
            ranked = sorted(((values[r][c], r, c) for r in reach for c in range(count)), key=lambda found: -found[0])
            proposed.append([self._child(beams[r], r, tokens[r][c], value) for value, r, c in ranked[: self.width]])
        return proposed

    @property
    def width(self) -> int:
        """How many continuations a problem gets: enough for a full beam, whatever ends."""
        search, ends = self.search, len(self.prompts.ends)
        return search.num_beams * max(2, 1 + ends, search.expand if search.partial else 0)

    def _child(self, beam: Beam, row: int, token: int, logprob: float) -> Beam:
        return Beam((*beam.tokens, token), logprob, row, beam.draft, beam.value, ends=token in self.prompts.ends)

    def _look_ahead(self, proposed: list[list[Beam]]) -> None:
        """Roll every continuation out greedily, and let its draft be what came of it."""
        self._rolled: dict[int, tuple[int, ...]] = {}
        steps = self.search.lookahead
        if not steps:
            return
        beams = []
        for problem, group in zip(self.open, proposed, strict=True):
            going = [beam for beam in group if not beam.ends]
            if self._booked(problem, Usage(forwards=steps, tokens=steps * len(going))):
                beams += going
        if not beams:
            return
        rows = self._rows.fork()
        rows.keep([beam.parent for beam in beams])
        rolled = [list(beam.tokens) for beam in beams]
        for _ in range(steps):
            rows.append([tokens[-1] for tokens in rolled])
            for tokens, following in zip(rolled, rows.log_probabilities.argmax(1).tolist(), strict=True):
                tokens.append(following)
        ends = self.prompts.ends
        for beam, tokens in zip(beams, rolled, strict=True):
            stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            self._rolled[id(beam)] = tuple(tokens[: max(stop, len(beam.tokens))])

    # --- judging --------------------------------------------------------------------------------------------------------------

    def _chosen(self, problem: Problem, beams: list[Beam]) -> bool:
        """Choose what a problem goes on with; return False when it is done."""
        if problem.stopped:
            return False
        alive = self._alive(problem, beams)
        problem.usage.seconds = time.perf_counter() - self._start
        if alive is None:
            self._cut(problem)
            return False
        if not alive:
            if not problem.pool:
                problem.pool = [self._hypothesis(problem, beam, viable=False) for beam in beams[:1]]
            return False
        self._finish(problem, alive)
        if len(alive[0].tokens) == self.search.max_new_tokens:
            return False
        problem.beams = [beam for beam in alive if not beam.ends][: self.search.num_beams]
        return bool(problem.beams) and self._could_improve(problem)

    def _alive(self, problem: Problem, beams: list[Beam]) -> list[Beam] | None:
        """Return the continuations that no scorer drops, ranked; None where asking would cost too much."""
        search = self.search
        if search.partial is not None:
            asked = self._drafts(problem, beams)
            problem.stopped = search.budget.refuses(problem.usage, self._judge.coming([draft for _, draft in asked]))
            if problem.stopped and self._judge.unknown([draft for _, draft in asked]):
                return None
            problem.stopped = None
            for (beam, _), value in zip(asked, self._judge.values([draft for _, draft in asked]), strict=True):
                beam.value = value
            ending = [beam for beam in beams if beam.ends and beam.value > -math.inf]
            texts = [beam.draft for beam in ending if beam.draft is not None]
            for beam, may in zip(ending, self._judge.ended(texts), strict=True):
                beam.value = beam.value if may else -math.inf
        alive = [beam for beam in beams if beam.value > -math.inf]
        for beam in alive:
            beam.rank = beam.logprob / len(beam.tokens) ** search.length_penalty + search.weight * beam.value
        return sorted(alive, key=lambda beam: -beam.rank)

    def _drafts(self, problem: Problem, beams: list[Beam]) -> list[tuple[Beam, Draft]]:
        """Return the continuations whose text the scorer shall see now."""
        asked = []
        for beam in beams:
            before = "" if beam.draft is None else beam.draft.completion
            beam.draft = self.prompts.draft(problem.place, beam.tokens)
            lines = "\n" in beam.draft.completion[len(before) :] or beam.ends
            if self.search.check_every == "token" or lines:
                rolled = self._rolled.get(id(beam))
                asked.append((beam, self.prompts.draft(problem.place, rolled) if rolled else beam.draft))
        return asked

    def _finish(self, problem: Problem, alive: list[Beam]) -> None:
        """Take in what has ended, of the best continuations."""
        full = len(alive[0].tokens) == self.search.max_new_tokens
        for beam in alive[: self.search.num_beams]:
            if beam.ends or full:
                draft = beam.draft or self.prompts.draft(problem.place, beam.tokens)
                viable = beam.ends or not self._judge.checks_ends or self._judge.ended([draft])[0]
                problem.pool.append(self._hypothesis(problem, beam, viable=viable))
        kept = sorted([h for h in problem.pool if h.viable], key=lambda h: -h.score)
        problem.best = kept[: self.search.num_beams]

    def _hypothesis(self, problem: Problem, beam: Beam, *, viable: bool) -> Hypothesis:
        draft = self.prompts.draft(problem.place, beam.tokens)
        return Hypothesis(draft, beam.rank, beam.logprob, beam.tokens, beam.ends, viable)

    def _could_improve(self, problem: Problem) -> bool:
        """Return whether a text under way may yet be better than one that ended, as transformers estimates it."""
        search = self.search
        if len(problem.best) < search.num_beams:
            return True
        if search.early_stopping is True:
            return False
        forever = search.early_stopping == "never" and search.length_penalty > 0
        length = search.max_new_tokens if forever else len(problem.beams[0].tokens)
        per_token = float(length) ** -search.length_penalty
        best = max(beam.logprob * per_token + search.weight * beam.value for beam in problem.beams)
        return bool(best > problem.best[-1].score)

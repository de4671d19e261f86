"""Search for a better prompt: candidates are tried on training rows, chosen on validation rows, and tested once."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tqdm.auto import tqdm

from lightning_peft.budget import Budget, Usage
from lightning_peft.data.content_digest import key_of
from lightning_peft.distributed import gather_objects, rank
from lightning_peft.prompts.calibration import Calibration
from lightning_peft.prompts.score_cache import ScoreCache
from lightning_peft.prompts.space import Candidate, PromptSpace
from lightning_peft.prompts.strategies import RandomSearch, Strategy, best
from lightning_peft.prompts.template import PromptTemplate
from lightning_peft.prompts.trials import CandidateScorer, Example, Result
from lightning_peft.prompts.verbalizer import Verbalizer


@dataclass(frozen=True)
class SearchReport:
    """What a search found.

    Args:
        prompt: The chosen prompt.
        verbalizer: Its answers.
        validation: How it did on the rows that it was chosen by.
        test: How it did on test rows, asked once; None without any.
        rounds: What each round found on training rows.
        usage: What was spent, by all processes.
        stopped: Why the search ended.
        chosen_among: Candidates whose validation accuracy was compared.
    """

    prompt: PromptTemplate
    verbalizer: Verbalizer
    validation: Result
    test: Result | None
    rounds: list[list[Result]]
    usage: Usage
    stopped: str
    chosen_among: int

    @property
    def gap(self) -> float:
        """Validation accuracy minus test accuracy: what choosing has flattered; nan without test rows."""
        return self.validation.accuracy - self.test.accuracy if self.test else math.nan

    @property
    def luck(self) -> float:
        """What choosing alone may add to validation accuracy at most: ``sqrt(2 ln N p (1 - p) / n)`` for ``N`` candidates."""
        p, n = self.validation.accuracy, self.validation.rows
        return math.sqrt(2 * math.log(max(self.chosen_among, 1)) * p * (1 - p) / n)

    def __str__(self) -> str:
        low, high = interval(self.test or self.validation)
        told = f"test {self.test.accuracy:.3f}" if self.test else "no test rows"
        return (
            f"validation {self.validation.accuracy:.3f}, {told} (95 % {low:.3f} to {high:.3f}), gap {self.gap:+.3f}, "
            f"{self.usage.tokens:,} tokens in {self.usage.forwards:,} forwards; stopped: {self.stopped}"
        )


def interval(result: Result, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of an accuracy (1927), 95 % unless ``z`` says otherwise.

    >>> [round(end, 3) for end in interval(Result(Candidate(), 8, 10, 0, ""))]
    [0.49, 0.943]
    """
    p, n = result.accuracy, result.rows
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


@dataclass
class PromptSearch:
    """Settings of a search; :meth:`run` searches.

    Everything follows from the seed: which rows are tried first, and what is proposed. With a cache on disk a killed search,
    run again, comes to the same end and pays for nothing twice; what it had spent counts on. On several processes each scores
    its share of the rows, and all come to the same result.

    Args:
        space: What may be tried.
        strategy: What is tried next; unset, random candidates.
        rounds: Most rounds.
        budget: What may be spent on training and validation rows; it is asked before anything is spent.
        patience: Ends the search after so many rounds without a better validation accuracy; unset, none does.
        stop_at: Ends it at this validation accuracy.
        validated: So many of the best candidates of all rounds are compared on validation rows after each round.
        calibration: What is taken out of scores; ``"batch"`` takes the first training rows.
        calibration_rows: How many.
        seed: Of all draws.
        batch_size: Inputs of a forward.
    """

    space: PromptSpace
    strategy: Strategy = field(default_factory=RandomSearch)
    rounds: int = 10
    budget: Budget = field(default_factory=Budget)
    patience: int | None = None
    stop_at: float = 1.0
    validated: int = 4
    calibration: Calibration = "none"
    calibration_rows: int = 50
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("rounds", "validated", "calibration_rows", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"PromptSearch: {name}={value!r} must be at least 1.")

    def start(
        self, model: Any, tokenizer: Any, train: Sequence[Example], *, cache: ScoreCache | None = None
    ) -> SearchRun:
        """Return a search that has not tried anything yet; what the cache knows of it, it goes on from."""
        order = list(train)
        random.Random(f"{self.seed} rows").shuffle(order)
        scorer = CandidateScorer(
            model,
            tokenizer,
            self.space,
            calibration=self.calibration,
            calibration_rows=[row for row, _ in order[: self.calibration_rows]],
            cache=cache,
            batch_size=self.batch_size,
            search=key_of(self.space.plain(), order, type(self.strategy).__name__, self.seed, self.rounds),
        )
        return SearchRun(self, scorer, order)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        train: Sequence[Example],
        validation: Sequence[Example],
        test: Sequence[Example] = (),
        *,
        cache: ScoreCache | None = None,
        on_round: Callable[[SearchReport], None] | None = None,
    ) -> SearchReport:
        """Search, and return what was found.

        Args:
            model: A language model of transformers; nothing in it changes.
            tokenizer: The model's.
            train: Inputs with labels that candidates are tried on.
            validation: Others, that the prompt is chosen by.
            test: Others again, asked once for the chosen prompt.
            cache: Where scores are kept; unset, in memory.
            on_round: Is told after each round what is best so far.

        Raises:
            ValueError: Without training or validation rows, or if the budget does not even suffice for one candidate.
        """
        if not train or not validation:
            raise ValueError(
                f"PromptSearch: {len(train)} training and {len(validation)} validation rows; both are needed. A prompt must not be "
                "chosen by the rows that it is tested on."
            )
        run = self.start(model, tokenizer, train, cache=cache)
        run.reserved = validation
        with tqdm(total=self.rounds, desc="prompt search", unit="round", delay=2, disable=rank() > 0) as bar:
            while not run.stopped:
                run.try_round()
                run.judge(validation)
                if on_round is not None:
                    on_round(run.report())
                bar.set_postfix_str(run.told)
                bar.update()
        return run.report(test)


class SearchRun:
    """A search under way, round by round: :class:`PromptSearch` and a Trainer drive it.

    Args:
        search: The settings.
        scorer: Tries candidates.
        train: Training rows in the order in which they are taken.
    """

    def __init__(self, search: PromptSearch, scorer: CandidateScorer, train: list[Example]) -> None:
        self.search, self.scorer, self.train = search, scorer, train
        self.rounds: list[list[Result]] = []
        self.judged: dict[Candidate, Result] = {}
        self.since = 0
        """Rounds without a better validation accuracy."""
        self.stopped = ""
        """Why the search has ended; empty while it goes on."""
        self.reserved: Sequence[Example] = ()
        """Validation rows for which budget is left over, so that what a round has tried can be judged."""
        self._started: float | None = None

    @property
    def top(self) -> float:
        """The best validation accuracy so far; nan before any."""
        return max((result.accuracy for result in self.judged.values()), default=math.nan)

    @property
    def told(self) -> str:
        """A word on how it goes."""
        return f"validation {self.top:.3f}, {self.scorer.usage.tokens:,} tokens"

    def try_round(self) -> None:
        """Try what the strategy proposes, as far as the budget goes."""
        search, number = self.search, len(self.rounds)
        if self._started is None:  # also where a checkpoint was gone on from: a strategy keeps nothing
            search.strategy.prepare(search.space, self._right)
        trials = search.strategy.propose(search.space, self.rounds, random.Random(f"{search.seed} round {number}"))
        if not trials:
            self.stopped = "nothing new to try"
        found = []
        for trial in trials:
            result = self._tried(trial.candidate, self.train[: trial.rows], self.reserved)
            if result is None:
                break
            found.append(result)
        if found:
            self.rounds.append(found)

    def judge(self, validation: Sequence[Example]) -> None:
        """Compare the best candidates of all rounds on validation rows, and see whether to go on.

        Raises:
            ValueError: If the budget did not suffice for one candidate.
        """
        before, search = self.top, self.search
        for candidate in best(self.rounds, search.validated):
            result = self._tried(candidate, validation)
            if result is None:
                break
            self.judged[candidate] = result
        if not self.judged:
            raise ValueError(f"PromptSearch: the budget ({self.stopped}) does not suffice for one candidate. Raise it.")
        self.since = 0 if not self.top <= before else self.since + 1
        if self.top >= search.stop_at:
            self.stopped = f"stop_at={search.stop_at}"
        elif search.patience is not None and self.since >= search.patience:
            self.stopped = f"patience={search.patience}"
        elif not self.stopped and len(self.rounds) >= search.rounds:
            self.stopped = f"rounds={search.rounds}"

    def report(self, test: Sequence[Example] = ()) -> SearchReport:
        """Return what was found so far; of test rows, if there are any, the chosen prompt is asked."""
        chosen = min(self.judged.values(), key=lambda result: result.order)
        prompt, verbalizer = self.search.space.build(chosen.candidate)
        tested = self.scorer.score(chosen.candidate, test) if test else None
        return SearchReport(
            prompt, verbalizer, chosen, tested, list(self.rounds), self.scorer.usage, self.stopped, len(self.judged)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that does not follow from the settings, as plain data."""
        return {
            "rounds": [[asdict(result) for result in found] for found in self.rounds],
            "judged": [asdict(result) for result in self.judged.values()],
            "since": self.since,
            "stopped": self.stopped,
            "instructions": list(self.search.space.instructions),
            "usage": asdict(self.scorer.usage),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.rounds = [[_result(result) for result in found] for found in state["rounds"]]
        self.judged = {result.candidate: result for result in map(_result, state["judged"])}
        self.since, self.stopped = state["since"], state["stopped"]
        self.search.space.instructions = list(state["instructions"])
        self.scorer.usage = Usage(**state["usage"])

    def _tried(
        self, candidate: Candidate, examples: Sequence[Example], reserved: Sequence[Example] = ()
    ) -> Result | None:
        """Return a result, or None if there is no room for it, and for what is reserved with it."""
        parts = [[row for row, _ in part] for part in (examples, reserved)]
        coming = self.scorer.score_cost(candidate, parts[0])
        if coming.tokens:  # what is known already costs nothing, and nothing new may follow
            coming = self.scorer.score_cost(candidate, *parts)
        return self.scorer.score(candidate, examples) if self._has_room(coming) else None

    def _has_room(self, coming: Usage) -> bool:
        """Whether the budget suffices; if not, the search stops."""
        self._started = time.monotonic() if self._started is None else self._started
        elapsed = max(gather_objects(time.monotonic() - self._started))
        refused = (
            self.search.budget.refuses(replace(self.scorer.usage, seconds=elapsed), coming) if coming.tokens else None
        )
        if refused:
            self.stopped = refused
        return not refused

    def _right(self, candidate: Candidate, examples: Sequence[Example]) -> list[bool]:
        if not self._has_room(self.scorer.cost(candidate, [row for row, _ in examples])):
            raise ValueError(f"PromptSearch: the budget ({self.stopped}) does not suffice to begin. Raise it.")
        scores = self.scorer.log_probabilities(candidate, [row for row, _ in examples])
        found: list[bool] = (scores.argmax(1) == scores.new_tensor([label for _, label in examples])).tolist()
        return found


def _result(plain: Mapping[str, Any]) -> Result:
    told = plain["candidate"]
    candidate = Candidate(**{**told, "demonstrations": tuple(told["demonstrations"])})
    return Result(**{**plain, "candidate": candidate})

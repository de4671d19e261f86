"""What the arms of code_search write for some problems, what that costs, and whether it parses and passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_peft.budget import Usage
from lightning_peft.decoding import MBR, BeamSearch, BestOfN, Greedy, Sample, SelfConsistency
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.result import Candidate
from lightning_peft.decoding.scorers import PythonParses, PythonViability, RunsTests
from lightning_peft.decoding.scorers.sandbox import Isolation
from lightning_peft.recipes.code_search_problems import CodeProblem, body_of


@dataclass
class CodeRow:
    """One arm on one problem.

    Args:
        arm: Name of the arm, without its width.
        width: Beams, or samples that it chose from.
        problem: Name of the problem.
        suite: Its suite.
        text: What was chosen.
        tokens: Positions after the prompt that went through the model.
        seconds: Of the model and its scorers; of samples, the share of those that it chose from.
        scorer_calls: Questions to scorers.
        scorer_seconds: Of them.
        finished: Whether the text ended by itself.
        parses: Whether prompt and text are a program, as written.
        body_parses: The same of the function alone.
        passed: Whether the function passes all tests.
        shown: Whether it passes the first one.
        covered: Share of the texts to choose from that pass all tests.
    """

    arm: str
    width: int
    problem: str
    suite: str
    text: str
    tokens: float
    seconds: float
    scorer_calls: int
    scorer_seconds: float
    finished: bool
    parses: bool = False
    body_parses: bool = False
    passed: bool = False
    shown: bool = False
    covered: float = 0.0


@dataclass(frozen=True)
class Arms:
    """The decoders that are compared.

    Args:
        beams: Widths of the beams.
        samples: Texts of the pool.
        max_new_tokens: Greatest length.
        temperature: Of the samples.
        seed: Of the samples.
        isolation: In which programs run.
    """

    beams: tuple[int, ...]
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    isolation: Isolation

    def rows(self, model: Any, tokenizer: Any, problems: Sequence[CodeProblem]) -> list[CodeRow]:
        """Run all arms on some problems and judge what they wrote."""
        rows = [*self._searched(model, tokenizer, problems), *self._sampled(model, tokenizer, problems)]
        place = {problem.name: number for number, problem in enumerate(problems)}
        written = [_draft(problems[place[row.problem]], row.text, place[row.problem]) for row in rows]
        bodies = [_draft(problems[one.problem], body_of(one.completion), one.problem) for one in written]
        parses = PythonParses()
        passes = RunsTests([problem.tests for problem in problems], isolation=self.isolation)
        shown = RunsTests([problem.tests[:1] for problem in problems], isolation=self.isolation)
        verdicts = [parses(written), parses(bodies), passes(bodies), shown(bodies)]
        for number, row in enumerate(rows):
            row.parses, row.body_parses, row.passed, row.shown = (bool(verdict[number]) for verdict in verdicts)
            row.covered = row.covered if row.arm in SAMPLED else float(row.passed)
        return rows

    def _searched(self, model: Any, tokenizer: Any, problems: Sequence[CodeProblem]) -> Iterator[CodeRow]:
        prompts = [problem.prompt for problem in problems]
        length: Any = {"max_new_tokens": self.max_new_tokens}
        decoders: list[tuple[str, int, Any]] = [("beam", 1, Greedy(**length))]
        for beams in self.beams:
            decoders.append(("beam", beams, BeamSearch(num_beams=beams, **length)))
            decoders.append(
                ("beam + viability", beams, BeamSearch(num_beams=beams, partial=PythonViability(), expand=4, **length))
            )
        decoders.append(("beam + viability", 1, BeamSearch(num_beams=1, partial=PythonViability(), expand=4, **length)))
        for arm, width, decoder in decoders:
            found = decoder.decode(model, tokenizer, prompts)
            for problem, best, usage in zip(problems, found.best, found.usage, strict=True):
                yield _row(arm, width, problem, best, usage)

    def _sampled(self, model: Any, tokenizer: Any, problems: Sequence[CodeProblem]) -> Iterator[CodeRow]:
        """Draw one pool for each problem; every selector chooses from the same first texts of it."""
        sample = Sample(
            n=self.samples,
            temperature=self.temperature,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            batch_size=4,
        )
        drawn = sample.draw(model, tokenizer, [problem.prompt for problem in problems])
        tests = RunsTests([problem.tests for problem in problems], isolation=self.isolation)
        widths = [2**power for power in range(self.samples.bit_length()) if 2**power <= self.samples]
        for number, (problem, pool) in enumerate(zip(problems, drawn.pools, strict=True)):
            right = tests([_draft(problem, body_of(one.text), number) for one in pool]).tolist()
            whole = sum(one.tokens for one in pool)
            for width in widths:
                first = pool[:width]
                tokens = sum(one.tokens for one in first)
                for arm, (selector, scorer) in self._selectors(problems).items():
                    own = Usage()
                    best = selector.select(first, Judge(scorer, {number: own}))[0]
                    own.tokens = tokens
                    own.seconds = drawn.usage[number].seconds * tokens / max(1, whole) + own.scorer_seconds
                    row = _row(arm, width, problem, best, own)
                    row.covered = sum(right[:width]) / width
                    yield row

    def _selectors(self, problems: Sequence[CodeProblem]) -> dict[str, tuple[Sample, Any]]:
        parses, shown = PythonParses(), _BodyTests([problem.tests[:1] for problem in problems], self.isolation)
        return {
            "likeliest sample": (BestOfN(), None),
            "sample that parses": (BestOfN(final=parses), parses),
            "agreed sample": (SelfConsistency(extract=lambda draft: body_of(draft.completion).strip()), None),
            "MBR sample": (MBR(), None),
            "sample by the first test": (BestOfN(final=shown), shown),
        }


SAMPLED = ("likeliest sample", "sample that parses", "agreed sample", "MBR sample", "sample by the first test")


class _BodyTests:
    """``RunsTests`` on the function alone, without what was written after it."""

    def __init__(self, tests: Sequence[Sequence[str]], isolation: Isolation) -> None:
        self.runs = RunsTests(tests, isolation=isolation)

    def __call__(self, texts: Sequence[Draft]) -> Any:
        bodies = [Draft(body_of(one.completion), prompt=one.prompt, problem=one.problem) for one in texts]
        return self.runs(bodies)


def _draft(problem: CodeProblem, completion: str, number: int) -> Draft:
    return Draft(completion, prompt=problem.prompt, problem=number)


def _row(arm: str, width: int, problem: CodeProblem, best: Candidate, usage: Usage) -> CodeRow:
    return CodeRow(
        arm,
        width,
        problem.name,
        problem.suite,
        best.text,
        usage.tokens,
        usage.seconds,
        usage.scorer_calls,
        usage.scorer_seconds,
        best.finished,
    )


def as_data(rows: Sequence[CodeRow]) -> list[dict[str, Any]]:
    """Return rows as plain data."""
    return [asdict(row) for row in rows]

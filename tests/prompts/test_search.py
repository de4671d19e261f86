"""A search finds what is best, spends no more than it may, comes to the same end after a kill, and says how far to trust it."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft.budget import Budget, Usage
from lightning_peft.prompts import (
    TPE,
    Bootstrap,
    Candidate,
    Coordinate,
    Halving,
    PromptSearch,
    PromptSpace,
    RandomSearch,
    Rewrite,
    ScoreCache,
    Verbalizer,
    trials,
)
from lightning_peft.prompts.search import interval
from lightning_peft.prompts.trials import CandidateScorer, Result
from tests.prompts.language_nets import llama, tokenizer

ROOT = Path(__file__).parents[2]
TRAIN = [(f"row {number}", number % 2) for number in range(200)]
VALIDATION = [(f"other {number}", number % 2) for number in range(100)]
TEST = [(f"third {number}", number % 2) for number in range(100)]
CALLS = []


def space(**options):
    options = {"examples": TRAIN[:12], "shots": (0, 2, 4), **options}
    return PromptSpace(
        ["{text} {answer}", "{text}: {answer}", "It: {text}. It is {answer}"],
        [Verbalizer(["bad", "good"]), Verbalizer(["no", "yes"])],
        instructions=[f"Instruction {number}." for number in range(6)],
        **options,
    )


def worth(template, verbalizer):
    """The true accuracy of a prompt in a world that is made up: every part counts by itself."""
    found = 0.5 + 0.06 * int(template.instruction.split()[1].rstrip("."))
    return found + 0.05 * (template.form == "{text}: {answer}") + 0.05 * (verbalizer.answers[0] == ("no",))


@pytest.fixture
def world(monkeypatch):
    """A model whose accuracy is ``worth``, and which counts what it is asked."""
    CALLS.clear()

    def scores(model, tokenizer, rows, template, verbalizer, *, batch_size, usage):
        CALLS.extend((template, verbalizer, row) for row in rows)
        usage.forwards += -(-len(rows) // batch_size)
        usage.tokens += 10 * len(rows)
        right = [hash_of(template, row) < worth(template, verbalizer) for row in rows]
        labels = [int(row.split()[1]) % 2 for row in rows]
        chosen = torch.tensor([label if hit else 1 - label for label, hit in zip(labels, right, strict=True)])
        return torch.nn.functional.one_hot(chosen.long(), 2).float() if len(rows) else torch.empty(0, 2)

    def cost(model, tokenizer, rows, template, verbalizer, *, batch_size):
        return Usage(forwards=-(-len(rows) // batch_size), tokens=10 * len(rows))

    monkeypatch.setattr(trials, "label_log_probabilities", scores)
    monkeypatch.setattr(trials, "scoring_cost", cost)


def hash_of(template, row):
    """Even in [0, 1), from the row alone: harder rows are harder for all prompts."""
    return int(trials.key_of(row)[:8], 16) / 16**8


def run(search, **options):
    torch.manual_seed(0)  # the cache knows a model by its weights
    return search.run(llama(), tokenizer(), TRAIN, VALIDATION, TEST, **options)


@pytest.mark.parametrize("strategy", [RandomSearch(12, 100), Halving(16, 25), Coordinate(2, 6, 100), TPE(6, 100)])
@pytest.mark.usefixtures("world")
def test_a_strategy_finds_a_prompt_near_the_best_one(strategy):
    report = run(PromptSearch(space(), strategy, rounds=8))
    assert worth(report.prompt, report.verbalizer) >= 0.84  # the best is 0.9, the mean one 0.69
    assert report.gap == report.validation.accuracy - report.test.accuracy
    assert report.stopped in {"rounds=8", "nothing new to try"}
    low, high = interval(report.test)
    assert low < report.test.accuracy < high


@pytest.mark.usefixtures("world")
def test_candidates_are_tried_on_training_rows_chosen_on_validation_rows_and_tested_once():
    report = run(PromptSearch(space(), RandomSearch(4, 30), rounds=3, validated=2))
    asked = {kind: [call for call in CALLS if call[2].startswith(kind)] for kind in ("row", "other", "third")}
    assert len({row for _, _, row in asked["row"]}) == 30
    assert len(asked["third"]) == len(TEST)  # of one prompt
    assert {(template, verbalizer) for template, verbalizer, _ in asked["third"]} == {
        (report.prompt, report.verbalizer)
    }
    assert len(asked["other"]) == report.chosen_among * len(VALIDATION)
    assert report.luck == pytest.approx(
        math.sqrt(
            2 * math.log(report.chosen_among) * report.validation.accuracy * (1 - report.validation.accuracy) / 100
        )
    )


@pytest.mark.parametrize(("limit", "most"), [({"max_tokens": 5000}, 5000), ({"max_forwards": 30}, 30)])
@pytest.mark.usefixtures("world")
def test_a_budget_is_asked_before_anything_is_spent(limit, most):
    told = []
    report = run(PromptSearch(space(), RandomSearch(4, 30), rounds=50, budget=Budget(**limit)), on_round=told.append)
    test_rows = Usage(forwards=4, tokens=1000)
    spent = report.usage - test_rows
    assert getattr(spent, next(iter(limit)).removeprefix("max_")) <= most
    assert report.stopped == f"{next(iter(limit))}={most}"
    assert len(told) >= 1
    with pytest.raises(ValueError, match="max_tokens=100.* does not suffice for one candidate"):
        run(PromptSearch(space(), RandomSearch(4, 30), budget=Budget(max_tokens=100)))


@pytest.mark.parametrize("calibration", ["none", "batch"])
@pytest.mark.parametrize("strategy", [RandomSearch(40, 30), Halving(40, 10)])
@pytest.mark.usefixtures("world")
def test_one_round_that_would_use_a_budget_up_leaves_enough_to_judge_what_it_found(strategy, calibration):
    limit = 3900  # the first round alone would take three times as much
    search = PromptSearch(space(), strategy, budget=Budget(max_tokens=limit), validated=2, calibration=calibration)
    report = run(search)
    tests = Usage(tokens=10 * len(TEST))  # what calibration takes of the chosen prompt is known by then
    assert report.stopped == f"max_tokens={limit}"
    assert report.chosen_among >= 1
    assert 0 < (report.usage - tests).tokens <= limit


@pytest.mark.usefixtures("world")
def test_a_search_that_gets_no_better_ends_and_so_does_one_that_is_good_enough():
    patient = run(PromptSearch(space(), RandomSearch(3, 30), rounds=50, patience=2))
    assert patient.stopped == "patience=2"
    assert len(patient.rounds) < 50
    assert run(PromptSearch(space(), RandomSearch(8, 50), rounds=50, stop_at=0.7)).stopped == "stop_at=0.7"


@pytest.mark.parametrize("strategy", [RandomSearch(5, 40), Halving(8, 20), Coordinate(2, 4, 40), TPE(5, 40)])
@pytest.mark.usefixtures("world")
def test_a_search_follows_from_its_seed_and_zero_is_one(strategy):
    first, again, other = (run(PromptSearch(space(), strategy, rounds=4, seed=seed)).rounds for seed in (0, 0, 9))
    assert first == again
    assert first != other


@pytest.mark.usefixtures("world")
def test_a_search_that_is_run_again_pays_for_nothing_and_its_budget_is_that_of_one(tmp_path):
    search = PromptSearch(space(), Halving(8, 20), rounds=6, budget=Budget(max_tokens=9000))
    whole = run(search)
    for stop in (1, 2):  # stopped twice in the middle

        class StoppedError(Exception):
            pass

        def stopped(report, stop=stop, error=StoppedError):
            if len(report.rounds) > stop:
                raise error

        with pytest.raises(StoppedError):
            run(search, cache=ScoreCache(tmp_path / "scores.db"), on_round=stopped)
    resumed = run(search, cache=ScoreCache(tmp_path / "scores.db"))
    assert (resumed.rounds, resumed.prompt, resumed.stopped) == (whole.rounds, whole.prompt, whole.stopped)
    assert resumed.usage.tokens == whole.usage.tokens
    CALLS.clear()
    again = run(search, cache=ScoreCache(tmp_path / "scores.db"))
    assert not CALLS
    assert again.rounds == whole.rounds
    assert again.usage.tokens == whole.usage.tokens


@pytest.mark.usefixtures("world")
def test_another_search_in_the_same_file_has_a_budget_of_its_own(tmp_path):
    search, other = (PromptSearch(made, RandomSearch(4, 30), rounds=2) for made in (space(), space(shots=0)))
    alone = run(other).usage.tokens
    run(search, cache=ScoreCache(tmp_path / "scores.db"))
    assert 0 < run(other, cache=ScoreCache(tmp_path / "scores.db")).usage.tokens <= alone


@pytest.mark.usefixtures("world")
def test_a_strategy_prepares_again_where_a_state_is_gone_on_from_and_within_the_budget():
    first = PromptSearch(space(shots=2), Bootstrap(2, 20)).start(llama(), tokenizer(), TRAIN)
    first.try_round()
    first.judge(VALIDATION)
    again = PromptSearch(space(shots=2), Bootstrap(2, 20)).start(llama(), tokenizer(), TRAIN)
    again.load_state_dict(first.state_dict())
    again.try_round()
    assert again.search.strategy.answered == first.search.strategy.answered
    with pytest.raises(ValueError, match="max_tokens=50.* does not suffice to begin"):
        run(PromptSearch(space(shots=2), Bootstrap(2, 20), budget=Budget(max_tokens=50)))


@pytest.mark.usefixtures("world")
def test_a_writer_sees_the_instructions_with_their_accuracies_and_adds_to_them():
    seen = []

    def writer(told):
        seen.append(told)
        return [f"Instruction {6 + len(seen)}.", told[0][0]]

    report = run(PromptSearch(space(shots=0), Rewrite(writer, 100), rounds=3))
    assert seen[0] == sorted(seen[0], key=lambda one: -one[1])
    assert [len(told) for told in seen] == [6, 7]
    assert report.prompt.instruction == "Instruction 8."


@pytest.mark.usefixtures("world")
def test_demonstrations_are_those_that_the_model_gets_right():
    strategy = Bootstrap(4, 30)
    report = run(PromptSearch(space(shots=2), strategy, rounds=2))
    best = 0.5 + 0.06 * 5 + 0.05  # of the first verbalizer
    assert strategy.answered == tuple(n for n, (row, _) in enumerate(TRAIN[:12]) if hash_of(None, row) < best)
    for found in report.rounds:
        for result in found:
            assert set(result.candidate.demonstrations) <= set(strategy.answered)
    with pytest.raises(ValueError, match="answers . of 2 examples rightly"):
        run(PromptSearch(space(examples=[("row 1", 0), ("row 3", 0)], shots=2), Bootstrap()))


def test_of_equal_candidates_the_shorter_prompt_is_better_and_then_the_hash_decides():
    found = [Result(Candidate(), 5, 10, length, digest) for length, digest in [(7, "b"), (7, "a"), (9, "a")]] + [
        Result(Candidate(), 6, 10, 99, "z"),
        Result(Candidate(), 10, 20, 9, "c"),
    ]
    assert [(one.length, one.digest) for one in sorted(found, key=lambda one: one.order)] == [
        (99, "z"), (9, "c"), (7, "a"), (7, "b"), (9, "a"),
    ]  # fmt: skip


def test_a_real_scorer_computes_each_score_once_and_foretells_its_cost(tmp_path):
    model, tokens, made = llama(), tokenizer(), space()
    scorer = CandidateScorer(
        model, tokens, made, cache=ScoreCache(tmp_path / "scores.db"), calibration="batch", calibration_rows=["row 1"]
    )
    candidate = Candidate(1, 2, (3, 4), 1)
    rows = [row for row, _ in TRAIN[:7]]
    cost = scorer.cost(candidate, rows)
    first = scorer.log_probabilities(candidate, rows)
    assert (scorer.usage.forwards, scorer.usage.tokens) == (cost.forwards, cost.tokens)
    assert torch.equal(scorer.log_probabilities(candidate, rows), first)
    assert scorer.usage.tokens == cost.tokens
    assert scorer.usage.cached == 7
    again = CandidateScorer(model, tokens, made, cache=ScoreCache(tmp_path / "scores.db"))
    assert again.cost(candidate, rows) == Usage()
    assert torch.equal(again.log_probabilities(candidate, rows), first)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert CandidateScorer(model, tokens, made, cache=ScoreCache(tmp_path / "scores.db")).cost(candidate, rows) == cost


def test_a_budget_without_sense_is_refused():
    with pytest.raises(ValueError, match="max_tokens=0 must be a number above 0"):
        Budget(max_tokens=0)
    with pytest.raises(ValueError, match="0 training and 2 validation rows"):
        PromptSearch(space()).run(None, None, [], VALIDATION[:2])
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        PromptSearch(space(), rounds=0)
    with pytest.raises(ValueError, match="shots=20 with 12 examples"):
        space(shots=20)


KILLED = """
import sys, time
import torch
from lightning_peft.prompts import PromptSearch, RandomSearch, ScoreCache
from tests.prompts.language_nets import llama, tokenizer
from tests.prompts.test_search import TRAIN, VALIDATION, space
torch.set_num_threads(1)
torch.manual_seed(0)
report = PromptSearch(space(), RandomSearch(3, 16), rounds=4).run(
    llama(), tokenizer(), TRAIN, VALIDATION[:16], cache=ScoreCache(sys.argv[1]),
    on_round=lambda report: (print("round", flush=True), time.sleep(0.3)),
)
print(report.prompt, report.usage.tokens, report.validation)
"""


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    def start(name):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / name)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    whole, killed = start("whole.db"), start("killed.db")
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    expected = whole.communicate()[0].splitlines()[-1]
    again = start("killed.db").communicate()[0].splitlines()[-1]
    assert again == expected

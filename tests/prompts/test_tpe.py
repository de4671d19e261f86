"""What the estimator proposes is new, follows from what was found, reaches everything, and is better than what chance proposes."""

import logging
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.prompts import TPE, Candidate, PromptSpace, RandomSearch, Verbalizer
from lightning_peft.prompts.trials import Result

optuna = pytest.importorskip("optuna", reason="needs the extra search")
ROOT = Path(__file__).parents[2]


def space(instructions=10, forms=3, verbalizers=3, examples=12, shots=(0, 2)):
    return PromptSpace(
        ["{text} {answer}", "{text}: {answer}", "{text}, {answer}"][:forms],
        [Verbalizer([f"no{number}", f"yes{number}"]) for number in range(verbalizers)],
        instructions=[f"Instruction {number}." for number in range(instructions)],
        examples=[(f"row {number}", number % 2) for number in range(examples)],
        shots=shots,
    )


def worth(candidate, world=0):
    """The accuracy of a candidate in a world where parts count by themselves, and the best one of each is drawn."""

    def part(name, number):
        return random.Random(f"{world} {name} {number}").random()

    shown = [part("example", number) for number in candidate.demonstrations]
    return (
        0.5
        + 0.25 * part("instruction", candidate.instruction)
        + 0.1 * part("form", candidate.form)
        + 0.05 * part("verbalizer", candidate.verbalizer)
        + 0.1 * (statistics.mean(shown) if shown else part("length", 0))
    )


def search(strategy, made, count, *, seed=0, world=0, rounds=()):
    """Go on with a search until so many rounds are there, without noise."""
    found = list(rounds)
    while len(found) < count:
        trials = strategy.propose(made, found, random.Random(f"{seed} round {len(found)}"))
        if not trials:
            break
        results = [(trial.candidate, round(1000 * worth(trial.candidate, world))) for trial in trials]
        found.append([Result(candidate, correct, 1000, 9, repr(candidate)) for candidate, correct in results])
    return found


def candidates(rounds):
    return [result.candidate for found in rounds for result in found]


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_proposed_follows_from_the_results_and_the_seed_and_needs_no_memory(seed):
    whole = search(TPE(4), space(), 8, seed=seed)
    assert search(TPE(4), space(), 8, seed=seed, rounds=whole[:4]) == whole
    plain = [search(TPE(4), space(shots=0), 3, seed=one) for one in (seed, seed + 5)]
    assert plain[0] != plain[1]
    # After the random beginning, results decide: another world, other proposals.
    other = search(TPE(4), space(), 8, seed=seed, world=1)
    assert candidates(other[:2]) == candidates(whole[:2])
    assert candidates(other[2:]) != candidates(whole[2:])


def test_every_process_proposes_the_same_whatever_order_its_sets_have():
    code = (
        "from tests.prompts.test_tpe import *\n"
        "print([(one.form, one.instruction, one.demonstrations, one.verbalizer) for one in candidates(search(TPE(3), space(), 5))])"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    told = [run.communicate()[0] for run in runs]
    assert told[0] == told[1]
    assert len(told[0]) > 100


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_tried_twice_and_the_end_comes_when_everything_was_tried(seed):
    made = space(instructions=3, forms=2, verbalizers=1, examples=2, shots=(0, 1, 2))
    rounds = search(TPE(4, lists=1), made, 99, seed=seed)
    found = candidates(rounds)
    # 3 instructions, 2 forms; of two examples of two labels: none, one of two, both in two orders
    assert len(found) == len(set(found)) == 3 * 2 * (1 + 2 + 2)
    assert all(len(one) == 4 for one in rounds[:-1])
    assert TPE().propose(made, rounds, random.Random(0)) == []


@pytest.mark.parametrize("left", [Candidate(2, 31, (), 1), Candidate(0, 0, (), 2)])
def test_the_last_prompt_of_many_is_found(left):
    made = space(instructions=50, shots=0)
    every = [Candidate(form, number, (), said) for form in range(3) for number in range(50) for said in range(3)]
    tried = [Result(one, 500, 1000, 9, repr(one)) for one in every if one != left]
    assert [trial.candidate for trial in TPE(4).propose(made, [tried], random.Random(0))] == [left]


def test_a_space_of_one_prompt_is_tried_once():
    made = space(instructions=1, forms=1, verbalizers=1, shots=0)
    assert len(candidates(search(TPE(), made, 5))) == 1


def test_a_large_space_costs_no_more_than_what_was_tried():
    made = space(instructions=50_000, examples=12, shots=(4, 8))
    assert len(set(candidates(search(TPE(4), made, 4)))) == 16


def test_with_as_many_trials_it_comes_nearer_to_the_best_prompt_than_chance():
    def top(strategy, world):
        found = candidates(search(strategy, space(), 10, seed=world, world=world))
        assert len(found) == 40
        return max(worth(one, world) for one in found)

    gains = [top(TPE(4), world) - top(RandomSearch(4), world) for world in range(12)]
    assert statistics.mean(gains) > 0.01
    assert statistics.mean(gains) > 2 * statistics.stdev(gains) / 12**0.5


def test_the_best_prompt_is_found_in_fewer_trials_than_by_chance():
    """Of 90 prompts, one is the best: chance needs 45.5 trials on average."""

    def needed(strategy, world):
        made = space(shots=0)
        found = candidates(search(strategy, made, 45, seed=world, world=world))
        assert len(set(found)) == len(found)
        return 1 + found.index(max(found, key=lambda one: worth(one, world)))

    taken = [needed(TPE(2), world) for world in range(8)]
    assert statistics.mean(taken) < 30


def test_a_list_of_demonstrations_that_did_well_comes_again_with_other_instructions():
    made = space(instructions=20, forms=1, verbalizers=1)
    tried = candidates(search(TPE(4), made, 4))
    shown = next(one.demonstrations for one in tried if one.demonstrations)
    rounds = [
        [Result(one, 900 if one.demonstrations == shown else 500, 1000, 9, repr(one)) for one in tried[start : start + 4]]
        for start in range(0, len(tried), 4)
    ]  # fmt: skip
    following = [
        trial.candidate.demonstrations
        for seed in range(10)
        for trial in TPE(4).propose(made, rounds, random.Random(seed))
    ]
    others = {one.demonstrations for one in tried if one.demonstrations} - {shown}
    assert following.count(shown) > 2 * max(following.count(other) for other in others)


def test_optuna_is_left_as_it_was_and_says_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search(TPE(4), space(), 4)  # a warning would be an error
    assert not caplog.records
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-peft\[search\]"'):
        TPE().propose(space(), [], random.Random(0))


def test_counts_without_sense_are_refused():
    for name in ("count", "rows", "startup", "lists"):
        with pytest.raises(ValueError, match=f"TPE: {name}=0 must be at least 1"):
            TPE(**{name: 0})

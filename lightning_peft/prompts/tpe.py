"""Candidates whose parts good prompts have more often than bad ones: what was found so far says where to look next."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from lightning_peft.prompts.space import Candidate, PromptSpace
from lightning_peft.prompts.strategies import Rounds, Strategy, Trial, new_draws

_PARTS = ("form", "instruction", "verbalizer")
Tried = Mapping[Candidate, float]
"""Candidates and their accuracies."""
Lists = Mapping[int, list[tuple[int, ...]]]
"""Lists of demonstrations to choose among, by their length."""


@dataclass
class TPE(Strategy):
    """A tree-structured Parzen estimator: a candidate is proposed where ``l(x) / g(x)`` is high.

    ``l`` is the density of the candidates that did best so far, ``g`` that of the others; Bergstra et al. 2011, "Algorithms for
    Hyper-Parameter Optimization", NeurIPS. The work is done by optuna (``pip install "lightning-peft[search]"``).

    Form, instruction and verbalizer are a choice each. Of demonstrations, first their number is chosen, then one of several
    ready lists of that length, like the ready sets of MIPROv2 (Opsahl-Ong et al. 2024, arXiv:2406.11695). A choice for each
    place in the list would have as many values as there are examples and would never see one of them twice within the few dozen
    trials that a search has; a list that did well is tried again, whole and in its order, with other instructions. A list stays
    once it was tried; until there are ``lists`` of a length, each round draws others beside them.

    All that was tried is read from the rounds, so a search that goes on proposes what it would have proposed.

    **The trap:** it learns from accuracies, and the noise of ``rows`` training rows is in them. It needs some dozens of trials to
    be better than random ones; where parts of a prompt count by themselves, :class:`Coordinate` is as good.

    Args:
        count: Candidates of a round.
        rows: Training rows of each.
        startup: Random candidates at the beginning.
        lists: Lists of demonstrations of a length among which one is chosen.

    Raises:
        ImportError: When it first proposes, without optuna.
        ValueError: For a count below 1.

    >>> from lightning_peft.prompts import PromptSpace, Verbalizer
    >>> space = PromptSpace(["{text} {answer}"], [Verbalizer(["no", "yes"])], instructions=["", "Judge.", "Say."])
    >>> trials = TPE(count=2, rows=16).propose(space, [], random.Random(0))
    >>> len({trial.candidate for trial in trials}), trials[0].rows
    (2, 16)
    """

    count: int = 4
    rows: int = 64
    startup: int = 8
    lists: int = 8

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("count", "rows", "startup", "lists"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"TPE: {name}={value!r} must be at least 1.")

    def propose(self, space: PromptSpace, rounds: Rounds, generator: random.Random) -> list[Trial]:
        """Return new candidates that the estimator expects most of; where it repeats itself, random ones."""
        tried = {result.candidate: result.accuracy for found in rounds for result in found}
        lists = self._lists(space, tried, generator)
        found = dict.fromkeys(self._expected(space, tried, lists, generator))
        taken = tried.keys() | found.keys()
        # Among so many different ones there are enough new ones, if there are so many at all.
        for candidate in _sample(space, lists, len(taken) + self.count, generator):
            if len(found) < self.count and candidate not in taken:
                found[candidate] = None
        if len(found) < self.count:  # these lists are used up: others may be left
            found |= dict.fromkeys(new_draws(space, rounds, generator, self.count))
        return [Trial(candidate, self.rows) for candidate in list(found)[: self.count]]

    def _lists(self, space: PromptSpace, tried: Tried, generator: random.Random) -> Lists:
        """Return the lists of demonstrations that were tried, and new ones up to the number that there shall be."""
        lists: dict[int, dict[tuple[int, ...], None]] = {shots: {} for shots in space.shots}
        for candidate in tried:
            lists[len(candidate.demonstrations)][candidate.demonstrations] = None
        for shots, known in lists.items():
            for _ in range(20 * self.lists):  # there may be fewer
                if len(known) >= (self.lists if shots else 1):
                    break
                known[space.draw_demonstrations(generator, shots=shots)] = None
        return {shots: list(known) for shots, known in lists.items()}

    def _expected(self, space: PromptSpace, tried: Tried, lists: Lists, generator: random.Random) -> list[Candidate]:
        """Return new candidates that the estimator expects most of; fewer, if it repeats itself."""
        optuna = _optuna()
        with _quiet(optuna):
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=self.startup,
                seed=generator.getrandbits(32),
                multivariate=True,  # parts are chosen together, for one may be good with another only,
                group=True,  # also where the choice of a list depends on its length
                constant_liar=True,  # within a round, away from what it has proposed already
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            for candidate, accuracy in tried.items():
                study.add_trial(_told(optuna, space, lists, candidate, accuracy))
            found: dict[Candidate, None] = {}
            for _ in range(4 * self.count):
                candidate = _chosen(study.ask(), space, lists)
                if candidate not in tried:
                    found[candidate] = None
                if len(found) == self.count:
                    break
        return list(found)


def _choices(space: PromptSpace, lists: Lists, shots: int) -> dict[str, list[int]]:
    """Return the values of each choice, for so many demonstrations."""
    parts = {part: list(range(space.choices(part))) for part in _PARTS}
    return {**parts, "shots": list(lists), f"list of {shots}": list(range(len(lists[shots])))}


def _told(optuna: Any, space: PromptSpace, lists: Lists, candidate: Candidate, accuracy: float) -> Any:
    """Return a candidate and its accuracy as optuna's trial."""
    shots = len(candidate.demonstrations)
    values = {part: getattr(candidate, part) for part in _PARTS}
    values |= {"shots": shots, f"list of {shots}": lists[shots].index(candidate.demonstrations)}
    choices = {name: found for name, found in _choices(space, lists, shots).items() if len(found) > 1}
    return optuna.trial.create_trial(
        params={name: values[name] for name in choices},
        distributions={name: optuna.distributions.CategoricalDistribution(found) for name, found in choices.items()},
        value=accuracy,
    )


def _chosen(trial: Any, space: PromptSpace, lists: Lists) -> Candidate:
    """Return the candidate that optuna chooses."""

    def choice(name: str, values: list[int]) -> int:
        found: int = trial.suggest_categorical(name, values) if len(values) > 1 else values[0]
        return found

    shots = choice("shots", list(lists))
    values = {name: choice(name, found) for name, found in _choices(space, lists, shots).items() if name != "shots"}
    shown = lists[shots][values[f"list of {shots}"]]
    return Candidate(values["form"], values["instruction"], shown, values["verbalizer"])


def _sample(space: PromptSpace, lists: Lists, count: int, generator: random.Random) -> Iterator[Candidate]:
    """Yield different random candidates with these lists of demonstrations; all, if there are no more."""
    flat = [one for known in lists.values() for one in known]
    sizes = [*(space.choices(part) for part in _PARTS), len(flat)]
    for drawn in generator.sample(range(prod(sizes)), min(count, prod(sizes))):
        number, places = drawn, []
        for size in sizes:
            number, place = divmod(number, size)
            places.append(place)
        yield Candidate(places[0], places[1], flat[places[3]], places[2])


def _optuna() -> Any:
    try:
        import optuna  # noqa: PLC0415 - an extra
    except ImportError as missing:
        raise ImportError('TPE: optuna is not installed. Run: pip install "lightning-peft[search]"') from missing
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep optuna from telling of every study, and of options that it calls experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)

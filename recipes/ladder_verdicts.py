"""What a lecture says of the ladder, held against the rows: each answer with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Z = 1.96


@dataclass(frozen=True)
class Difference:
    """A difference of two rungs.

    Args:
        value: The first less the second, mean over seeds.
        error: Its standard error.
    """

    value: float
    error: float

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self.value - Z * self.error

    @property
    def high(self) -> float:
        """The upper end."""
        return self.value + Z * self.error

    @property
    def sign(self) -> str:
        """Whether it is above 0 for sure, below, or not known."""
        return "yes" if self.low > 0 else "no" if self.high < 0 else "not decided"

    def __str__(self) -> str:
        return f"{self.value:+.3f} (95 % {self.low:+.3f} to {self.high:+.3f})"


def accuracy_difference(first: Sequence[Row], second: Sequence[Row]) -> Difference | None:
    """Return how much more test rows a rung has right than another one; None where no seed has both.

    Paired over rows and seeds: with ``d`` the difference of a row's hits, averaged over seeds, the variance is ``var(d) / rows``,
    and where there are several seeds the spread of the seeds' differences over their number is added. It counts the rows' part
    twice there, so intervals are rather too wide than too narrow.

    >>> same = [{"seed": 0, "hits": "1101"}]
    >>> accuracy_difference(same, same).value
    0.0
    """
    pairs = paired(first, second)
    if not pairs:
        return None
    by_seed = [[int(a) - int(b) for a, b in zip(one["hits"], other["hits"], strict=True)] for one, other in pairs]
    by_row = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    error = statistics.variance(by_row) / len(by_row)
    if len(by_seed) > 1:
        error += statistics.variance(map(statistics.fmean, by_seed)) / len(by_seed)
    return Difference(statistics.fmean(by_row), math.sqrt(error))


def paired(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the rows of the same seed."""
    others = {row["seed"]: row for row in second}
    return [(row, others[row["seed"]]) for row in first if row["seed"] in others]


def spread_difference(first: Sequence[Row], second: Sequence[Row], key: str) -> Difference | None:
    """Return the difference of a column, whose error is the spread over seeds; without several seeds it is not known."""
    values = [one[key] - other[key] for one, other in paired(first, second)]
    if not values:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return Difference(statistics.fmean(values), error)


def overfit_difference(first: Sequence[Row], second: Sequence[Row], train_rows: int) -> Difference | None:
    """Return how much larger a rung's gap between training and test accuracy is; its error is that of four shares."""
    pairs = paired(first, second)
    if not pairs:
        return None
    value = statistics.fmean((a["train"] - a["accuracy"]) - (b["train"] - b["accuracy"]) for a, b in pairs)
    test_rows = len(pairs[0][0]["hits"])
    error = statistics.fmean(
        sum(
            row[key] * (1 - row[key]) / count
            for row in pair
            for key, count in (("train", train_rows), ("accuracy", test_rows))
        )
        for pair in pairs
    )
    return Difference(value, math.sqrt(error))


def verdicts(rows: Mapping[str, Sequence[Row]], train_rows: int) -> list[str]:
    """Answer each claim, as far as its rungs were run.

    Args:
        rows: Rows by arm, all of the same number of labelled rows.
        train_rows: On how many training rows accuracy was measured.
    """
    lines = []

    def add(question: str, first: str, second: str, found: Difference | None, unit: str = "accuracy") -> None:
        if found is not None:
            lines.append(f"{question} {found.sign.capitalize()}: {first} less {second} {found} in {unit}.")

    def rung(name: str) -> Sequence[Row]:
        return rows.get(name, ())

    add("Does a linear probe beat prompting?", "probe", "prompt", accuracy_difference(rung("probe"), rung("prompt")))
    add(
        "Does it beat the prompt that was searched for?",
        "probe",
        "search",
        accuracy_difference(rung("probe"), rung("search")),
    )
    add(
        "Does full fine-tuning overfit more than LoRA?", "gap of full", "gap of lora",
        overfit_difference(rung("full"), rung("lora"), train_rows), "accuracy on training less test rows",
    )  # fmt: skip
    found = accuracy_difference(rung("search"), rung("prompt"))
    if found is not None:
        gap = max(0.0, statistics.fmean(row["gap"] for row in rung("search")))
        beyond = Difference(found.value - gap, found.error)
        lines.append(
            f"Does search beat the plain prompt by more than its selection gap? {beyond.sign.capitalize()}: gain {found}, gap "
            f"between validation and test {gap:.3f}."
        )
    add(
        "Do prefixes beat soft prompts?",
        "prefix",
        "soft_prompt",
        accuracy_difference(rung("prefix"), rung("soft_prompt")),
    )
    found = accuracy_difference(rung("lora"), rung("full"))
    if found is not None:
        reaches = "yes" if found.low > -0.02 else "no" if found.high < -0.02 else "not decided"
        lines.append(
            f"Does LoRA reach full fine-tuning (to 0.02)? {reaches.capitalize()}: lora less full {found} in accuracy."
        )
    lost = spread_difference(rung("full"), rung("lora"), "forgotten attached")
    if lost is not None:
        told = f"{lost}" if math.isfinite(lost.error) else f"{lost.value:+.3f} (one seed, no interval)"
        answer = lost.sign if math.isfinite(lost.error) else "not decided"
        lines.append(
            f"Does LoRA forget less? {answer.capitalize()}: full less lora {told} nats per token of general text."
        )
    for key, what in (("seconds", "Do seconds of learning rise"), ("peak memory", "Does peak memory rise")):
        if line := rises(rows, key):
            lines.append(f"{what} along the ladder? {line}")
    return lines


def rises(rows: Mapping[str, Sequence[Row]], key: str) -> str:
    """Say whether a column rises from rung to rung of the language model, by Spearman's rank correlation."""
    own = {name: [row[key] for row in found] for name, found in rows.items() if found and "(" not in name}
    if len(own) < 3 or any(None in values for values in own.values()):
        return ""
    means = {name: statistics.fmean(values) for name, values in own.items()}
    order = sorted(range(len(means)), key=list(means.values()).__getitem__)
    ranks = [order.index(number) for number in range(len(means))]
    count = len(ranks)
    rho = 1 - 6 * sum((rank - number) ** 2 for number, rank in enumerate(ranks)) / (count * (count**2 - 1))
    answer = "Yes" if rho == 1 else "Not at every step" if rho > 0 else "No"
    lowest, highest = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return f"{answer}: rank correlation {rho:+.2f} over {count} rungs; least {lowest}, most {highest}."

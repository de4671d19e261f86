"""What the picture of the leaky balloon says, as checks on the rows of the recipe ``leaky_balloon``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
HELD = 5.0
"""A skill holds if it loses at most so many points, with two standard errors to spare."""
REFERENCE = {0.0: (40.1, 1.7), 1.0: (48.0, 1.1), 10.0: (81.2, 0.7)}
"""By decay, the forgetting of the unfed skill in a plain implementation of the protocol: points over ten seeds, mean and error."""


@dataclass(frozen=True)
class Check:
    """Something that should come out, and whether it did.

    Args:
        what: What should come out.
        found: The figures.
        holds: Whether it did.
        decides: Whether the run fails with it. What is only shown beside the two decays of the experiment does not decide.
    """

    what: str
    found: str
    holds: bool
    decides: bool = True

    def __str__(self) -> str:
        return f"{'ok    ' if self.holds else 'NOT ok'} {self.what}: {self.found}"


def where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def kinds(rows: Sequence[Row], key: str) -> list[Any]:
    """Return the different values of a column, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; that of a single value is not known.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def area(row: Row) -> float:
    """Return the area under the upright skill's curve over the steps: its mean accuracy, by the trapezoid rule.

    >>> area({"steps": [0, 10, 40], "upright": [1.0, 0.5, 0.5]})
    0.5625
    """
    looks = list(zip(row["steps"], row["upright"], strict=True))
    whole = sum((right - left) * (one + other) / 2 for (left, one), (right, other) in pairwise(looks))
    return float(whole / (row["steps"][-1] - row["steps"][0]))


def checks(rows: Sequence[Row], *, protocol: bool) -> list[Check]:
    """Return all checks: those of the experiment, without decay and with the first decay above it, then those of others.

    Args:
        rows: Of all cells and seeds; of a decay, all cells have the same seeds.
        protocol: Whether the setting is that of :data:`REFERENCE`.
    """
    none, *leaks = kinds(rows, "decay")
    found = [_both_hold(rows, none, decides=True)]
    for decay in leaks:
        decides = decay == leaks[0]
        found += [*_falls_faster(rows, decay, decides=decides), _both_hold(rows, decay, decides=decides)]
    if protocol:
        found += [_as_expected(rows, decay) for decay in sorted({none, *leaks} & REFERENCE.keys())]
    return found


def _falls_faster(rows: Sequence[Row], decay: float, *, decides: bool) -> Iterator[Check]:
    alone = _paired(where(rows, feed="one arm", decay=decay), where(rows, feed="one arm", decay=0))
    both = _paired(where(rows, feed="both arms", decay=decay), where(rows, feed="both arms", decay=0))
    differences = {
        "the unfed skill ends lower than without": [_lost(one) - _lost(other) for one, other in alone],
        "the area under the unfed skill's curve is less": [100 * (area(other) - area(one)) for one, other in alone],
        "it takes more of the unfed skill than of the same skill fed": [
            _lost(one) - _lost(other) - _lost(fed) + _lost(fed_other)
            for (one, other), (fed, fed_other) in zip(alone, both, strict=True)
        ],
    }
    for what, values in differences.items():
        mean, error = mean_and_error(values)
        text = f"{mean:.1f} ± {error:.1f} points, {mean / error if error else float('inf'):.1f} standard errors"
        yield Check(f"decay {decay:g}: {what}", text, mean > 0 and mean > 2 * error, decides)


def _both_hold(rows: Sequence[Row], decay: float, *, decides: bool) -> Check:
    fed = where(rows, feed="both arms", decay=decay)
    best = _paired(fed, where(rows, feed="one arm", decay=0))
    lost = {
        "upright": mean_and_error([_lost(row) for row in fed]),
        "turned": mean_and_error([100 * (other["turned_after"] - one["turned_after"]) for one, other in best]),
    }
    text = ", ".join(f"{arm} loses {mean:.1f} ± {error:.1f} points" for arm, (mean, error) in lost.items())
    holds = all(mean + 2 * error <= HELD for mean, error in lost.values())
    return Check(f"decay {decay:g}: both skills hold when both are fed", text, holds, decides)


def _as_expected(rows: Sequence[Row], decay: float) -> Check:
    mean, error = mean_and_error([_lost(row) for row in where(rows, feed="one arm", decay=decay)])
    expected, its_error = REFERENCE[decay]
    room = 2 + 2 * (error**2 + its_error**2) ** 0.5
    text = f"{mean:.1f} ± {error:.1f} points, there {expected} ± {its_error}"
    return Check(f"decay {decay:g}: the unfed skill loses as much as in the reference", text, abs(mean - expected) <= room)


def _lost(row: Row) -> float:
    return 100 * float(row["forgetting"])


def _paired(one: Sequence[Row], other: Sequence[Row], key: Callable[[Row], Any] = lambda row: row["seed"]) -> Any:
    return list(zip(sorted(one, key=key), sorted(other, key=key), strict=True))

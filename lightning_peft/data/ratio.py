"""The share of old rows: constant, after a schedule, or steered while training; counted in whole numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

UNIT = 2**20
"""A ratio that changes is rounded to this fraction of one: sums of it are whole numbers, so no rounding adds up."""


def exact(ratio: float, owner: str) -> Fraction:
    """Return a ratio as the simple fraction that was meant.

    Raises:
        ValueError: If it does not lie inside (0, 1).

    >>> exact(0.2, "ReplayMixing")
    Fraction(1, 5)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction) or not 0 < ratio < 1:
        raise ValueError(
            f"{owner}: ratio={ratio!r} must lie inside (0, 1): the share of old rows among all rows of a step."
        )
    meant = Fraction(ratio).limit_denominator(100_000)
    return meant if 0 < meant < 1 else Fraction(ratio)


@dataclass(frozen=True)
class _Way:
    first: float
    last: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse what is no way from one share to another."""
        name = type(self).__name__
        for which, ratio in (("first", self.first), ("last", self.last)):
            if not 0 <= ratio < 1:
                raise ValueError(f"{name}: {which}={ratio!r} must lie in [0, 1): a share of old rows.")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"{name}: steps={self.steps!r} must be a whole number of at least 1.")

    def _between(self, gone: float) -> float:
        return self.first + (self.last - self.first) * gone


class LinearRatio(_Way):
    """Go from one share of old rows to another in a straight line, and stay there.

    Args:
        first: The share at step 0, in [0, 1).
        last: The share from step ``steps`` on, in [0, 1).
        steps: Optimizer steps of the way.

    >>> [round(LinearRatio(0.5, 0.1, steps=4)(step), 3) for step in (0, 2, 4, 9)]
    [0.5, 0.3, 0.1, 0.1]
    """

    def __call__(self, step: int) -> float:
        """Return the share at a step."""
        return self._between(min(step / self.steps, 1.0))


class CosineRatio(_Way):
    """Go from one share of old rows to another along half a cosine wave, slowly at both ends, and stay there.

    Args:
        first: The share at step 0, in [0, 1).
        last: The share from step ``steps`` on, in [0, 1).
        steps: Optimizer steps of the way.

    >>> [round(CosineRatio(0.5, 0.1, steps=4)(step), 3) for step in (0, 2, 4, 9)]
    [0.5, 0.3, 0.1, 0.1]
    """

    def __call__(self, step: int) -> float:
        """Return the share at a step."""
        return self._between((1 - math.cos(math.pi * min(step / self.steps, 1.0))) / 2)


class Curve:
    """A share of old rows for each step, and its sums.

    Args:
        ratio: Takes the number of a step, counted from 0 over the run, and returns a share in [0, 1).
        owner: Begins the error message.
    """

    def __init__(self, ratio: Callable[[int], float], owner: str) -> None:
        self.ratio, self.owner = ratio, owner
        self._upto = {False: [0], True: [0]}
        self.at(0)

    def at(self, step: int, *, odds: bool = False) -> int:
        """Return the share at a step in parts of ``UNIT``; as odds, old rows for each new one.

        Raises:
            ValueError: If the function returned no share.
        """
        ratio = self.ratio(step)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction) or not 0 <= ratio < 1:
            raise ValueError(f"{self.owner}: ratio({step}) returned {ratio!r}; it must return a share in [0, 1).")
        return round((ratio / (1 - ratio) if odds else ratio) * UNIT)

    def upto(self, step: int, *, odds: bool = False) -> int:
        """Return the sum of the shares of the steps before ``step``."""
        known = self._upto[odds]
        while len(known) <= step:
            known.append(known[-1] + self.at(len(known) - 1, odds=odds))
        return known[step]


class SteeredCurve(Curve):
    """A share that is changed while the run goes on; what has been drawn stays as it was.

    Args:
        ratio: The share to begin with, in [0, 1).
        owner: Begins the error message.
    """

    def __init__(self, ratio: float, owner: str) -> None:
        self.changes: list[tuple[int, float]] = [(0, float(ratio))]
        super().__init__(self._now, owner)

    def _now(self, step: int) -> float:
        return next(ratio for first, ratio in reversed(self.changes) if first <= step)

    def change(self, step: int, ratio: float) -> None:
        """Let the share be another one from a step on."""
        self._go_back(step, [*(change for change in self.changes if change[0] < step), (step, float(ratio))])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"changes": [list(change) for change in self.changes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self._go_back(0, [(int(step), float(ratio)) for step, ratio in state["changes"]])

    def _go_back(self, step: int, changes: list[tuple[int, float]]) -> None:
        self.changes = changes
        for known in self._upto.values():
            del known[step + 1 :]
        self.at(step)

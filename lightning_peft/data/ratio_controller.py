"""Steer the share of old rows by how much has been forgotten."""

from __future__ import annotations

import math
from typing import Any


class RatioController:
    """A share of old rows that follows the excess of forgetting over a target inside its budget.

    The excess is smoothed, as it is measured on few rows, and moves the log-odds of the share:
    ``logit(r) <- logit(r) + gain * clip((f - target * budget) / budget, -1, limit)`` with
    ``f <- smoothing * f_now + (1 - smoothing) * f``. In log-odds a step from 0.5 to 0.6 is as long as one from 0.02 to 0.03:
    the share comes down as readily as it goes up, which a share that doubles and falls by steps does not.

    Args:
        first: The share to begin with.
        gain: Log-odds for each budget's worth of excess.
        target: Where to aim, as a share of the budget.
        smoothing: Weight of the newest measurement.
        least: Smallest share.
        most: Largest share.

    >>> [round(RatioController(first=0.5).update(used), 2) for used in (0.0, 0.6, 5.0)]
    [0.38, 0.5, 0.6]
    """

    limit = 0.5
    """Largest excess that counts, in budgets: much is lost in the first steps and comes back, so it must not wind up."""

    def __init__(  # noqa: PLR0917 - each is a number with a name
        self,
        first: float = 0.5,
        gain: float = 0.8,
        target: float = 0.6,
        smoothing: float = 0.7,
        least: float = 0.005,
        most: float = 0.75,
    ) -> None:
        self.first, self.gain, self.target, self.smoothing = first, gain, target, smoothing
        self.least, self.most = least, most
        self.ratio = first
        self.excess: float | None = None

    def update(self, used: float) -> float:
        """Return the next share.

        Args:
            used: The part of the budget that is used up: forgetting over budget; of several tasks, the largest.
        """
        self.excess = used if self.excess is None else self.smoothing * used + (1 - self.smoothing) * self.excess
        error = min(max(self.excess - self.target, -1.0), self.limit)
        odds = math.log(self.ratio / (1 - self.ratio)) + self.gain * error
        self.ratio = min(max(1 / (1 + math.exp(-odds)), self.least), self.most)
        return self.ratio

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"ratio": self.ratio, "excess": self.excess}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.ratio, self.excess = state["ratio"], state["excess"]

"""Count replay in tokens: rows are of unequal length, so a share of rows is another share of tokens."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lightning_peft.data.mix_plan import MixPlan
from lightning_peft.data.ratio import Curve


class TokenCount:
    """The lengths of new and old rows, and how many tokens of each were drawn.

    A share ``r`` of tokens is the share ``r m_new / (r m_new + (1 - r) m_old)`` of rows, with the mean lengths ``m``: over
    whole passes of both streams it is exact.

    Args:
        tokens: Returns the length of a row.
        owner: Begins the error message.
    """

    def __init__(self, tokens: Callable[[Any], int], owner: str) -> None:
        self.tokens, self.owner = tokens, owner
        self.old_lengths: Any = None
        self.new_lengths: Any = None
        self.old, self.all = 0, 0

    def measure(self, new: Any, old: Any) -> None:
        """Take the length of every row.

        Raises:
            ValueError: If the function gives no length for a row.
        """
        self.new_lengths, self.old_lengths = self._lengths(new, "new"), self._lengths(old, "old")

    def of_rows(self, ratio: Fraction | Curve) -> Fraction | Curve:
        """Return the share of rows that makes up a share of tokens."""
        new, old = (Fraction(float(lengths.mean())) for lengths in (self.new_lengths, self.old_lengths))

        def rows(tokens: Fraction) -> Fraction:
            return (tokens * new / (tokens * new + (1 - tokens) * old)).limit_denominator(100_000)

        if isinstance(ratio, Fraction):
            return rows(ratio)
        return Curve(lambda step: float(rows(Fraction(ratio.ratio(step)))), self.owner)

    def count(self, plan: MixPlan, epoch: int, step: int) -> None:
        """Count the rows of one step."""
        old, index = plan.block(epoch, step, step + 1)
        drawn = old.astype(bool)
        old_tokens = int(self.old_lengths[index[drawn]].sum())
        self.old, self.all = self.old + old_tokens, self.all + old_tokens + int(self.new_lengths[index[~drawn]].sum())

    def _lengths(self, rows: Any, which: str) -> Any:
        found = []
        for number in tqdm(range(len(rows)), desc=f"lengths of {which} rows", delay=2, leave=False):
            length = self.tokens(rows[number])
            if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 1:
                raise ValueError(
                    f"{self.owner}: tokens returned {length!r} for {which} row {number}; it must return how many tokens the row "
                    "has, a whole number of at least 1."
                )
            found.append(int(length))
        return np.array(found)

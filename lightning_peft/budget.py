"""What a search may spend, and what it has spent: forwards, tokens, seconds, calls of a scorer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

_COUNTED = ("forwards", "tokens", "seconds", "scorer_calls")


@dataclass
class Usage:
    """What was spent.

    Args:
        forwards: Calls of the model.
        tokens: Positions that went through the model, padding included.
        seconds: Wall time.
        scorer_calls: Questions that an external scorer was asked: one for each text.
        scorer_seconds: Wall time inside it.
        cached: What was asked and did not have to be computed.
        prompt_tokens: Positions of prompts where they are counted apart from ``tokens``, as decoders do.

    >>> (Usage(forwards=1, tokens=10) + Usage(tokens=5)).tokens
    15
    """

    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    scorer_calls: int = 0
    scorer_seconds: float = 0.0
    cached: int = 0
    prompt_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Usage)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(Usage)))


@dataclass(frozen=True)
class Budget:
    """Limits of a search; what is unset has none.

    A search asks before it spends, so no limit but ``max_seconds`` is ever passed; that one is passed by what was under way.

    Args:
        max_forwards: Calls of the model.
        max_tokens: Positions that go through the model, padding included.
        max_seconds: Wall time.
        max_scorer_calls: Calls of an external scorer.

    Raises:
        ValueError: For a limit that is not above 0.

    >>> Budget(max_tokens=100).refuses(Usage(tokens=90), Usage(tokens=20))
    'max_tokens=100'
    >>> Budget(max_tokens=100).refuses(Usage(tokens=90), Usage(tokens=10)) is None
    True
    """

    max_forwards: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None
    max_scorer_calls: int | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in _COUNTED:
            limit = getattr(self, f"max_{name}")
            number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if limit is not None and (not number or not limit > 0 or math.isnan(limit)):
                raise ValueError(f"Budget: max_{name}={limit!r} must be a number above 0, or None for no limit.")

    def refuses(self, spent: Usage, coming: Usage | None = None) -> str | None:
        """Return the first limit that is used up, or that ``coming`` would pass; None if there is room.

        Args:
            spent: So far.
            coming: What shall be spent next; unset, the least there is.
        """
        for name in _COUNTED:
            limit, used = getattr(self, f"max_{name}"), getattr(spent, name)
            if limit is not None and (used >= limit or used + getattr(coming or Usage(), name) > limit):
                return f"max_{name}={limit}"
        return None

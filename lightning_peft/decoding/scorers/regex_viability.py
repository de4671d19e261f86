"""Whether a text can still become a match of a pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers.reading import Reads, checked, read


@dataclass(frozen=True)
class RegexViability:
    r"""A partial scorer: 0 for what can still become a full match, ``-inf`` for the rest; a text may end when it is one.

    Args:
        pattern: A pattern of the ``regex`` package, which transformers brings; its partial matching decides.
        reads: Judge the completion alone, or prompt and completion.

    Raises:
        ValueError: For a pattern that is none.

    >>> dates = RegexViability(r"\d{4}-\d\d")
    >>> dates(["20", "2024-1", "24-"]).tolist(), dates.finished(["2024-1", "2024-12"])
    ([0.0, 0.0, -inf], [False, True])
    """

    pattern: str
    reads: Reads = "completion"

    def __post_init__(self) -> None:
        """Check the settings."""
        checked(self.reads, "RegexViability")
        import regex  # noqa: PLC0415

        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"RegexViability: pattern={self.pattern!r} is none: {error}.") from error

    def __call__(self, texts: list[Draft]) -> Tensor:
        """Return 0 or ``-inf`` for each text."""
        return torch.tensor(
            [-math.inf if self._match(text, partial=True) is None else 0.0 for text in read(texts, self.reads)]
        )

    def finished(self, texts: Sequence[Draft]) -> list[bool]:
        """Return whether each text is a full match."""
        return [self._match(text, partial=False) is not None for text in read(texts, self.reads)]

    def _match(self, text: str, *, partial: bool) -> Any:
        import regex  # noqa: PLC0415

        return regex.fullmatch(self.pattern, text, partial=partial)

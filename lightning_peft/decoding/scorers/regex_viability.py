"""Whether a text can still become a match of a regular expression."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_peft.decoding.scorers.text_scorer import PrefixScorer, Reads


class RegexViability(PrefixScorer):
    r"""Kill texts that can no longer become a full match of a pattern.

    Uses the partial matching of the package ``regex``, which comes with transformers.

    Args:
        pattern: In the syntax of ``regex``, a superset of that of ``re``. The whole text must match in the end.
        reads: ``"completion"`` judges what was written alone.
        cache_size: How many answers are remembered.

    Raises:
        ValueError: If the pattern is none.
        ImportError: Without the package ``regex``.

    >>> scorer = RegexViability(r"\d{4}-\d{2}-\d{2}")
    >>> scorer(["2026-1", "2026-x", ""]), scorer.finished(["2026-1", "2026-11-27"])
    (tensor([0., -inf, 0.]), [False, True])
    """

    def __init__(self, pattern: str, *, reads: Reads = "completion", cache_size: int = 65_536) -> None:
        super().__init__(reads=reads, cache_size=cache_size)
        import regex  # noqa: PLC0415 - comes with transformers, is needed here alone

        self.pattern = pattern
        try:
            self._matcher: Any = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"RegexViability: {pattern!r} is no regular expression: {error}.") from error

    @override
    def can_continue(self, text: str) -> bool:
        return self._matcher.fullmatch(text, partial=True) is not None

    @override
    def is_complete(self, text: str) -> bool:
        return self._matcher.fullmatch(text) is not None

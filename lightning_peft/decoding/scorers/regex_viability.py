"""Whether a text can still become a match of a regular expression."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_peft.decoding.scorers.text_scorer import PrefixScorer, Reads


class RegexViability(PrefixScorer):
    r"""Kill texts that can no longer become a full match of a pattern.

    Uses the partial matching of the package ``regex``, which comes with transformers.

    **The trap:** it takes the end of what is written for the end of the text where it looks ahead without reading on: ``\B``, and
    ``$`` inside of a lookahead, can kill a text that may still become a match. Neither is needed where the whole text must match.

    Args:
        pattern: In the syntax of ``regex``, a superset of that of ``re``. The whole text must match in the end. Patterns that
            match from the end backwards, ``(?r)``, are refused.
        reads: ``"completion"`` judges what was written alone.
        cache_size: How many answers are remembered.

    Raises:
        ValueError: If the pattern is none, or matches backwards.
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
        except (regex.error, TypeError) as error:
            raise ValueError(f"RegexViability: {pattern!r} is no regular expression: {error}.") from error
        if self._matcher.flags & regex.REVERSE or not isinstance(self._matcher.pattern, str):
            raise ValueError(
                f"RegexViability: {pattern!r} matches backwards, or bytes; texts are written from their beginning."
            )

    @override
    def can_continue(self, text: str) -> bool:
        return self._matcher.fullmatch(text, partial=True) is not None

    @override
    def is_complete(self, text: str) -> bool:
        return self._matcher.fullmatch(text) is not None

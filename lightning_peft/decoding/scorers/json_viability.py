"""Whether a text can still become a JSON document."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers.reading import Reads, checked, read

State = Literal["dead", "alive", "complete"]
_SPACE = " \t\n\r"
_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_OF_A_NUMBER = frozenset("0123456789+-.eE")
_CLOSED_BY = {"{": "}", "[": "]"}


@functools.cache
def _pattern(source: str) -> Any:
    import regex  # noqa: PLC0415

    return regex.compile(source)


def _scalar_end(text: str, place: int, key: bool) -> int | None:
    """Return where a string, number or word ends; a place beyond the text for one that is unfinished, None for none of them."""
    if text[place] in _OF_A_NUMBER and not key:
        end = next((i for i in range(place, len(text)) if text[i] not in _OF_A_NUMBER), len(text))
        match = _pattern(_NUMBER).fullmatch(text[place:end], partial=end == len(text))
        return None if match is None else len(text) + 1 if match.partial else end
    match = _pattern(_STRING if key else f"{_STRING}|true|false|null").match(text, place, partial=True)
    return None if match is None else len(text) + 1 if match.partial else match.end()


def json_state(text: str) -> State:
    """Return whether a text is a JSON document (RFC 8259), can become one, or can not.

    >>> [json_state(text) for text in ('{"a": [1, 2', '{"a": 1}', '[1,]', '12', '-')]
    ['alive', 'complete', 'dead', 'complete', 'alive']
    """
    waiting: list[str] = []  # what the text is inside of
    expected = "value"
    place = 0
    while True:
        while place < len(text) and text[place] in _SPACE:
            place += 1
        if place == len(text):
            return "complete" if expected == "end" else "alive"
        if expected == "end":
            return "dead"
        found = _next(text, place, expected, waiting)
        if found is None:
            return "dead"
        expected, place = found
        if place > len(text):  # a string or number that goes on
            return "alive"


def _next(text: str, place: int, expected: str, waiting: list[str]) -> tuple[str, int] | None:
    """Return what is expected after the next token and where that is; a place beyond the text, if the token is unfinished."""
    letter = text[place]
    if waiting and letter == _CLOSED_BY[waiting[-1]] and expected in ("more", "first"):
        waiting.pop()
        return "more" if waiting else "end", place + 1
    if expected in ("colon", "more"):
        following = "value" if expected == "colon" or waiting[-1] == "[" else "key"
        return (following, place + 1) if letter == {"colon": ":", "more": ","}[expected] else None
    key = expected == "key" or (expected == "first" and waiting[-1] == "{")
    if not key and letter in _CLOSED_BY:
        waiting.append(letter)
        return "first", place + 1
    end = _scalar_end(text, place, key)
    return None if end is None else ("colon" if key else "more" if waiting else "end", end)


@dataclass(frozen=True)
class JSONViability:
    """A partial scorer: 0 for what can still become a JSON document, ``-inf`` for the rest; a text may end when it is one.

    Args:
        reads: Judge the completion alone, or prompt and completion.
    """

    reads: Reads = "completion"

    def __post_init__(self) -> None:
        """Check the setting."""
        checked(self.reads, "JSONViability")

    def __call__(self, texts: list[Draft]) -> Tensor:
        """Return 0 or ``-inf`` for each text."""
        return torch.tensor([-math.inf if json_state(text) == "dead" else 0.0 for text in read(texts, self.reads)])

    def finished(self, texts: Sequence[Draft]) -> list[bool]:
        """Return whether each text is a document."""
        return [json_state(text) == "complete" for text in read(texts, self.reads)]

"""Whether a text can still become a Python program.

A prefix is dead when its first error lies wholly before its last token: what follows can mend the end of a text, never its middle.
The last token may still grow (``i`` becomes ``import``, ``=`` becomes ``==``), so the text counts without it too. Naive checks kill
prefixes of valid programs: ``codeop`` one in five, a parser with error recovery half of them.

It reads the messages and places of CPython's own errors; verified on 3.11 over its standard library (``tests/decoding``).
"""

from __future__ import annotations

import ast
import codeop
import io
import math
import tokenize
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers.reading import Reads, checked, read

_FLAGS = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT | codeop.PyCF_DONT_IMPLY_DEDENT  # type: ignore[attr-defined]
_MENDED_BY_ANYTHING = ("incomplete input", "was never closed", "triple-quoted", "expected 'else' after")
_MENDED_ON_THE_LINE = ("indent", "unterminated")
_NO_TEXT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}
_Place = tuple[float, float]
_EVERYWHERE = (math.inf, math.inf)


def can_become_python(text: str) -> bool:
    r"""Return whether some text after this one makes it a Python program.

    False is certain, as far as CPython's errors tell; True is not: an error in the last token is seen with the next one.

    >>> [can_become_python(text) for text in ("def f(", "x = [1, 2", "for x i", "x = = 1 ", ") a ")]
    [True, True, True, False, False]
    """
    if "\0" in text:
        return False
    last = _last_token(text)
    if _reached(text) >= _start_of(last):
        return True
    lines = text.split("\n")
    if last is None or last.end != (len(lines), len(lines[-1])):
        return False  # a space or a line after the last token has finished it
    row, column = last.start
    without = "\n".join([*lines[: row - 1], lines[row - 1][:column]])
    return _reached(without) >= _start_of(_last_token(without))


def _start_of(token: tokenize.TokenInfo | None) -> _Place:
    """Return where a token begins, lines and columns from 1; before everything, for none."""
    return (0, 0) if token is None else (token.start[0], token.start[1] + 1)


def _reached(text: str) -> _Place:
    """Return how far the first error reaches that no further text mends; beyond everything, without one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes and comparisons, which are no errors
            compile(text, "<prefix>", "exec", _FLAGS)
    except SyntaxError as error:
        message, line, column = error.msg or "", error.lineno or 0, error.offset or 0
        if any(part in message for part in _MENDED_BY_ANYTHING):
            return _EVERYWHERE
        end = (error.end_lineno or line, error.end_offset or column)
        if any(part in message for part in _MENDED_ON_THE_LINE):
            return _EVERYWHERE if end[0] > text.count("\n") else (0, -1)
        return max((end[0], end[1] - 1), (line, column))  # the end is the first place after the error
    except (ValueError, RecursionError, MemoryError):
        return (0, -1)  # deeper than the parser goes
    return _EVERYWHERE


def _last_token(text: str) -> tokenize.TokenInfo | None:
    """Return the last token that is a text, of what can be read."""
    last = None
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in _NO_TEXT:
                last = token
    except (tokenize.TokenError, SyntaxError):
        pass  # an open bracket or string, or an odd dedent: what was read before it counts
    return last


def parses(text: str) -> bool:
    """Return whether a text is a Python program; an empty one is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


@dataclass(frozen=True)
class PythonViability:
    """A partial scorer: 0 for what can still become a Python program, ``-inf`` for the rest.

    A text may end when it is one, and something was written: a prompt that parses is no answer.

    Args:
        reads: Judge prompt and completion, or the completion alone.
    """

    reads: Reads = "whole"

    def __post_init__(self) -> None:
        """Check the setting."""
        checked(self.reads, "PythonViability")

    def __call__(self, texts: list[Draft]) -> Tensor:
        """Return 0 or ``-inf`` for each text."""
        return torch.tensor([0.0 if can_become_python(text) else -math.inf for text in read(texts, self.reads)])

    def finished(self, texts: Sequence[Draft]) -> list[bool]:
        """Return whether each text is a program as it stands."""
        written = read(texts, "completion")
        return [bool(new.strip()) and parses(text) for new, text in zip(written, read(texts, self.reads), strict=True)]


@dataclass(frozen=True)
class PythonParses:
    """A final scorer: 1 for a Python program, 0 for the rest; where nothing was written, 0.

    Args:
        reads: Judge prompt and completion, or the completion alone.
    """

    reads: Reads = "whole"

    def __post_init__(self) -> None:
        """Check the setting."""
        checked(self.reads, "PythonParses")

    def __call__(self, texts: list[Draft]) -> Tensor:
        """Return 1 or 0 for each text."""
        return torch.tensor([float(valid) for valid in PythonViability(self.reads).finished(texts)])

"""Which part of a draft a scorer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lightning_peft.decoding.draft import Draft

Reads = Literal["whole", "completion"]
"""Prompt and what was written after it, or that alone."""


def checked(reads: str, owner: str) -> None:
    """Refuse what is neither."""
    if reads not in get_args(Reads):
        raise ValueError(f"{owner}: reads={reads!r} must be 'whole' or 'completion'.")


def read(texts: Sequence[str], reads: Reads) -> list[str]:
    """Return the part of each text; a plain string is all there is.

    >>> read([Draft("c", prompt="ab"), "abc"], "completion")
    ['c', 'abc']
    """
    return [text.completion if reads == "completion" and isinstance(text, Draft) else str(text) for text in texts]

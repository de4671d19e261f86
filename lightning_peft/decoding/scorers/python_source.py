"""Whether texts are Python: while they are written, and when they have ended."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.decoding.scorers.python_prefix import can_become_program, is_program
from lightning_peft.decoding.scorers.text_scorer import PrefixScorer, Reads, TextScorer, completion


class PythonViability(PrefixScorer):
    r"""Kill texts that can no longer become a Python program, and no other; for ``BeamSearch(partial=...)``.

    No beginning of a program is killed, on Python 3.11 to 3.13 (how: ``can_become_program``). The grammar of the Python that runs
    this is meant. The empty string can become a program and is none.

    Args:
        reads: ``"whole"`` judges the program with its prompt; ``"completion"`` for prompts that are no Python.
        cache_size: How many answers are remembered.

    >>> scorer = PythonViability()
    >>> scorer(["def f(x):\n    return (x", "def f(x):\n    return x)", ""])
    tensor([0., -inf, 0.])
    >>> scorer.finished(["def f(x):\n    return (x", "def f(x):\n    return x", ""])
    [False, True, False]
    """

    def __init__(self, *, reads: Reads = "whole", cache_size: int = 65_536) -> None:
        super().__init__(reads=reads, cache_size=cache_size)

    @override
    def can_continue(self, text: str) -> bool:
        return can_become_program(text)

    @override
    def is_complete(self, text: str) -> bool:
        return is_program(text)

    @override
    def finished(self, texts: Sequence[str]) -> list[bool]:
        found = super().finished(texts)
        return [one and wrote_code(text) for one, text in zip(found, texts, strict=True)]


class PythonParses(TextScorer):
    r"""Give 1 to texts that are Python programs, 0 to others; for ``BeamSearch(final=...)`` and ``BestOfN``.

    A completion that holds no statement gets 0, also after a prompt that is a program without it.

    Args:
        reads: ``"whole"`` judges the program with its prompt.
        cache_size: How many answers are remembered.

    >>> PythonParses()(["x = 1", "x = ", "", "# later"])
    tensor([1., 0., 0., 0.])
    """

    def __init__(self, *, reads: Reads = "whole", cache_size: int = 65_536) -> None:
        super().__init__(reads=reads, cache_size=cache_size)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return 1 or 0 for each text: ``(texts,)``."""
        parts = [self.part(text) for text in texts]
        parse = [self.answers.ask(part, partial(is_program, part)) for part in parts]
        return torch.tensor([float(one and wrote_code(text)) for one, text in zip(parse, texts, strict=True)])


def wrote_code(text: str) -> bool:
    """Return whether the completion has a line that is neither blank nor a comment."""
    return any(line.strip() and not line.lstrip().startswith("#") for line in completion(text).splitlines())

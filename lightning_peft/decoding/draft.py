"""A text that a search holds, and what a scorer of such texts must be."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Draft(str):
    r"""A prompt and what was written after it, as one string, which any scorer of strings can read.

    Args:
        completion: What was written.
        prompt: What it was written after.
        problem: Place of the prompt among those of the call, from 0.

    >>> draft = Draft("    return a + b", prompt="def add(a, b):\n", problem=3)
    >>> draft == "def add(a, b):\n    return a + b", draft.completion, draft.problem
    (True, '    return a + b', 3)
    """

    __slots__ = ("completion", "problem", "prompt")

    completion: str
    prompt: str
    problem: int

    def __new__(cls, completion: str, *, prompt: str = "", problem: int = 0) -> Draft:
        """Join the two."""
        draft = super().__new__(cls, prompt + completion)
        draft.completion, draft.prompt, draft.problem = completion, prompt, problem
        return draft

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, object]]:
        """Let copies and pickles be made."""
        return (self.completion,), {"prompt": self.prompt, "problem": self.problem}


class Scorer(Protocol):
    """Values of texts, ``(texts,)``, higher is better; ``-inf`` is a dead one, which nothing appended can mend.

    A *partial* scorer judges texts that may go on, anew at every step; a *final* one judges those that have ended. Any callable
    will do. One that also has ``finished`` is asked by a search whether a text may end where it is.
    """

    def __call__(self, texts: list[Draft]) -> Tensor:
        """Return a value for each text."""
        ...


class Viability(Scorer, Protocol):
    """A partial scorer that knows prefixes: 0 for one that can still become valid, ``-inf`` for a dead one."""

    def finished(self, texts: list[Draft]) -> list[bool]:
        """Return whether each text is valid as it stands."""
        ...

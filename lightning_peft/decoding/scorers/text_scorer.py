"""What scorers of single texts share: which part of a draft they read, and answers that are remembered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_peft.decoding.draft import Draft

Reads = Literal["whole", "completion"]
Answer = TypeVar("Answer")


class Memory:
    """The last answers to questions, by text; the one that was not asked for longest goes first.

    >>> memory = Memory(2)
    >>> [memory.ask(word, lambda: len(word)) for word in ("one", "three", "one")], len(memory)
    ([3, 5, 3], 2)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.found: OrderedDict[Hashable, object] = OrderedDict()

    def __len__(self) -> int:
        return len(self.found)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.found

    def ask(self, key: Hashable, find: Callable[[], Answer]) -> Answer:
        """Return the remembered answer, or find one and remember it."""
        if key in self.found:
            self.found.move_to_end(key)
            return self.found[key]  # type: ignore[return-value]  # what find returned under this key
        answer = find()
        self.found[key] = answer
        if len(self.found) > self.size:
            self.found.popitem(last=False)
        return answer

    def clear(self) -> None:
        """Forget all."""
        self.found.clear()


class TextScorer:
    """A scorer that reads one part of each draft.

    Args:
        reads: ``"whole"`` for prompt and completion, ``"completion"`` for what was written alone. A plain string is both.
        cache_size: How many answers are remembered.

    Raises:
        ValueError: For another ``reads``, or a ``cache_size`` below 1.
    """

    def __init__(self, *, reads: Reads, cache_size: int) -> None:
        name = type(self).__name__
        if reads not in ("whole", "completion"):
            raise ValueError(f"{name}: reads={reads!r} is neither 'whole' nor 'completion'.")
        if cache_size < 1:
            raise ValueError(f"{name}: cache_size={cache_size!r} remembers nothing. Give 1 or more.")
        self.reads = reads
        self.answers = Memory(cache_size)

    def part(self, text: str) -> str:
        """Return what is judged of a draft."""
        return completion(text) if self.reads == "completion" else str(text)


class PrefixScorer(TextScorer, ABC):
    """A partial scorer of texts that can, or can no longer, become valid: 0 or ``-inf``."""

    @abstractmethod
    def can_continue(self, text: str) -> bool:
        """Return whether something appended, or nothing, makes the text valid."""

    @abstractmethod
    def is_complete(self, text: str) -> bool:
        """Return whether the text is valid as it stands."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return 0 for each text that can still become valid, else ``-inf``: ``(texts,)``."""
        parts = [self.part(text) for text in texts]
        alive = [self.answers.ask(("alive", part), partial(self.can_continue, part)) for part in parts]
        return torch.tensor([0.0 if one else -math.inf for one in alive])

    def finished(self, texts: Sequence[str]) -> list[bool]:
        """Return whether each text is valid as it stands."""
        parts = [self.part(text) for text in texts]
        return [self.answers.ask(("complete", part), partial(self.is_complete, part)) for part in parts]


def completion(text: str) -> str:
    """Return what was written after the prompt; of a plain string, all."""
    return text.completion if isinstance(text, Draft) else str(text)

"""Equally many rows of each class, of each class a uniform sample."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from lightning_peft.data.buffers import Label, MemoryBuffer, StoredRow


class ClassBalancedBuffer(MemoryBuffer):
    """Keep equally many rows of each class, to one row, where there are enough of them.

    Until it is full, it keeps every row. From then on a class that has at least two rows fewer than the largest one takes the
    place of a random row of the largest; a row of any other class replaces a random one of its own class with probability
    ``kept / seen`` of that class. So each class's rows are a uniform sample of all that came of it, and the buffer stays full.
    The rule is close to Chrysakis & Moens 2020, "Online continual learning from imbalanced data", whose classes stop growing
    once they have been the largest.

    Args:
        capacity: The most rows that it holds, at least one per class.
        seed: Seed of its decisions.

    Raises:
        ValueError: For a capacity below 1 or a seed that is no whole number; by ``add``, for a row without a label and a class for
            which there is no place left.

    >>> buffer = ClassBalancedBuffer(capacity=4)
    >>> for number in range(100):
    ...     buffer.add(number, label="frequent")
    >>> buffer.counts
    {'frequent': 4}
    >>> for number in range(3):
    ...     buffer.add(number, label="rare")
    >>> sorted(buffer.counts.items())
    [('frequent', 2), ('rare', 2)]
    """

    needs = ("label",)

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._seen_of: dict[Label, int] = {}
        self._slots: dict[Label, list[int]] = {}

    @override
    def _decide(self, stored: StoredRow) -> None:
        label = stored.label
        assert label is not None
        if label not in self._slots and len(self._slots) == self.capacity:
            raise ValueError(
                f"{self._owner}: there is no place for class {label!r} beside {len(self._slots)} others. Make it with a capacity "
                f"of at least {self.capacity + 1}, better a multiple of the number of classes."
            )
        own = self._slots.setdefault(label, [])
        self._seen_of[label] = self._seen_of.get(label, 0) + 1
        largest = max(self._slots.values(), key=len)
        if len(self.stored) < self.capacity:
            own.append(len(self.stored))
            self.stored.append(stored)
        elif len(own) < len(largest) - 1:
            slot = largest.pop(self._draw(len(largest)))
            insort(own, slot)  # in order, as loading finds them: the next decisions depend on it
            self.stored[slot] = stored
        else:
            place = self._draw(self._seen_of[label])
            if place < len(own):
                self.stored[own[place]] = stored

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen_of": {**self._seen_of}}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._seen_of = {**state_dict["seen_of"]}
        self._slots = {label: [] for label in self._seen_of}
        for slot, stored in enumerate(self.stored):
            assert stored.label is not None
            self._slots[stored.label].append(slot)

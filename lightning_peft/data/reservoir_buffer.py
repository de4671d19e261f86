"""A uniform sample of all rows so far, of fixed size."""

from __future__ import annotations

from typing_extensions import override

from lightning_peft.data.buffers import MemoryBuffer, StoredRow


class ReservoirBuffer(MemoryBuffer):
    """Keep a uniform sample: of ``n`` rows so far, each is in the buffer with probability ``capacity / n``.

    Row ``i``, counted from 0, is kept if ``i < capacity``; else it replaces a random row with probability
    ``capacity / (i + 1)``. Vitter 1985, "Random sampling with a reservoir", algorithm R.

    **The trap:** frequent classes and long tasks get most of it. For equal shares take
    :class:`~lightning_peft.data.class_balanced_buffer.ClassBalancedBuffer`.

    Args:
        capacity: The most rows that it holds.
        seed: Seed of its decisions.

    Raises:
        ValueError: For a capacity below 1 or a seed that is no whole number.

    >>> buffer = ReservoirBuffer(capacity=3)
    >>> for number in range(100):
    ...     buffer.add(number)
    >>> len(buffer), buffer.seen
    (3, 100)
    """

    @override
    def _decide(self, stored: StoredRow) -> None:
        if len(self.stored) < self.capacity:
            self.stored.append(stored)
            return
        slot = self._draw(self.seen + 1)
        if slot < self.capacity:
            self.stored[slot] = stored

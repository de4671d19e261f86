"""Endless draws from a finite set of rows, in a fresh order every pass; nothing is kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def key(seed: int, *words: object) -> int:
    """Derive a seed from words, so that streams of one run never share their order with another run's.

    >>> key(0, "memory", 1) == key(1, "memory", 0)
    False
    """
    return int.from_bytes(hashlib.blake2s(repr((seed, *words)).encode(), digest_size=7).digest(), "little")


@lru_cache(maxsize=8)
def permutation(rows: int, seed: int, stream: str, number: int) -> Indices:
    """Return the order of a stream's pass ``number``; every pass has its own."""
    generator = torch.Generator().manual_seed(key(seed, stream, number))
    order: Indices = torch.randperm(rows, generator=generator).numpy()
    order.flags.writeable = False  # it is shared
    return order


@dataclass(frozen=True)
class Stream:
    """Endless draws from rows: each once per pass, every pass in an order of its own.

    Args:
        rows: Number of rows.
        seed: Seed of the orders.
        name: Keeps the orders of two streams apart.
        shuffle: Whether passes are shuffled.
    """

    rows: int
    seed: int
    name: str = "memory"
    shuffle: bool = True

    def draw(self, i: int) -> int:
        """Return the index of draw ``i``, counted from 0 over the whole run."""
        return int(self.draws(i, 1)[0])

    def draws(self, first: int, count: int) -> Indices:
        """Return the indices of ``count`` draws from draw ``first`` on."""
        if not self.shuffle:
            return np.arange(first, first + count) % self.rows
        parts: list[Indices] = []
        while count:
            number, position = divmod(first, self.rows)
            part = permutation(self.rows, self.seed, self.name, number)[position : position + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])


def rank_slice(count: int, rank: int, world: int, turn: int) -> slice:
    """Return the part of ``count`` things that a rank takes; ``turn`` rotates who gets the odd ones.

    >>> [rank_slice(5, rank, 2, turn=0) for rank in (0, 1)]
    [slice(0, 2, None), slice(2, 5, None)]
    """
    place = (rank + turn) % world
    return slice(place * count // world, (place + 1) * count // world)

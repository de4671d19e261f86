"""Keep what is done beside training to a share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_peft.distributed import gather_objects


class TimeShare:
    """Say when something may be done again so that it takes at most a share of the time.

    The first process's clock decides for all.

    Args:
        share: At most this part of the time since it was done last, in (0, 1]; None for no limit.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.cost = 0.0
        self._since = time.monotonic()

    def allows(self) -> bool:
        """Return whether so much time has passed that as much as last time is within the share; the same on every rank."""
        if self.share is None:
            return True
        passed = time.monotonic() - self._since
        return bool(gather_objects(self.cost <= self.share * (self.cost + passed))[0])

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Take the time of what is done inside."""
        start = time.monotonic()
        yield
        self._since = time.monotonic()
        self.cost = self._since - start

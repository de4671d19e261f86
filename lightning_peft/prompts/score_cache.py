"""Scores that were computed once are kept on disk: a killed search goes on and pays for nothing twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ScoreCache:
    """Scores by key, in memory or in one file that several processes may use at once; a killed write leaves nothing behind.

    Args:
        path: The file; unset, memory.

    >>> cache = ScoreCache()
    >>> cache.put({"a": [0.5, -1.0]})
    >>> cache.get(["a", "b"])
    {'a': [0.5, -1.0]}
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open: sqlite3.Connection | None = None

    def get(self, keys: Sequence[str]) -> dict[str, list[float]]:
        """Return what is there of these keys."""
        found: dict[str, list[float]] = {}
        for start in range(0, len(keys), 500):  # of variables in a statement SQLite takes a limited number
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            rows = self._connection().execute(f"SELECT key, scores FROM scores WHERE key IN ({marks})", part)
            found |= {key: json.loads(scores) for key, scores in rows}
        return found

    def put(self, scores: Mapping[str, Sequence[float]], spent: tuple[str, Mapping[str, float]] | None = None) -> None:
        """Keep scores, all or none of them.

        Args:
            scores: By key.
            spent: The name of a search, and what it has spent with these; kept together with them.
        """
        rows = [(key, json.dumps(list(value))) for key, value in scores.items()]
        with self._connection() as connection:
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
            if spent is not None:
                connection.execute("INSERT OR REPLACE INTO spent VALUES (?, ?)", (spent[0], json.dumps(dict(spent[1]))))

    def spent(self, search: str) -> dict[str, float]:
        """Return what a search has spent; nothing, if it is new."""
        row = self._connection().execute("SELECT usage FROM spent WHERE search = ?", (search,)).fetchone()
        found: dict[str, float] = json.loads(row[0]) if row else {}
        return found

    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            self._open = sqlite3.connect(":memory:" if self.path is None else self.path, timeout=60)
            with self._open:
                self._open.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, scores TEXT)")
                self._open.execute("CREATE TABLE IF NOT EXISTS spent (search TEXT PRIMARY KEY, usage TEXT)")
        return self._open

    def __getstate__(self) -> dict[str, Any]:
        # A connection belongs to its process.
        return {"path": self.path, "_open": None}

"""Files that are whole or not there: written beside their place, then moved onto it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a file next to ``path``, then put it in place in one step.

    A run that is killed in the middle leaves the old file, or none.

    Args:
        path: Where the file goes; missing folders are made.
        write: Writes the file whose path it gets; the suffix is that of ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    draft = Path(name)
    try:
        write(draft)
        draft.chmod(0o644)
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file in one step.

    >>> import tempfile
    >>> write_text(Path(tempfile.mkdtemp()) / "a" / "note.txt", "whole").read_text()
    'whole'
    """
    return write_atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))

"""Settings that are counts."""

from __future__ import annotations


def check_counts(settings: object, *names: str, least: int = 1) -> None:
    """Refuse settings that are no whole numbers of at least so many."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{type(settings).__name__}: {name}={value!r} must be a whole number of at least {least}.")

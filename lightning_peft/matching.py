"""Point at layers and parameters by globs over their dotted names; a glob that matches nothing is an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """List the candidates that resemble ``name`` most, as text for an error message.

    >>> nearest("encoder.query", ["encoder.q_proj", "encoder.k_proj", "head"], limit=2)
    'encoder.q_proj, encoder.k_proj'
    """
    close = difflib.get_close_matches(name, list(candidates), n=limit, cutoff=0.0)
    return ", ".join(close) or "none"


def match_names(
    names: Iterable[str], patterns: str | Sequence[str], *, owner: str = "match_names", kind: str = "name"
) -> list[str]:
    """Select the names that at least one glob matches, in their own order.

    Globs are those of :mod:`fnmatch`, case-sensitive, over the whole dotted name; ``*`` crosses dots.

    Args:
        names: Dotted names, as ``named_modules`` or ``named_parameters`` give them.
        patterns: One glob or several.
        owner: Who asks; the error message begins with it.
        kind: What the names are, for the error message ("linear layer", "parameter").

    Raises:
        ValueError: If a glob matches no name; the message lists the nearest names.

    >>> match_names(["layer.0.query", "layer.0.value", "head"], ["*.query", "head"])
    ['layer.0.query', 'head']
    """
    known = list(names)
    globs = [patterns] if isinstance(patterns, str) else list(patterns)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise ValueError(
                f"{owner}: {glob!r} matches none of {len(known)} {kind}s. Nearest: {nearest(glob, known)}. "
                "Patterns are case-sensitive globs over the whole dotted name."
            )
    return [name for name in known if any(fnmatchcase(name, glob) for glob in globs)]

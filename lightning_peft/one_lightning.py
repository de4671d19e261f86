"""Serve one of Lightning's two packages, and say so to a project that is written for the other."""

from __future__ import annotations


def refuse_pytorch_lightning(kind: type, owner: str) -> None:
    """Stop a class of the package ``pytorch_lightning``, whose classes are copies of ``lightning.pytorch``'s.

    ``isinstance`` tells the copies apart, so a strategy, a logger or a callback of theirs would go unrecognised, and
    what depends on it would silently not happen.

    Args:
        kind: The class of a trainer, or of a module.
        owner: Who asks; the error message begins with it.

    Raises:
        TypeError: If the class is, or descends from, one of the copies.
    """
    copied = next((base for base in kind.__mro__ if base.__module__.partition(".")[0] == "pytorch_lightning"), None)
    if copied is not None:
        raise TypeError(
            f"{owner}: {kind.__name__} is a {copied.__name__} of the package pytorch_lightning, which has a copy of every "
            "class. Import the project's from lightning.pytorch instead: nothing else in it changes."
        )

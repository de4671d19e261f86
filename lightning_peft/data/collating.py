"""Try a collate function on rows before training needs it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader


def collate_error(loader: DataLoader[Any], rows: list[Any]) -> Exception | None:
    """Return what a loader's collate function raises on some rows, if it does; no random number of the run is used."""
    with torch.random.fork_rng(devices=[]):
        try:
            loader.collate_fn(rows)
        except Exception as error:
            return error
    return None


def try_memory(loader: DataLoader[Any], beside: list[Any], memory: Any, owner: str) -> None:
    """Check that the first row of a memory can be put into a batch with others.

    Raises:
        ValueError: If the collate function cannot.
    """
    old = memory[0]
    if error := collate_error(loader, [*beside, old]):
        raise ValueError(
            f"{owner}: the first row of the memory, {old!r:.200}, cannot be put into a batch by the collate function "
            f"({error}). Old rows must look like the training rows, or come as a loader with a collate_fn of its own "
            "for replay_step."
        ) from error

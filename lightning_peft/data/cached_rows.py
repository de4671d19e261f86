"""Features of rows as they lie on disk, read by memory map."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate
from typing_extensions import override

Features = Tensor | tuple[Tensor, Tensor]
"""``(rows, ...)``; of tokens, ``(rows, tokens, ...)`` and their mask, ``(rows, tokens)``."""


class CachedRows(Dataset[Any]):
    """The features of each row, and what else of it the head's step needs.

    Args:
        folder: What :func:`write_rows` wrote.
        keep: What must live as long as these rows do, such as a temporary folder.
    """

    def __init__(self, folder: Path, keep: object = None) -> None:
        self.folder, self._keep = folder, keep
        about = json.loads((folder / "format.json").read_text(encoding="utf-8"))
        self.dtype: torch.dtype = getattr(torch, about["dtype"])
        self.rest: list[Any] | None = torch.load(folder / "rest.pt", weights_only=True)
        starts = folder / "starts.npy"
        self.starts: list[int] | None = np.load(starts).tolist() if starts.is_file() else None
        self.seconds = float(json.loads((folder / "about.json").read_text(encoding="utf-8"))["seconds"])
        """What computing them took."""
        self._open: Any = None

    @property
    def array(self) -> Any:
        """The file, mapped into memory; each process opens it for itself."""
        if self._open is None:
            self._open = np.load(self.folder / "features.npy", mmap_mode="r")
        return self._open

    def __len__(self) -> int:
        return len(self.array) if self.starts is None else len(self.starts) - 1

    @override
    def __getitem__(self, index: int) -> Any:
        if self.starts is None:
            features = torch.from_numpy(self.array[index].copy()).to(self.dtype)
        else:
            features = torch.from_numpy(self.array[self.starts[index] : self.starts[index + 1]].copy()).to(self.dtype)
        return features, None if self.rest is None else self.rest[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Features, Any]:
        """Return a batch; a loader with ``collate_fn=CachedRows.collate`` asks for it so."""
        rest = None if self.rest is None else default_collate([self.rest[index] for index in indices])
        if self.starts is None:
            return torch.from_numpy(self.array[list(indices)]).to(self.dtype), rest
        return _padded([self[index][0] for index in indices]), rest

    @staticmethod
    def collate(batch: Any) -> Any:
        """Return what :meth:`__getitems__` gave: it is a batch already."""
        return batch

    def all(self) -> Tensor:
        """Return the features of all rows, ``(rows, ...)``.

        Raises:
            ValueError: If rows have several vectors each.
        """
        if self.starts is not None:
            raise ValueError("CachedRows: the features are of tokens; a solver needs one vector a row. Pool them.")
        return torch.from_numpy(np.array(self.array)).to(self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_keep": None}


def _padded(tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(one) for one in tokens])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return pad_sequence(tokens, batch_first=True), mask.long()


def write_rows(folder: Path, chunks: Sequence[Path]) -> None:
    """Put chunks together, ``{"features": ..., "rest": rows or None}`` each, one at a time in memory."""
    first = torch.load(chunks[0], weights_only=True)["features"]
    ragged = isinstance(first, tuple)
    example = first[0] if ragged else first
    lengths: list[int] = [0]
    rest: list[Any] = []
    for chunk in chunks:
        found = torch.load(chunk, weights_only=True)
        lengths += found["features"][1].sum(1).tolist() if ragged else [1] * len(found["features"])
        rest += found["rest"] or []
    starts = np.cumsum(lengths)
    # NumPy has no bfloat16; as float32 every value of it is kept.
    kind = torch.zeros((), dtype=torch.float32 if example.dtype == torch.bfloat16 else example.dtype).numpy().dtype
    shape = (int(starts[-1]), *example.shape[2 if ragged else 1 :])
    array = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=kind, shape=shape)
    at = 0
    for chunk in chunks:
        features = torch.load(chunk, weights_only=True)["features"]
        flat = features[0][features[1].bool()] if ragged else features
        array[at : at + len(flat)] = flat.to(torch.float32).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
        at += len(flat)
    array.flush()
    if ragged:
        np.save(folder / "starts.npy", starts)
    torch.save(_stacking(rest) or None, folder / "rest.pt")
    text = json.dumps({"dtype": str(example.dtype).removeprefix("torch.")})
    (folder / "format.json").write_text(text, encoding="utf-8")


def _stacking(rest: list[Any]) -> list[Any]:
    """Return rows without the parts whose shapes differ, of which no batch can be made: ids that were padded, say."""
    if not rest or not isinstance(rest[0], Mapping):
        return rest
    shapes = {name: {getattr(row.get(name), "shape", None) for row in rest} for name in rest[0]}
    return [{name: row[name] for name, found in shapes.items() if len(found) == 1} for row in rest]

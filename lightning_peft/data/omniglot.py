"""Handwritten characters of many alphabets, from Omniglot's own archives or folders."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override


class Omniglot(Dataset[tuple[Tensor, str]]):
    """Characters as ``(1, size, size)``, ink 1 on 0, labelled ``alphabet/character``; Lake et al. 2015, Science 350.

    An alphabet that stands in several archives is read once.

    Args:
        folder: Holds ``*.zip`` as published, or ``<any>/<alphabet>/<character>/*.png``.
        alphabets: Only these; unset, all.
        size: Pixels of a side; drawings have 105.
        rotations: Turns by 90 degrees that make classes of their own (Santoro et al. 2016, arXiv:1605.06065): 1 or 4.

    Raises:
        FileNotFoundError: If the folder holds no drawing.
        ValueError: For an alphabet that is not there.
    """

    def __init__(
        self, folder: str | Path, alphabets: Collection[str] | None = None, *, size: int = 28, rotations: int = 1
    ) -> None:
        drawings = dict(_drawings(Path(folder)))
        if not drawings:
            raise FileNotFoundError(
                f"Omniglot: {str(folder)!r} holds no images_*.zip and no <alphabet>/<character>/*.png. Get "
                "images_background_small1.zip from github.com/brendenlake/omniglot, folder python."
            )
        self.alphabets = sorted({alphabet for alphabet, _, _ in drawings})
        if unknown := sorted(set(alphabets or ()) - set(self.alphabets)):
            raise ValueError(f"Omniglot: alphabet {unknown[0]!r} is not there, but {self.alphabets}.")
        images, self.labels = [], []
        for (alphabet, character, _), png in sorted(drawings.items()):
            if alphabets is None or alphabet in alphabets:
                image = _image(png, size)
                for turn in range(rotations):
                    images.append(image.rot90(turn, (1, 2)))
                    self.labels.append(f"{alphabet}/{character}" + (f"/{90 * turn}" if turn else ""))
        self.images = torch.stack(images)

    def __len__(self) -> int:
        return len(self.labels)

    @override
    def __getitem__(self, row: int) -> tuple[Tensor, str]:
        return self.images[row], self.labels[row]


def _drawings(folder: Path) -> Iterator[tuple[tuple[str, str, str], bytes]]:
    for archive in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if name.endswith(".png"):
                    yield _key(Path(name)), opened.read(name)
    for file in sorted(folder.rglob("*.png")):
        yield _key(file), file.read_bytes()


def _key(path: Path) -> tuple[str, str, str]:
    return path.parts[-3], path.parts[-2], path.name


def _image(png: bytes, size: int) -> Tensor:
    from PIL import Image  # noqa: PLC0415 - slow to import

    with Image.open(io.BytesIO(png)) as opened:
        grey = opened.convert("L").resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(1 - np.asarray(grey, dtype=np.float32) / 255)[None]

"""Images of the recipe ``generative``: scikit-learn's digits, or a folder of IDX files or an npz file."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

TEST_SHARE = 0.3


@dataclass(frozen=True)
class Images:
    """Images of a run, in [0, 1].

    Args:
        train: ``(rows, 1, side, side)``.
        labels: Their classes, ``(rows,)``.
        test: Held-out images.
        test_labels: Their classes.
    """

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def side(self) -> int:
        """Pixels along an edge."""
        return self.train.shape[-1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    def resized(self, side: int) -> Images:
        """Return the same images with another number of pixels, interpolated."""
        if side == self.side:
            return self
        options: dict[str, Any] = {"size": (side, side), "mode": "bilinear", "antialias": side < self.side}
        train, test = (F.interpolate(images, **options) for images in (self.train, self.test))
        return Images(train, self.labels, test, self.test_labels)


def read_images(source: str, seed: int, *, most: int) -> Images:
    """Return the images of a source; where it has no test rows, 30 % of each class are held out.

    Args:
        source: ``digits``, a folder with the four IDX files of MNIST and its kin (plain or ``.gz``), or an ``.npz`` file with
            ``x_train``, ``y_train``, ``x_test``, ``y_test`` or with ``images`` and ``labels``.
        seed: Of what is held out, and of which rows are taken where there are more than ``most``.
        most: Most training rows, and most test rows.

    Raises:
        ValueError: For a source that is neither, or that holds no square grey images.
    """
    arrays = _arrays(source)
    if len(arrays) == 2:
        from sklearn.model_selection import train_test_split  # noqa: PLC0415 - an extra

        images, labels = arrays
        train, test, train_labels, test_labels = train_test_split(
            images, labels, test_size=TEST_SHARE, random_state=seed, stratify=labels
        )
        arrays = (train, train_labels, test, test_labels)
    generator = np.random.default_rng(seed)
    parts = []
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or images.shape[1] != images.shape[2] or len(images) != len(labels):
            raise ValueError(
                f"generative: {source!r} has images of shape {images.shape} and {len(labels)} labels; it must be (rows, side, "
                "side) and a label for each."
            )
        chosen = generator.permutation(len(images))[:most] if len(images) > most else slice(None)
        scaled = images[chosen].astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
        parts += [torch.from_numpy(scaled)[:, None], torch.from_numpy(labels[chosen].astype(np.int64))]
    return Images(*parts)


def _arrays(source: str) -> tuple[Any, ...]:
    if source == "digits":
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra

        images, labels = load_digits(return_X_y=True)
        return (images / 16).reshape(-1, 8, 8), labels
    path = Path(source)
    if path.is_dir():
        names = ("train-images", "train-labels", "t10k-images", "t10k-labels")
        return tuple(read_idx(_file_of(path, name)) for name in names)
    if path.suffix == ".npz" and path.is_file():
        found = np.load(path, allow_pickle=False)
        layouts: list[tuple[str, ...]] = [("x_train", "y_train", "x_test", "y_test"), ("images", "labels")]
        for layout in layouts:
            if set(layout) <= set(found):
                return tuple(found[name] for name in layout)
        raise ValueError(
            f"generative: {source} holds {sorted(found)}; it needs x_train, y_train, x_test, y_test, or images, labels."
        )
    raise ValueError(f"generative: data={source!r} is neither 'digits', nor a folder of IDX files, nor an .npz file.")


def _file_of(folder: Path, name: str) -> Path:
    files = sorted(folder.glob(f"{name}*"))
    if not files:
        raise ValueError(
            f"generative: {folder} has no file {name}-*; it holds {sorted(file.name for file in folder.iterdir())}."
        )
    return files[0]


def read_idx(file: Path) -> Any:
    """Return the array of an IDX file of bytes, plain or compressed: two zeros, 8, the number of sizes, sizes, values.

    Raises:
        ValueError: For a file that is none.
    """
    raw = file.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"generative: {file} begins with {raw[:4]!r}; an IDX file of bytes begins with 0, 0, 8.")
    start = 4 + 4 * raw[3]
    return np.frombuffer(raw, np.uint8, offset=start).reshape(struct.unpack(f">{raw[3]}I", raw[4:start]))

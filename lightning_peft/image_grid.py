"""Many small images as one large one."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from lightning_peft.files import write_atomic

_SIDE = 32
"""Smaller images are enlarged by whole numbers to about so many pixels, or a viewer would blur them."""


def image_grid(images: Tensor, *, columns: int | None = None) -> Tensor:
    """Lay images out row by row, with a grey line between them.

    Args:
        images: ``(images, channels, height, width)`` with 1 or 3 channels, or ``(images, height, width)``; values outside
            [0, 1] are cut off.
        columns: Images in a row; unset, a square.

    Returns:
        ``(channels, height, width)`` in [0, 1].

    Raises:
        ValueError: For another shape, or no image.

    >>> image_grid(torch.rand(6, 1, 8, 8), columns=3).shape
    torch.Size([1, 67, 100])
    """
    images = images.unsqueeze(1) if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            f"image_grid: {tuple(images.shape)} is no set of images; it must be (images, 1 or 3 channels, height, width)."
        )
    images = images.detach().float().clamp(0, 1).cpu()
    zoom = max(1, _SIDE // max(images.shape[2:]))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    framed = F.pad(images, (0, 1, 0, 1), value=0.5)
    blank = framed.new_full((rows * columns - len(images), *framed.shape[1:]), 0.5)
    channels, height, width = framed.shape[1:]
    cells = torch.cat([framed, blank]).reshape(rows, columns, channels, height, width)
    whole = cells.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return F.pad(whole, (1, 0, 1, 0), value=0.5)


def save_image(path: Path, image: Tensor) -> Path:
    """Write an image ``(channels, height, width)`` in [0, 1] as PNG, in one step."""
    from matplotlib.image import imsave  # noqa: PLC0415 - slow to import, seldom needed

    pixels = image.expand(3, -1, -1).permute(1, 2, 0).mul(255).round().byte().numpy()
    return write_atomic(path, lambda draft: imsave(draft, pixels, format="png"))

"""Panels that the pictures of the recipe ``generative`` are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.image_grid import image_grid
from lightning_peft.recipes.generative_arms import Bench
from lightning_peft.recipes.generative_measures import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed


@dataclass(frozen=True)
class Gallery:
    """What pictures are made from.

    Args:
        bench: Images and networks of the first seed.
        samples: What each arm has made with them.
        rows: Rows of all seeds.
        page: The page that shows the pictures.
        out: Folder of the run.
    """

    bench: Bench
    samples: Mapping[str, Tensor]
    rows: Mapping[str, Row]
    page: Path
    out: Path


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def show(panel: Any, images: Tensor, columns: int, title: str, **options: Any) -> None:
    """Show images as a grid in a panel."""
    panel.imshow(
        image_grid(images, columns=columns).permute(1, 2, 0).expand(-1, -1, 3), interpolation="nearest", **options
    )
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])


def label_rows(panel: Any, names: Sequence[str]) -> None:
    """Write a name beside each row of a grid."""
    low, high = sorted(panel.get_ylim())
    height = (high - low) / len(names)
    panel.set_yticks([low + height * (place + 0.5) for place in range(len(names))], names, fontsize=8)

"""A picture of blocks over steps: one colour per value, on a logarithmic scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed

_TICKS = 12
_ROWS = 48


def draw_heat_map(values: Mapping[str, Sequence[tuple[int, float]]], *, title: str, label: str) -> Figure:
    """Draw a row per block, the first one at the bottom, and a column per step that any block was looked at.

    Columns are as many as there are looks: where looks become rarer, a column stands for more steps, and the numbers below
    say which. A cell without a value is grey, one with a zero is white.

    Args:
        values: By block, in the network's order: steps and what was measured there, at least 0.
        title: Stands above.
        label: What the values are, for the colour bar.

    Returns:
        A figure that no window shows; ``figure.savefig("flow.png")`` writes it.

    >>> figure = draw_heat_map({"backbone": [(1, 0.1)], "head": [(0, 2.0), (1, 3.0)]}, title="", label="")
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['backbone', 'head']
    """
    from matplotlib import colormaps  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    blocks, steps = list(values), sorted({step for found in values.values() for step, _ in found})
    cells = log_cells(values, steps)
    shown = cells[np.isfinite(cells)]
    low, high = (shown.min(), shown.max()) if shown.size else (0.0, 1.0)
    figure = Figure(figsize=(10, 1.7 + 0.27 * min(len(blocks), _ROWS)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_facecolor("0.8")
    colours = colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0), under="white")
    zero = np.isneginf(cells)
    picture = panel.imshow(
        np.ma.masked_where(~np.isfinite(cells) & ~zero, np.where(zero, low - 1, cells)),
        aspect="auto", origin="lower", interpolation="nearest", cmap=colours, vmin=low, vmax=max(high, low + 1e-3),
    )  # fmt: skip
    bar = figure.colorbar(picture, ax=panel, pad=0.01, extend="min" if zero.any() else "neither")
    bar.set_label(f"log10 of the {label}")
    every = max(1, -(-len(blocks) // _ROWS))
    panel.set_yticks(range(0, len(blocks), every), blocks[::every], fontsize=8)
    ticks = range(0, len(steps), max(1, -(-len(steps) // _TICKS)))
    panel.set_xticks(ticks, [f"{steps[tick]:,}" for tick in ticks], fontsize=8)
    panel.set_xlabel("optimizer step; a column per look, not to scale")
    panel.set_title(f"{title} (grey: frozen{', white: exactly zero' if zero.any() else ''})", fontsize=10)
    return figure


def log_cells(values: Mapping[str, Sequence[tuple[int, float]]], steps: Sequence[int]) -> np.ndarray:
    """Return the decimal logarithms of values, ``(blocks, steps)``: ``nan`` where there is none, ``-inf`` for a zero.

    >>> log_cells({"head": [(0, 100.0), (7, 0.0)]}, [0, 3, 7]).tolist()
    [[2.0, nan, -inf]]
    """
    columns = {step: number for number, step in enumerate(steps)}
    cells = np.full((len(values), len(steps)), np.nan)
    for row, found in enumerate(values.values()):
        for step, value in found:
            cells[row, columns[step]] = value
    with np.errstate(divide="ignore"):
        np.log10(cells, out=cells)
    return cells

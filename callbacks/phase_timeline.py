"""A picture of a schedule: which blocks trained from which step to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 40


def draw_timeline(history: Sequence[tuple[int, int]], end: int, shares: Sequence[Mapping[str, float]]) -> Figure:
    """Draw a bar per block and phase; the colour says how much of the block trains.

    Args:
        history: Number of each phase that there was, and the optimizer step at which it began.
        end: The optimizer step up to which to draw.
        shares: For each phase of the schedule, the share of every block's numbers that trains, in the network's order.

    >>> figure = draw_timeline([(0, 0), (1, 30)], 90, [{"backbone": 0, "head": 1}, {"backbone": 1, "head": 1}])
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['backbone', 'head']
    """
    from matplotlib import colormaps  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    blocks = list(shares[0])
    figure = Figure(figsize=(8, 1.6 + 0.24 * min(len(blocks), _ROWS)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    colours = colormaps["YlGn"]
    for place, (number, start) in enumerate(history):
        stop = history[place + 1][1] if place + 1 < len(history) else max(end, start + 1)
        for row, block in enumerate(blocks):
            if share := shares[number][block]:
                panel.barh(row, stop - start, left=start, height=0.8, color=colours(0.25 + 0.65 * share))
        panel.axvline(start, color="0.4", linewidth=1)
        panel.annotate(
            f"phase {number}", (start, 1), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip
    every = max(1, -(-len(blocks) // _ROWS))
    panel.set_yticks(range(0, len(blocks), every), blocks[::every], fontsize=8)
    panel.set_ylim(-0.6, len(blocks) - 0.4)
    panel.set_xlim(0, max(end, 1))
    panel.set_xlabel("optimizer step")
    panel.set_title("What trained when (dark: the whole block)", fontsize=10, pad=16)
    return figure

"""Picture of the recipe ``head_init``: the heads side by side, in the linear model and in MiniLM."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.files import write_atomic
from lightning_peft.recipes.head_init_page import Row, kinds, standard_error, where

COLORS = {"random": "C3", "random/10": "C1", "zero": "C0", "probe": "0.55", "head first": "C2"}
PANELS = (
    ("linear", "shifted_error", "linear model: error out of distribution"),
    ("linear", "drift", "linear model: drift ‖B - B₀‖"),
    ("minilm", "drift", "MiniLM: drift ‖w - w₀‖ / ‖w₀‖"),
    ("minilm", "error", "MiniLM: error in distribution"),
    ("minilm", "shifted_error", "MiniLM: error out of distribution"),
    ("minilm", "lost_recall", "MiniLM: lost recall@1 of the old skill"),
)


def draw(file: Path, found: Mapping[str, Sequence[Row]]) -> None:
    """Draw the linear model and MiniLM: means and standard errors, a small dot for every seed.

    Args:
        file: The PNG to write.
        found: Rows by part.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = [(part, key, title) for part, key, title in PANELS if part in found]
    height = 1 if len(panels) == 2 else 2
    columns = len(panels) // height
    figure = Figure(figsize=(4.6 * columns, 3.7 * height + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, columns, squeeze=False).flat
    for panel, (part, key, title) in zip(grid, panels, strict=True):
        draw_panel(panel, found[part], key, across="noise" if part == "linear" else "step")
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("eps: error of the pretrained features" if part == "linear" else "steps of the backbone")
        if part == "linear":
            panel.set_yscale("symlog", linthresh=0.01)  # exact zeros have a place too
            panel.set_ylim(-0.003, 2 * max(row[key] for row in found[part]))
    shown = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown), frameon=False)
    write_atomic(file, lambda draft: figure.savefig(draft, dpi=110))


def draw_panel(panel: Any, rows: Sequence[Row], key: str, *, across: str) -> None:
    """Draw a measure at each place of the horizontal axis, the heads side by side."""
    places, heads = kinds(rows, across), kinds(rows, "head")
    for number, head in enumerate(heads):
        shift = (number - (len(heads) - 1) / 2) * 0.13
        for place, value in enumerate(places):
            values = [row[key] for row in where(rows, head=head) if row[across] == value]
            x, color = place + shift, COLORS[head]
            panel.scatter([x] * len(values), values, s=9, color=color, alpha=0.35, linewidths=0)
            error = standard_error(values) if len(values) > 1 else 0.0
            label = head if place == 0 else None
            panel.errorbar(x, statistics.mean(values), error, fmt="o", ms=6, color=color, capsize=3, label=label)
    panel.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    panel.grid(alpha=0.3, axis="y")

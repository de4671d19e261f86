"""What a run has learned and forgotten, as a picture and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed


def draw_learned(history: Sequence[Mapping[str, Any]], learned: str) -> Figure:
    """Return the way of a run: what is forgotten of each old task against what is learned of the new one.

    Args:
        history: Measurements with ``forgetting`` by task and ``learned``, where that was known.
        learned: Key of what is learned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415

    figure = Canvas(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    known = [entry for entry in history if entry["learned"] is not None]
    for task in known[0]["forgetting"] if known else ():
        lost = [entry["forgetting"][task] for entry in known]
        gained = [entry["learned"] for entry in known]
        (line,) = axes.plot(lost, gained, marker="o", markersize=3, label=task)
        axes.annotate(f"step {known[-1]['step']}", (lost[-1], gained[-1]), color=line.get_color(), fontsize=8)
    axes.set_xlabel("forgotten since before training")
    axes.set_ylabel(learned)
    axes.set_title("Learned against forgotten: better is up and to the left")
    axes.grid(alpha=0.3)
    if known:
        axes.legend()
    return figure


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write what a run has come to; atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(summary, indent=1) + "\n")

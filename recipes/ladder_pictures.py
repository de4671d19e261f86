"""The ladder's pictures: accuracy against what it costs, and against the number of labelled rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.files import write_atomic

Row = Mapping[str, Any]
Group = tuple[str, str]
"""A rung, and how many labelled rows."""


def draw(file: Path, groups: Mapping[Group, Sequence[Row]]) -> None:
    """Draw accuracy against trainable parameters, time and forgetting, with error bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    most = {arm: rows for (arm, _), rows in groups.items()}  # the last number of labels is the largest
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    kinds = (
        ("trainable", "trainable parameters"),
        ("seconds", "seconds of learning"),
        ("forgotten attached", "forgotten while attached"),
    )
    for panel, (key, title) in zip(panels, kinds, strict=True):
        for number, (arm, rows) in enumerate(most.items()):
            x, y = statistics.fmean(row[key] for row in rows), statistics.fmean(row["accuracy"] for row in rows)
            mark = "s" if "(" in arm else "o"
            panel.errorbar(x, y, yerr=error_of(rows), fmt=mark, color=f"C{number}", markersize=8, capsize=3)
            panel.annotate(arm, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8)
        panel.grid(alpha=0.3)
        panel.set_xlabel(title)
        panel.margins(0.15)
    panels[0].set_xscale("symlog", linthresh=100)
    panels[1].set_xscale("log")
    panels[2].set_xlabel("forgotten while attached (nats per token; encoder: recall@1)")
    panels[0].set_ylabel("accuracy on test rows")
    write_atomic(file, lambda draft: figure.savefig(draft, dpi=110))


def error_of(rows: Sequence[Row]) -> float:
    """Return the standard deviation over seeds; of one seed, the standard error over test rows."""
    values = [row["accuracy"] for row in rows]
    if len(values) > 1:
        return float(statistics.stdev(values))
    share = float(values[0])
    return math.sqrt(share * (1 - share) / len(rows[0]["hits"]))


def draw_shots(file: Path, groups: Mapping[Group, Sequence[Row]], all_rows: int) -> None:
    """Draw accuracy, and the gap to training rows, against the number of labelled rows: where the curves cross."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for number, arm in enumerate(dict.fromkeys(arm for arm, _ in groups)):
        own = [
            (all_rows if shots == "all" else int(shots), rows) for (name, shots), rows in groups.items() if name == arm
        ]
        x = [count for count, _ in own]
        accuracy = [statistics.fmean(row["accuracy"] for row in rows) for _, rows in own]
        gaps = [statistics.fmean(row["train"] - row["accuracy"] for row in rows) for _, rows in own]
        style = "--" if "(" in arm else "-"
        panels[0].errorbar(
            x,
            accuracy,
            yerr=[error_of(rows) for _, rows in own],
            fmt=f"o{style}",
            color=f"C{number}",
            capsize=2,
            label=arm,
        )
        panels[1].plot(x, gaps, f"o{style}", color=f"C{number}", label=arm)
    for panel, title in zip(panels, ("accuracy on test rows", "accuracy on training less test rows"), strict=True):
        panel.set_xscale("log")
        panel.set_xlabel("labelled rows")
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    write_atomic(file, lambda draft: figure.savefig(draft, dpi=110))

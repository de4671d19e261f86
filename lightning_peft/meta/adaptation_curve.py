"""How tasks do before adaptation and after each of its steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed


@dataclass
class AdaptationCurve:
    """Query losses, and accuracies where they are known, of many tasks after 0, 1, ... steps.

    Args:
        losses: A row for each task, with a value for each number of steps.
        accuracies: Likewise; empty where there are none.

    >>> AdaptationCurve([[3.0, 1.0], [5.0, 1.0]]).means("loss")
    [4.0, 1.0]
    """

    losses: list[list[float]] = field(default_factory=list)
    accuracies: list[list[float]] = field(default_factory=list)

    def add(self, other: AdaptationCurve) -> None:
        """Add the tasks of another curve."""
        self.losses += other.losses
        self.accuracies += other.accuracies

    def rows(self, kind: str) -> list[list[float]]:
        """Return what was measured, a row for each task: ``"loss"`` or ``"accuracy"``."""
        return {"loss": self.losses, "accuracy": self.accuracies}[kind]

    def means(self, kind: str) -> list[float]:
        """Return the mean over tasks after each number of steps."""
        return [statistics.fmean(column) for column in zip(*self.rows(kind), strict=True)]

    def medians(self, kind: str) -> list[float]:
        """Return the median over tasks: a few tasks that diverge do not hide the others."""
        return [statistics.median(column) for column in zip(*self.rows(kind), strict=True)]

    def intervals(self, kind: str) -> list[float]:
        """Return half the width of the 95 % interval of each mean, ``1.96 sd / sqrt(tasks)``; 0 of a single task."""
        return [interval(column) for column in zip(*self.rows(kind), strict=True)]

    def summary(self, stage: str) -> dict[str, float]:
        """Return what to log: means after each number of steps, and of the last also the interval."""
        found: dict[str, float] = {}
        for kind in ("loss", "accuracy"):
            if self.rows(kind):
                means = self.means(kind)
                found |= {f"meta/{stage}_{kind}_after_{steps}": mean for steps, mean in enumerate(means)}
                found |= {f"meta/{stage}_{kind}": means[-1], f"meta/{stage}_{kind}_interval": self.intervals(kind)[-1]}
        return found


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean, ``1.96 sd / sqrt(n)``; 0 of a single value.

    >>> interval([2.0, 2.0]), interval([1.0, math.inf])
    (0.0, nan)
    """
    if not all(map(math.isfinite, values)):  # a task that diverged, on which statistics.stdev may raise
        return math.nan
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def curve_figure(curves: Mapping[str, AdaptationCurve], *, log_loss: bool = False) -> Figure:
    """Draw loss, and accuracy where it is known, against steps of adaptation, with bands of 95 %.

    Args:
        curves: What to draw, by label.
        log_loss: Whether the loss has a logarithmic axis.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    kinds = [kind for kind in ("loss", "accuracy") if any(curve.rows(kind) for curve in curves.values())]
    figure = Figure(figsize=(4.4 * len(kinds), 3.4), layout="constrained")
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        for label, curve in curves.items():
            if curve.rows(kind):
                means, widths = curve.means(kind), curve.intervals(kind)
                steps = range(len(means))
                axes.plot(steps, means, marker="o", markersize=3, label=label)
                axes.fill_between(
                    steps,
                    [m - w for m, w in zip(means, widths, strict=True)],
                    [m + w for m, w in zip(means, widths, strict=True)],
                    alpha=0.2,
                )
        axes.set_xlabel("adaptation steps")
        axes.set_ylabel(f"query {kind} (mean over tasks, 95 %)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kind == "loss" and log_loss:
            axes.set_yscale("log")
        if len(curves) > 1:
            axes.legend(fontsize=8)
    return figure

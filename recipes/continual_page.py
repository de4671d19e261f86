"""Tables, picture and page of the recipe ``continual``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.files import write_atomic, write_text
from lightning_peft.metrics.accuracy_matrix import draw_accuracy_matrix
from lightning_peft.metrics.continual import (
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    Intransigence,
    LearningAccuracy,
    MinAccuracy,
    Stability,
    StabilityGap,
)
from lightning_peft.recipes.continual_data import Task
from lightning_peft.recipes.continual_sequence import ARMS, Plan, Progress
from lightning_peft.reporting import TextTable

Row = Mapping[str, Any]
MEASURES = {
    "average": "ACC",
    "incremental": "AIA",
    "learning": "LA",
    "stability": "stability",
    "backward": "BWT",
    "chaudhry": "F (Chaudhry)",
    "avalanche": "F (Avalanche)",
    "mammoth": "F (Mammoth)",
    "forward": "FWT",
    "lowest": "min-ACC",
    "gap": "stability gap",
    "intransigence": "intransigence",
    "ratio": "mean share of old rows",
}
"""Columns of a row, and what they are called."""


def measures(progress: Progress, tasks: Sequence[Task], plan: Plan) -> dict[str, float]:
    """Return every metric of a finished sequence; ``intransigence`` needs another run and comes later."""
    count, matrix = len(tasks), progress.matrix(list(tasks))
    classes = sum(len(task.classes) for task in tasks)
    found = {
        "average": AverageAccuracy(count).of(matrix),
        "incremental": AverageIncrementalAccuracy(count).of(matrix),
        "learning": LearningAccuracy(count).of(matrix),
        "stability": Stability(count).of(matrix),
        "backward": BackwardTransfer(count).of(matrix),
        **{kind: Forgetting(count, definition=kind).of(matrix) for kind in ("chaudhry", "avalanche", "mammoth")},
        "forward": ForwardTransfer(count, baseline=[1 / classes] * count).of(matrix),
    }
    for name, kind in (("lowest", MinAccuracy), ("gap", StabilityGap)):
        metric = kind(count)
        for during, on, step, value in progress.looks:
            metric.update(during, on, value, step=step)
        found[name] = metric.compute()
    shares = progress.ratios if plan.arm == "budget" else [plan.ratio if plan.uses_memory else 0.0]
    return {**{name: float(value) for name, value in found.items()}, "ratio": statistics.fmean(shares)}


def intransigence(matrix: Tensor, joint: Tensor) -> float:
    """Return what a sequence could not learn of its last task, beside a model of all rows of the same seed."""
    return float(Intransigence(matrix.shape[1], joint=joint[1:].diagonal()).of(matrix))


def measure_table(rows: Sequence[Row]) -> TextTable:
    """Return all metrics, a line for each and a column for each arm: mean and standard error over seeds."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    seeds = len({row["seed"] for row in rows})
    lines = []
    for name, label in MEASURES.items():
        values = [[row[name] for row in rows if row["arm"] == arm and name in row] for arm in arms]
        if any(values):
            lines.append([label, *map(_spread, values)])
    return TextTable(f"Accuracy on all tasks, {seeds} seed{'s' * (seeds > 1)} (± standard error)", ["", *arms], lines)


def _spread(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    error = f" ± {statistics.stdev(known) / len(known) ** 0.5:.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{error}"


def matrix_table(arm: str, matrix: Tensor, names: Sequence[str]) -> TextTable:
    """Return an accuracy matrix: a line after each task, a column for each task tested; many names become numbers."""
    names = names if sum(map(len, names)) <= 40 else [str(number + 1) for number in range(len(names))]
    labels = ["before", *(f"after {name}" for name in names)]
    rows = [[label, *(f"{value:.2f}" for value in line)] for label, line in zip(labels, matrix.tolist(), strict=True)]
    return TextTable(f"{arm}: accuracy, mean over seeds", ["", *names], rows)


def mean_matrix(matrices: Sequence[Tensor]) -> Tensor:
    """Return the mean of accuracy matrices over seeds."""
    return torch.stack(list(matrices)).mean(0)


def draw(file: Path, matrices: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Draw the accuracy matrices of all arms side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(len(matrices), 3)
    lines = -(-len(matrices) // columns)
    width = 1.8 + 0.5 * len(names)
    figure = Figure(figsize=(width * columns, (1.6 + 0.42 * len(names)) * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, (arm, matrix) in zip(panels, matrices.items(), strict=False):
        draw_accuracy_matrix(matrix[1:], names=names, ax=panel)
        panel.set_title(arm)
    for panel in panels[len(matrices) :]:
        panel.set_axis_off()
    write_atomic(file, lambda draft: figure.savefig(draft, dpi=100))


PAGE = """# A sequence of tasks

TASKS are learned one after the other by ENCODER, of which LoRA (rank RANK, all linear layers) and a head over all CLASSES
classes train. A text is judged among the classes of all tasks (class-incremental): nothing says which task it is of.

![Accuracy on each task after each task](PICTURE)

ARMS

Each task takes STEPS steps of BATCH new rows, AdamW with rates LR (head HEAD), a memory of CAPACITY rows for all classes
together. Accuracy is that on test rows (at most TEST of each task). The budget steers by other rows (at most GUARD). The
budget of a task is what it may lose until the end, since it was learned; its share begins high and comes down as the tasks
allow.

METRICS

ACC: mean at the end. AIA: mean over all tasks so far, after each. LA: each task just after it was learned. Stability: old
tasks at the end. BWT, F, FWT: [docs/metrics.md](metrics.md). FWT's baseline is guessing among all classes. min-ACC and the
stability gap: the lowest of all looks, every LOOK steps.

MATRICES

Made by `COMMAND`. DATA
"""


def page(
    file: Path, rows: Sequence[Row], matrices: Mapping[str, Tensor], tasks: Sequence[Task], words: Mapping[str, str]
) -> None:
    """Write the page; its figures are of this run.

    Args:
        file: Where it goes; the picture of the same name lies beside it.
        rows: A row for each arm and seed.
        matrices: Mean accuracy matrix by arm.
        tasks: The sequence.
        words: What stands for the words in capitals.
    """
    names = [task.name for task in tasks]
    text = PAGE
    for word, value in {
        **words,
        "TASKS": f"{len(tasks)} tasks of {len(tasks[0].classes)} classes each",
        "CLASSES": str(sum(len(task.classes) for task in tasks)),
        "PICTURE": file.with_suffix(".png").name,
        "ARMS": "\n".join(f"- `{arm}`: {ARMS[arm]}." for arm in matrices),  # type: ignore[index]
        "METRICS": measure_table(rows).markdown(),
        "MATRICES": "\n\n".join(matrix_table(arm, matrix, names).markdown() for arm, matrix in matrices.items()),
    }.items():
        text = text.replace(word, value)
    write_text(file, text)

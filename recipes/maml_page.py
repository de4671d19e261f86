"""What the recipes of meta-learning share: measuring adaptation, a table of it, and their parts of one page."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from lightning_peft import MAMLMixin
from lightning_peft.files import write_atomic
from lightning_peft.meta import AdaptationCurve, Episode
from lightning_peft.reporting import TextTable, save_results

HEADING = "Meta-learning"


def adaptation(module: MAMLMixin, episodes: Iterable[Episode]) -> AdaptationCurve:
    """Return how a module does on tasks before adaptation and after each step."""
    module.eval()
    curve = AdaptationCurve()
    for episode in episodes:
        curve.add(module.learner.curve(episode))
    return curve


def table(title: str, curves: Mapping[str, AdaptationCurve], kind: str, steps: Sequence[int]) -> TextTable:
    """Return means, 95 % intervals and medians over tasks after some numbers of steps, a line for each arm.

    >>> table("Sines", {"maml": AdaptationCurve([[3.0, 1.0], [5.0, 2.0]])}, "loss", [0, 1]).rows
    [('maml', '2', '4.000 ± 1.960 (4.000)', '1.500 ± 0.980 (1.500)')]
    """
    rows = []
    for arm, curve in curves.items():
        found = zip(curve.means(kind), curve.intervals(kind), curve.medians(kind), strict=True)
        cells = [f"{mean:.3f} ± {width:.3f} ({median:.3f})" for mean, width, median in found]
        shown = [cells[step] if step < len(cells) else "-" for step in steps]
        rows.append((arm, str(len(curve.rows(kind))), *shown))
    return TextTable(title, ["", "tasks", *(f"after {step}" for step in steps)], rows)


def save_picture(path: Path, figure: Figure, out: Path, key: str) -> None:
    """Write a picture as PNG and into TensorBoard."""
    write_atomic(path, lambda place: figure.savefig(place, dpi=110, format="png"))
    logger = TensorBoardLogger(out / "logs", name="", version="summary")
    logger.experiment.add_figure(key, figure)
    logger.finalize("success")


def save(out: Path, curves: Mapping[str, AdaptationCurve], about: Any, more: Mapping[str, Mapping[str, Any]]) -> None:
    """Write means and intervals of every arm as JSON and CSV."""
    rows = {}
    for arm, curve in curves.items():
        rows[arm] = {
            f"{kind} {what}": getattr(curve, what)(kind)
            for kind in ("loss", "accuracy")
            if curve.rows(kind)
            for what in ("means", "intervals", "medians")
        } | dict(more.get(arm, {}))
    save_results(out, rows, asdict(about))


def trainer(out: Path, arm: str, steps: int, loader: Any, **options: Any) -> pl.Trainer:
    """Return a trainer that takes so many steps over a loader, and logs into a run of its own."""
    return pl.Trainer(
        max_steps=steps,
        max_epochs=math.ceil(steps / len(loader)),
        logger=TensorBoardLogger(out / "logs", name="", version=arm),
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=50,
        **options,
    )


def quiet() -> None:
    """Leave out greetings and advice that a recipe of many short fits would repeat."""
    warnings.filterwarnings(
        "ignore", ".*(many workers|exists and is not empty|logging interval|LeafSpec|srun|eval mode).*"
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")

"""What the recipes of meta-learning share: measuring adaptation, tables of it, and their parts of one page."""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from lightning_peft import MAMLMixin
from lightning_peft.files import write_atomic
from lightning_peft.meta import AdaptationCurve, Episode
from lightning_peft.reporting import TextTable

HEADING = "Meta-learning"
Facts = dict[str, Any]
"""What stands beside a curve: seconds, and the rate of the test."""


def adaptation(module: MAMLMixin, episodes: Iterable[Episode]) -> AdaptationCurve:
    """Return how a module does on tasks before adaptation and after each step."""
    module.eval()
    curve = AdaptationCurve()
    for episode in episodes:
        curve.add(module.learner.curve(episode))
    return curve


def pooled(seeds: Sequence[AdaptationCurve]) -> AdaptationCurve:
    """Return the tasks of all seeds in one curve."""
    found = AdaptationCurve()
    for one in seeds:
        found.add(one)
    return found


def tables(
    title: str, curves: Mapping[str, Sequence[AdaptationCurve]], kind: str, steps: Sequence[int]
) -> list[TextTable]:
    """Return means, 95 % intervals and medians over tasks after some numbers of steps, and of several seeds the means of each.

    >>> found = tables("Sines", {"maml": [AdaptationCurve([[3.0, 1.0], [5.0, 2.0]])]}, "loss", [0, 1])
    >>> found[0].rows
    [('maml', '2', '4.000 ± 1.960 (4.000)', '1.500 ± 0.980 (1.500)')]
    """
    rows, by_seed = [], []
    for arm, seeds in curves.items():
        curve = pooled(seeds)
        found = zip(curve.means(kind), curve.intervals(kind), curve.medians(kind), strict=True)
        cells = [f"{mean:.3f} ± {width:.3f} ({median:.3f})" for mean, width, median in found]
        rows.append((arm, str(len(curve.rows(kind))), *(cells[step] if step < len(cells) else "-" for step in steps)))
        each = [[f"{one.means(kind)[step]:.3f}" if step < len(cells) else "-" for one in seeds] for step in steps]
        by_seed.append((arm, *(", ".join(cell) for cell in each)))
    after = [f"after {step}" for step in steps]
    made = [TextTable(title, ["", "tasks", *after], rows)]
    several = max(map(len, curves.values()), default=0) > 1
    return [*made, TextTable("Means of each seed, in order", ["", *after], by_seed)] if several else made


def told(facts: Mapping[str, Sequence[Facts]]) -> str:
    """Return how long the arms trained (the median over seeds) and which rates their tests took, by seed where these differ.

    >>> told({"maml": [{"seconds": 90.0, "rate": 0.1}, {"seconds": 92.0, "rate": 0.3}]})
    'maml: 91 s, rate 0.1, 0.3.'
    """
    parts = []
    for arm, seeds in facts.items():
        rates = [f"{one['rate']:g}" for one in seeds]
        shown = rates[:1] if len(set(rates)) == 1 else rates
        parts.append(f"{arm}: {statistics.median(one['seconds'] for one in seeds):.0f} s, rate {', '.join(shown)}")
    return "; ".join(parts) + "."


def seeds_told(seeds: int) -> str:
    """Return which seeds ran.

    >>> seeds_told(1), seeds_told(3)
    ('seed 0', 'seeds 0 to 2')
    """
    return "seed 0" if seeds == 1 else f"seeds 0 to {seeds - 1}"


def save_picture(path: Path, figure: Figure, out: Path, key: str) -> None:
    """Write a picture as PNG and into TensorBoard."""
    write_atomic(path, lambda place: figure.savefig(place, dpi=110, format="png"))
    logger = TensorBoardLogger(out / "logs", name="", version="summary")
    logger.experiment.add_figure(key, figure)
    logger.finalize("success")


def trainer(out: Path, name: str, steps: int, loader: Any, **options: Any) -> pl.Trainer:
    """Return a trainer that takes so many steps over a loader, and logs into a run of its own."""
    return pl.Trainer(
        max_steps=steps,
        max_epochs=math.ceil(steps / len(loader)),
        logger=TensorBoardLogger(out / "logs", name="", version=name),
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

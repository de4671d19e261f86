"""Log keys and the TensorBoard page, once for all mixins and callbacks.

A key is ``family/name``. Families are few, so that one glob finds all that belongs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed

FAMILIES = {
    "learn": "how well the new task goes",
    "retained": "how much of an old task is left, in its own unit",
    "forgetting": "how much of an old task is lost since before training",
    "budget": "how much of what may be forgotten is forgotten: 1 is the limit",
    "gauge": "forgetting as it is estimated without old rows",
    "replay": "old rows and the losses on them",
    "schedule": "what trains now",
    "adapter": "what was added",
    "flow": "gradients, and steps relative to the weights, by block",
    "drift": "how far weights are from where they began, by block",
    "search": "what a search has found and spent",
    "baseline": "what is reached without training",
    "decoding": "what a decoder writes, and what it costs",
    "meta": "how well tasks adapt, before and after each step",
    "generation": "what a generative model makes, and how near it comes to real data",
}
"""Every family of keys, and what it shows."""

# Both follow the life of what they describe: a trainer or a writer that goes takes its entry along.
_CHARTS: WeakKeyDictionary[pl.Trainer, dict[str, dict[str, list[str]]]] = WeakKeyDictionary()
_WRITTEN: WeakSet[Any] = WeakSet()


def check_key(key: str) -> str:
    """Return a log key that follows the grammar ``family/name``.

    Raises:
        ValueError: If its family is unknown or the name is empty.

    >>> check_key("forgetting/old")
    'forgetting/old'
    """
    family, _, name = key.partition("/")
    if family not in FAMILIES or not name:
        raise ValueError(f"check_key: {key!r} must be family/name, with a family of {list(FAMILIES)}.")
    return key


def log_values(trainer: pl.Trainer, values: Mapping[str, float], *, step: int | None = None) -> None:
    """Send values to every logger of a trainer, and to ``callback_metrics`` for ``monitor=``.

    They go past ``LightningModule.log``, which would hold them back to every ``log_every_n_steps`` steps.

    Args:
        trainer: A trainer with any number of loggers, also none.
        values: Numbers by key.
        step: The optimizer step that they belong to; unset, the present one.

    Raises:
        ValueError: For a key that does not follow the grammar.
    """
    for key in values:
        check_key(key)
    _write_layout(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step if step is None else step)
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def log_figure(trainer: pl.Trainer, key: str, figure: Figure, *, step: int | None = None) -> None:
    """Send a picture to every TensorBoard logger of a trainer; a later one under the same key and step stands beside it.

    Args:
        trainer: A trainer with any number of loggers, also none.
        key: Where it stands, as ``schedule/timeline``.
        figure: What to show.
        step: The optimizer step that it belongs to; unset, the present one.

    Raises:
        ValueError: For a key that does not follow the grammar.
    """
    for writer in _writers(trainer):
        writer.add_figure(check_key(key), figure, trainer.global_step if step is None else step, close=False)


def log_image(trainer: pl.Trainer, key: str, image: Tensor, *, step: int | None = None) -> None:
    """Send an image to every TensorBoard logger of a trainer.

    Args:
        trainer: A trainer with any number of loggers, also none.
        key: Where it stands, as ``generation/samples``.
        image: ``(channels, height, width)`` with 1 or 3 channels, in [0, 1].
        step: The optimizer step that it belongs to; unset, the present one.

    Raises:
        ValueError: For a key that does not follow the grammar.
    """
    for writer in _writers(trainer):
        writer.add_image(check_key(key), image, trainer.global_step if step is None else step)


def log_text(trainer: pl.Trainer, key: str, text: str, *, step: int | None = None) -> None:
    """Send Markdown to every TensorBoard logger of a trainer.

    Args:
        trainer: A trainer with any number of loggers, also none.
        key: Where it stands, as ``decoding/samples``.
        text: What to show.
        step: The optimizer step that it belongs to; unset, the present one.

    Raises:
        ValueError: For a key that does not follow the grammar.
    """
    for writer in _writers(trainer):
        writer.add_text(check_key(key), text, trainer.global_step if step is None else step)


def _writers(trainer: pl.Trainer) -> list[Any]:
    """Return the writers of TensorBoard's files, on the first process; none on others."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def register_chart(
    trainer: pl.Trainer, category: str, chart: str, keys: Sequence[str], *, beside: Sequence[str] = ()
) -> None:
    """Put keys into one chart of TensorBoard's custom scalars page.

    The page can be set once per writer, so callbacks register in ``setup``, and the first value logged writes the page.
    Charts of one name share their keys.

    Args:
        trainer: Whose loggers are meant.
        category: Heading of the page's part.
        chart: Title of the chart.
        keys: What it shows.
        beside: Keys of the user's own, which follow no grammar, in the same chart.

    Raises:
        ValueError: For a key that does not follow the grammar.
    """
    charts = _CHARTS.setdefault(trainer, {}).setdefault(category, {}).setdefault(chart, [])
    charts.extend(key for key in (*map(check_key, keys), *beside) if key not in charts)


def _write_layout(trainer: pl.Trainer) -> None:
    charts = _CHARTS.get(trainer)
    if not charts or not trainer.is_global_zero:
        return
    layout = {
        category: {title: ["Multiline", keys] for title, keys in found.items()} for category, found in charts.items()
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and logger.experiment not in _WRITTEN:
            _WRITTEN.add(logger.experiment)
            logger.experiment.add_custom_scalars(layout)

"""Take a prompt's leaning to some labels out of its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

from lightning_peft.prompts.template import PromptTemplate, Row

Calibration = Literal["none", "contextual", "batch"]
CONTENT_FREE = ("N/A", "[MASK]", "")
"""Inputs that say nothing; their mean is taken."""


def leaning(
    calibration: Calibration,
    score: Callable[[Sequence[Row]], Tensor],
    template: PromptTemplate,
    rows: Sequence[Row] = (),
) -> Tensor | float:
    """Return what to subtract from the log-probabilities of labels: those that the prompt itself suggests.

    The logarithm of the mean probability of each label, normalised over labels. ``"contextual"``: over inputs without content
    (Zhao et al. 2021, arXiv:2102.09690). ``"batch"``: over inputs without labels (Zhou et al. 2023, arXiv:2309.17249).
    ``"none"``: 0.

    **The trap:** rows of the test set would tell its label shares. Give training rows.

    Args:
        calibration: Which.
        score: Returns the log-probabilities of inputs, ``(rows, labels)``.
        template: The prompt.
        rows: Inputs for ``"batch"``.

    Raises:
        ValueError: For another calibration, or ``"batch"`` without rows.

    >>> import torch
    >>> lean = leaning("batch", lambda rows: torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log(), PromptTemplate(), ["a", "b"])
    >>> lean.exp()
    tensor([0.7000, 0.3000])
    """
    if calibration not in get_args(Calibration):
        raise ValueError(
            f"leaning: calibration={calibration!r} must be one of {', '.join(map(repr, get_args(Calibration)))}."
        )
    if calibration == "none":
        return 0.0
    rows = calibration_inputs(calibration, template, rows)
    if not rows:
        raise ValueError("leaning: calibration='batch' needs rows; give inputs of the training set.")
    return score(rows).softmax(1).mean(0).log()


def calibration_inputs(calibration: Calibration, template: PromptTemplate, rows: Sequence[Row] = ()) -> list[Row]:
    """Return the inputs whose scores a calibration takes.

    Args:
        calibration: Which.
        template: The prompt.
        rows: Inputs for ``"batch"``.
    """
    if calibration == "contextual":
        return [dict.fromkeys(template.slots, text) for text in CONTENT_FREE]
    return list(rows) if calibration == "batch" else []

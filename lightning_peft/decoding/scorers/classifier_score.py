"""Texts scored by a classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.rows import reading
from lightning_peft.decoding.scorers.reading import Reads, checked, read


@dataclass
class ClassifierScore:
    """The log-probability that a classifier gives to a class; for texts that ended, and for texts under way.

    **The trap:** a search finds what the classifier likes, which with more beams is less and less what it was trained on.

    Args:
        module: A LightningModule, or any module whose forward gives logits ``(texts, classes)`` or has them as ``logits``.
        inputs: From texts to what the module's forward takes; a mapping is handed on by keyword.
        label: The class.
        batch_size: Texts at once.
        reads: Judge the completion alone, or prompt and completion.

    Raises:
        ValueError: For a class that the logits have not.
    """

    module: nn.Module
    inputs: Callable[[list[str]], Any]
    label: int
    batch_size: int = 32
    reads: Reads = "completion"

    def __post_init__(self) -> None:
        """Check the setting."""
        checked(self.reads, "ClassifierScore")

    def __call__(self, texts: list[Draft]) -> Tensor:
        """Return ``log p(label | text)`` for each text."""
        known = read(texts, self.reads)
        with reading(self.module):
            parts = [self._scored(known[i : i + self.batch_size]) for i in range(0, len(known), self.batch_size)]
        return torch.cat(parts)

    def _scored(self, texts: list[str]) -> Tensor:
        given = self.inputs(texts)
        output = self.module(**given) if hasattr(given, "keys") else self.module(given)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        if logits.ndim != 2 or not -logits.shape[1] <= self.label < logits.shape[1]:
            raise ValueError(f"ClassifierScore: label={self.label!r} is none of logits {tuple(logits.shape)}.")
        return logits.float().log_softmax(1)[:, self.label].cpu()

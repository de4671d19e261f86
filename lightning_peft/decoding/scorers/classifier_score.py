"""What a classifier thinks of a text, as its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from lightning_peft.decoding.scorers.text_scorer import Reads, TextScorer
from lightning_peft.eval_mode import eval_mode


class ClassifierScore(TextScorer):
    """The log-probability of one class under a classifier, for final or partial scoring.

    ``log softmax(logits)[target]``; for a single logit, ``log sigmoid`` of it (target 1) or of its opposite (target 0). The
    classifier runs in eval mode and without gradients, and is left in the modes it was in.

    Args:
        classifier: A LightningModule, or any callable, that maps what ``preprocess`` returns to logits: ``(texts, classes)``,
            ``(texts, 1)`` or ``(texts,)``. Of an output with an attribute ``logits``, as those of transformers, that is taken.
        preprocess: Maps a list of texts to the classifier's input: a mapping is passed by keywords, anything else as the one
            argument. Tensors are moved to the classifier's device.
        target: The class.
        batch_size: Texts of one forward.
        reads: ``"whole"`` for prompt and completion, ``"completion"`` for what was written alone.
        cache_size: How many answers are remembered. They hold for the weights of their time: see ``forget``.

    Raises:
        ValueError: If ``batch_size`` is below 1, or the classifier has no such class.

    >>> length = ClassifierScore(lambda x: x, lambda texts: torch.tensor([[0.0, float(len(text))] for text in texts]), target=1)
    >>> length(["", "abc"])
    tensor([-0.6931, -0.0486])
    """

    def __init__(
        self,
        classifier: Callable[..., Any],
        preprocess: Callable[[list[str]], Any],
        *,
        target: int,
        batch_size: int = 32,
        reads: Reads = "whole",
        cache_size: int = 65_536,
    ) -> None:
        super().__init__(reads=reads, cache_size=cache_size)
        if batch_size < 1:
            raise ValueError(f"ClassifierScore: batch_size={batch_size!r} holds no text. Give 1 or more.")
        self.classifier = classifier
        self.preprocess = preprocess
        self.target = target
        self.batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the log-probability of the class for each text: ``(texts,)``, on the CPU."""
        parts = [self.part(text) for text in texts]
        unique = list(dict.fromkeys(parts))
        found: dict[str, float] = {part: self.answers.ask(part, lambda: 0.0) for part in unique if part in self.answers}
        new = [part for part in unique if part not in found]
        held = eval_mode(self.classifier) if isinstance(self.classifier, nn.Module) else nullcontext()
        with held, torch.no_grad():
            for start in range(0, len(new), self.batch_size):
                batch = new[start : start + self.batch_size]
                found.update(zip(batch, self._score(batch), strict=True))
        for part in new:
            self.answers.ask(part, partial(found.__getitem__, part))
        return torch.tensor([found[part] for part in parts])

    def forget(self) -> None:
        """Drop what is remembered, because the classifier has been trained on."""
        self.answers.clear()

    def _score(self, texts: list[str]) -> list[float]:
        device = _device(self.classifier)
        given = self.preprocess(texts)
        if hasattr(given, "items"):
            found = self.classifier(**{name: _moved(value, device) for name, value in given.items()})
        else:
            found = self.classifier(_moved(given, device))
        logits = getattr(found, "logits", found).float().reshape(len(texts), -1)
        classes = max(logits.shape[1], 2)
        if not 0 <= self.target < classes:
            raise ValueError(
                f"ClassifierScore: target={self.target!r}, but the classifier has {classes} classes, from 0."
            )
        if logits.shape[1] == 1:
            scores: Tensor = F.logsigmoid(logits[:, 0] if self.target else -logits[:, 0])
        else:
            scores = logits.log_softmax(-1)[:, self.target]
        return [float(score) for score in scores]


def _device(classifier: object) -> torch.device | None:
    if not isinstance(classifier, nn.Module):
        return None
    return next((weight.device for weight in classifier.parameters()), None)


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, Tensor) else value

"""Old tasks as most people measure them: a classifier's accuracy, an encoder's retrieval, a language model's perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_peft.data.causal_batch import IGNORED
from lightning_peft.data.mix_loader import Rows
from lightning_peft.metrics.retrieval import RecallAtOne
from lightning_peft.old_task import OldTask


def accuracy_task(data: Rows, classes: int, *, logits: Callable[[Any, Any], Tensor] | None = None) -> OldTask:
    """Return the share of rows that a classifier gets right.

    Args:
        data: Rows ``(input, label)``, or what ``logits`` understands with the label last.
        classes: Number of classes.
        logits: ``logits(module, batch)`` returns ``(rows, classes)``; unset, ``module(batch[0])``.

    >>> accuracy_task([(0.0, 1)] * 4, classes=2).sign
    1
    """
    return OldTask(data, MulticlassAccuracy(classes, average="micro"), _Classifies(logits))


def retrieval_task(data: Rows, embed: Callable[[Any, Any], Tensor]) -> OldTask:
    """Return the share of queries whose own document is the nearest of all.

    Args:
        data: Pairs ``(query, document)``.
        embed: ``embed(module, inputs)`` returns ``(rows, width)`` for a batch of queries or of documents.
    """
    return OldTask(data, RecallAtOne(), _Embeds(embed))


def perplexity_task(data: Rows, *, logits: Callable[[Any, Any], Tensor] | None = None) -> OldTask:
    """Return the perplexity of a causal language model: ``exp`` of the mean loss over tokens, whatever the batches.

    Args:
        data: Batches are mappings with ``input_ids`` and, as far as there are, ``attention_mask`` and ``labels`` (-100 does not
            count); without labels every token that is attended to counts.
        logits: ``logits(module, batch)`` returns ``(rows, tokens, vocabulary)``; unset, those of ``module(**batch)``.
    """
    return OldTask(data, Perplexity(ignore_index=IGNORED), _Reads(logits), higher_is_better=False)


@dataclass
class _Classifies:
    logits: Callable[[Any, Any], Tensor] | None

    def __call__(self, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        found = module(batch[0]) if self.logits is None else self.logits(module, batch)
        return found, batch[-1]


@dataclass
class _Embeds:
    embed: Callable[[Any, Any], Tensor]

    def __call__(self, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return self.embed(module, batch[0]), self.embed(module, batch[1])


@dataclass
class _Reads:
    logits: Callable[[Any, Any], Tensor] | None

    def __call__(self, module: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if "input_ids" not in batch:
            raise ValueError(f"perplexity_task: a batch has {sorted(batch)}; it must have input_ids.")
        if self.logits is None:
            found = module(**{key: value for key, value in batch.items() if key != "labels"}).logits
        else:
            found = self.logits(module, batch)
        labels = batch.get("labels", batch["input_ids"])
        if "labels" not in batch and "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
        return found[:, :-1], labels[:, 1:]

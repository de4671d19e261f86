"""The networks of the ladder: a language model that answers, and a sentence encoder with a head."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_peft import AdapterMixin, PromptTemplate, Verbalizer, parameter_groups
from lightning_peft.data.causal_batch import IGNORED, TokenRow, causal_batch
from lightning_peft.mixins.prompting_mixin import PromptingMixin
from lightning_peft.probes import pool
from lightning_peft.recipes.ladder_task import TOKENS, Row

WARM_UP = 0.1
HEAD_RATE = 5e-3
"""Of the encoder's head, which is new, on every rung."""


class TimedNet(pl.LightningModule):
    """Notes how long each training step takes; rates rise over the first tenth of the steps and fall to zero."""

    def __init__(self, backbone: Any, lr: float, steps: int) -> None:
        super().__init__()
        self.backbone, self.lr, self.steps = backbone, lr, steps
        self.step_seconds: list[float] = []
        self._began = 0.0

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._began = time.perf_counter()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.step_seconds.append(time.perf_counter() - self._began)

    def groups(self) -> list[dict[str, Any]]:
        """Return what trains, with its rates."""
        return parameter_groups(self.backbone, lr=self.lr)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.groups(), weight_decay=0.0)
        warm = max(1, round(WARM_UP * self.steps))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, max(0.0, (self.steps - step) / max(1, self.steps - warm)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class AnswerNet(TimedNet):
    """A causal language model that learns to say the answer behind a plain form."""

    def __init__(self, backbone: Any, tokenizer: Any, lr: float, steps: int) -> None:
        super().__init__(backbone, lr, steps)
        self.tokenizer = tokenizer

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        wanted = batch["labels"][:, 1:]
        places = (
            (wanted != IGNORED).any(0).nonzero().squeeze(1)
        )  # a vocabulary of logits is dear: only where one counts
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self.backbone(**tokens, use_cache=False, logits_to_keep=places).logits
        loss = F.cross_entropy(logits.flatten(0, 1), wanted[:, places].flatten(), ignore_index=IGNORED)
        self.log("learn/train_loss", loss, batch_size=len(wanted))
        return loss


class AdaptedAnswerNet(PromptingMixin, AdapterMixin, AnswerNet):
    """The same on any rung, judged by the log-probabilities of its answers."""


class SentenceNet(TimedNet):
    """A sentence encoder and a linear head on the mean of its last layer."""

    def __init__(self, backbone: Any, classes: int, lr: float, steps: int) -> None:
        super().__init__(backbone, lr, steps)
        self.head = nn.Linear(backbone.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return sentence vectors of length 5, ``(rows, width)``."""
        mask = tokens["attention_mask"]
        states = self.backbone(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return 5 * F.normalize(pool(states, mask, "mean"), dim=-1)

    @override
    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(self.features(tokens))
        return logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("learn/train_loss", loss, batch_size=len(batch["labels"]))
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch), batch["labels"])
        self.log("learn/accuracy", self.accuracy, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))

    @override
    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.head.parameters()), "lr": HEAD_RATE, "name": "head"}, *super().groups()]


class AdaptedSentenceNet(AdapterMixin, SentenceNet):
    """The same on any rung."""


class AnswerRows:
    """Collate texts with labels into the tokens of a form and its answer; only the answer's tokens have a label."""

    def __init__(self, tokenizer: Any, template: PromptTemplate, verbalizer: Verbalizer) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.answers = [one[0] for one in verbalizer.tokens(tokenizer, template.gap())]

    def row(self, row: Row) -> TokenRow:
        """Return the tokens of one text."""
        asked = self.tokenizer(self.template.prompt(row[0], self.tokenizer))["input_ids"]
        said = list(self.answers[row[1]])
        return {"ids": asked + said, "labels": [IGNORED] * len(asked) + said}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a batch."""
        return causal_batch([self.row(row) for row in rows])


class EncoderRows:
    """Collate texts with labels into tokens and labels for an encoder."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a batch, padded to its longest row."""
        texts = [text for text, _ in rows]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        return {**tokens, "labels": torch.tensor([label for _, label in rows])}


def texts_and_labels(rows: Sequence[Row]) -> tuple[list[str], Tensor]:
    """Collate rows as they are, for prompting."""
    return [text for text, _ in rows], torch.tensor([label for _, label in rows])

"""The network of the recipe ``continual``: a sentence encoder with LoRA and one head over the classes of all tasks."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft import DistillMixin, LoRAMixin, parameter_groups
from lightning_peft.data.packaged import minilm

TOKENS = 64
WEIGHT_DECAY = 0.01
Batch = tuple[dict[str, Tensor], Tensor]


class IntentNet(pl.LightningModule):
    """A sentence encoder and a linear head; what a text is, among all classes of the sequence.

    Args:
        model: Folder or hub id of an encoder; unset, the packaged MiniLM.
        classes: Number of classes of all tasks together.
        lr: Rate of the backbone's parameters that train.
        head_lr: Rate of the head.
    """

    def __init__(self, model: str | None, classes: int, lr: float, head_lr: float) -> None:
        super().__init__()
        from transformers import AutoModel  # noqa: PLC0415 - slow to import
        from transformers.utils import logging  # noqa: PLC0415

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.backbone = AutoModel.from_pretrained(model or minilm(), **({} if model else {"add_pooling_layer": False}))
        self.head = nn.Linear(self.backbone.config.hidden_size, classes)
        self.lr, self.head_lr = lr, head_lr
        self.old_classes = 0
        """How many classes earlier tasks had; they come first."""

    @override
    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        mask = tokens["attention_mask"]
        hidden = self.backbone(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        logits: Tensor = self.head(5 * F.normalize((hidden * mask.unsqueeze(-1)).sum(1), dim=-1))
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("learn/train_loss", loss, prog_bar=True, batch_size=len(batch[1]))
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": list(self.head.parameters()), "lr": self.head_lr, "name": "head"}]
        return torch.optim.AdamW([*groups, *parameter_groups(self.backbone, lr=self.lr)], weight_decay=WEIGHT_DECAY)


class AdaptedIntentNet(LoRAMixin, IntentNet):
    """The same with LoRA; old rows stand inside its batches."""


class DistilledIntentNet(LoRAMixin, DistillMixin, IntentNet):
    """Held, on old rows beside its batches, to what earlier tasks left: over the old classes, without their labels."""

    distill_from = "start"

    def distill_outputs(self, batch: Batch) -> Tensor:
        """Return the logits of the classes of earlier tasks."""
        logits: Tensor = self(batch[0])
        return logits[:, : self.old_classes]


def collate(tokenizer: Any, rows: list[tuple[str, int]]) -> Batch:
    """Turn texts and class numbers into tokens and labels."""
    texts = [text for text, _ in rows]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    kept = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    return kept, torch.tensor([label for _, label in rows])


def collate_with(model: str | None) -> Any:
    """Return the collate function for an encoder."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    return functools.partial(collate, AutoTokenizer.from_pretrained(model or minilm()))

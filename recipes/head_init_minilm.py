"""MiniLM learns sentiment under full fine-tuning, from heads that start in different ways; measured in its first steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_peft.callbacks import FreezeSchedule, OldTask, ZeroInitHead
from lightning_peft.data.packaged import minilm
from lightning_peft.metrics import RecallAtOne
from lightning_peft.old_task import evaluate
from lightning_peft.recipes.head_init_texts import Texts, by_length

HEADS = ("random", "random/10", "zero", "head first")
BACKBONE_RATE, HEAD_RATE, WEIGHT_DECAY = 1e-4, 5e-3, 0.01
"""Those of the recipe ``sentiment`` for full fine-tuning, chosen there on validation rows; constant here, as a warm-up would
hide the first steps, which are the question."""
Row = dict[str, float | int | str]


# --- network ----------------------------------------------------------------------------------------------------------


class SentenceNet(pl.LightningModule):
    """A sentence encoder and a linear head; all of it trains. The encoder stays in eval mode: no dropout.

    Args:
        head_scale: The head's initial weight and bias are torch's default times this.
    """

    def __init__(self, head_scale: float = 1.0) -> None:
        super().__init__()
        from transformers import AutoModel  # noqa: PLC0415 - slow to import
        from transformers.utils import logging  # noqa: PLC0415

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.backbone = AutoModel.from_pretrained(minilm(), add_pooling_layer=False)
        self.head = nn.Linear(self.backbone.config.hidden_size, 2)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(head_scale)

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return normalised sentence vectors, ``(rows, width)``: the mean of the last hidden state over the mask."""
        mask = tokens["attention_mask"]
        hidden = self.backbone(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask.unsqueeze(-1)).sum(1), dim=-1)

    @override
    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(5 * self.embed(tokens))  # as in sentiment: logits of a useful size
        return logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(self.head.parameters()), "lr": HEAD_RATE, "name": "head"},
            {"params": list(self.backbone.parameters()), "lr": BACKBONE_RATE, "name": "backbone"},
        ]
        return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


def answers(module: SentenceNet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits and labels of a batch."""
    return module(batch), batch["labels"]


def embed_pair(module: SentenceNet, batch: tuple[dict[str, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Embed both sides of a batch of pairs."""
    return module.embed(batch[0]), module.embed(batch[1])


def tasks_of(texts: Texts) -> dict[str, OldTask]:
    """Return what is measured: accuracy on both kinds of rows, and the old skill."""
    accuracy = MulticlassAccuracy(2, average="micro")
    return {
        "accuracy": OldTask(texts.loader(by_length(texts.test), 16), accuracy, answers),
        "shifted accuracy": OldTask(texts.loader(by_length(texts.shifted), 16), accuracy, answers),
        "recall": OldTask(texts.pair_loader(), RecallAtOne(), embed_pair),
    }


# --- a run ------------------------------------------------------------------------------------------------------------


class FirstSteps(pl.Callback):
    """Measure a run after given steps, counted from the first one that may move the backbone.

    Args:
        texts: Test rows and pairs.
        head_steps: Steps of the head alone, which come before.
        bar: Moves with every step.
    """

    def __init__(self, texts: Texts, head_steps: int, bar: tqdm[Any]) -> None:
        self.texts, self.head_steps, self.bar, self.tasks = texts, head_steps, bar, tasks_of(texts)
        self.first_gradient = float("nan")
        self.rows: list[Row] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = [parameter.detach().clone() for parameter in backbone_of(pl_module)]
        self.size = norm(self.start)
        self._look(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step == self.head_steps:
            self.first_gradient = norm([parameter.grad for parameter in backbone_of(pl_module)])

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.bar.update()
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step - self.head_steps
        if step not in {0, *self.texts.setting.steps}:
            return

        def measure(name: str) -> float:
            task, to_device = self.tasks[name], trainer.strategy.batch_to_device
            return evaluate(pl_module, task, name=name, to_device=to_device, progress=not self.bar.disable)

        if self.texts.pretrained_recall is None:  # before the first step of the first run; the same in all of them
            self.texts.pretrained_recall = measure("recall")
        recall = measure("recall") if step else self.texts.pretrained_recall
        moved = [now - before for now, before in zip(backbone_of(pl_module), self.start, strict=True)]
        self.rows.append(
            {
                "head_steps": self.head_steps,
                "step": step,
                "error": 1 - measure("accuracy"),
                "shifted_error": 1 - measure("shifted accuracy"),
                "drift": norm(moved) / self.size,
                "recall": recall,
                "lost_recall": self.texts.pretrained_recall - recall,
            }
        )


def backbone_of(module: Any) -> list[Tensor]:
    """Return the encoder's parameters."""
    return list(module.backbone.parameters())


def norm(tensors: Sequence[Tensor | None]) -> float:
    """Return the norm of all numbers of several tensors together.

    >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    5.0
    """
    norms = [torch.linalg.vector_norm(each.detach(), dtype=torch.float64) for each in tensors if each is not None]
    return float(torch.stack(norms).norm())


def train_head(head: str, seed: int, texts: Texts, bar: tqdm[Any]) -> list[Row]:
    """Fine-tune from one kind of head.

    Args:
        head: One of :data:`HEADS`.
        seed: Of the random head and of the rows.
        texts: Rows and setting.
        bar: Moves with every step.

    Returns:
        A row for step 0 of the backbone and for every step that is measured.
    """
    pl.seed_everything(seed, verbose=False)
    setting = texts.setting
    head_steps = setting.head_steps_of(head)
    watch = FirstSteps(texts, head_steps, bar)
    callbacks: list[pl.Callback] = [watch]
    if head == "zero":
        callbacks.append(ZeroInitHead("head"))
    if head == "head first":
        callbacks.append(FreezeSchedule.head_first("head", steps=head_steps))
    trainer = pl.Trainer(
        accelerator=setting.accelerator,
        devices=1,
        max_steps=setting.total_steps(head),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SentenceNet(0.1 if head == "random/10" else 1.0), texts.training(seed, head_steps=head_steps))
    return [{"head": head, "seed": seed, "first_gradient": watch.first_gradient, **row} for row in watch.rows]

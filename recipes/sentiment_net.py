"""The network of the main job: a sentence encoder with a head, on any rung of the ladder; and its use once trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from lightning_utilities.core.rank_zero import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_peft import AdapterMixin, ReplayMixin, adapter_disabled, merge_adapter, parameter_groups
from lightning_peft.adapters.peft_format import load_adapter, save_adapter
from lightning_peft.data.packaged import load_encoder, minilm
from lightning_peft.files import write_atomic, write_text
from lightning_peft.losses import in_batch_contrastive
from lightning_peft.recipes.sentiment_data import TOKENS, tokenize

ROWS_AT_ONCE = 16
LABELS = ("negative", "positive")
HEAD_RATE = 5e-3
LORA_PLUS = 4.0


class ReviewNet(pl.LightningModule):
    """A sentence encoder and a head: an ordinary LightningModule; what adapts it is mixed in below."""

    def __init__(self, model: str, lr: float, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = load_encoder(model)
        self.head = nn.Linear(self.backbone.config.hidden_size, len(LABELS))
        self.lr, self.steps = lr, steps
        self.accuracy = MulticlassAccuracy(len(LABELS), average="micro")

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return normalised sentence vectors, ``(rows, width)``: the mean of the last hidden state.

        Rows of like length go through the encoder together: padded to the longest of 32, a batch of these reviews is
        half padding.
        """
        order = tokens["attention_mask"].sum(1).argsort(stable=True)
        parts = [self._embed(tokens, rows) for rows in torch.split(order, ROWS_AT_ONCE)]
        return torch.cat(parts)[order.argsort()]

    def _embed(self, tokens: dict[str, Tensor], rows: Tensor) -> Tensor:
        mask = tokens["attention_mask"][rows]
        longest = int(mask.sum(1).max())
        mask = mask[:, :longest]
        hidden = self.backbone(input_ids=tokens["input_ids"][rows, :longest], attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    @override
    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(5 * self.embed(tokens))
        return logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("learn/train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch, "learn/")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch, "")

    def _score(self, batch: dict[str, Tensor], prefix: str) -> None:
        logits, labels = self(batch), batch["labels"]
        self.accuracy(logits, labels)
        self.log(f"{prefix}accuracy", self.accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log(f"{prefix}loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)

    @override
    def configure_optimizers(self) -> Any:
        probed = not any(parameter.requires_grad for parameter in self.backbone.parameters())
        groups = [{"params": list(self.head.parameters()), "lr": self.lr if probed else HEAD_RATE, "name": "head"}]
        groups += [] if probed else parameter_groups(self.backbone, lr=self.lr, lora_plus=LORA_PLUS)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        warm_up, steps = 20, self.steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class AdaptedReviewNet(ReplayMixin, AdapterMixin, ReviewNet):
    """The same network on any rung of the ladder, able to rehearse its old skill and to stay near what it was.

    Args:
        *args: Handed on to the network.
        rehearse: Weight of the contrastive loss on old pairs.
        anchor: Weight of the drift on random texts, 1 - cosine between embeddings now and pretrained. It needs no old
            data, and holds the network where nobody looks while it moves on reviews.
        **kwargs: Handed on to the mixins and the network.
    """

    def __init__(self, *args: Any, rehearse: float = 0.0, anchor: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rehearse, self.anchor = rehearse, anchor

    @override
    def replay_step(self, batch: tuple[dict[str, Tensor], ...]) -> Tensor:
        random_text = batch[2]
        loss = self.head.weight.new_zeros(())
        if self.rehearse:
            loss = loss + self.rehearse * in_batch_contrastive(*embed_pair(self, batch))
        if self.anchor:
            # The pretrained encoder is this one with the adapter switched off: no second copy is needed.
            with torch.no_grad(), adapter_disabled(self.backbone):
                pretrained = self.embed(random_text)
            drift = 1 - F.cosine_similarity(self.embed(random_text), pretrained).mean()
            self.log("replay/drift", drift)
            loss = loss + self.anchor * drift
        return loss


def embed_pair(module: ReviewNet, batch: tuple[dict[str, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Embed both sides of a batch of pairs: the step of both old skills."""
    return module.embed(batch[0]), module.embed(batch[1])


@rank_zero_only
def save_classifier(net: AdaptedReviewNet, folder: Path, model: str | None) -> None:
    """Write the adapter in PEFT's format, the head, and which base they belong to."""
    save_adapter(net.backbone, folder, base=model or "sentence-transformers/all-MiniLM-L6-v2")
    head = {key: value.detach().cpu().contiguous() for key, value in net.head.state_dict().items()}
    write_atomic(folder / "head.safetensors", lambda draft: save_file(head, draft))
    write_text(folder / "sentiment.json", json.dumps({"model": model, "labels": LABELS}))


class Classifier:
    """A trained sentiment classifier: the pretrained encoder, the adapter, the head.

    Args:
        folder: What :func:`save_classifier` wrote, for instance ``runs/sentiment/suite/adapter``.

    Raises:
        ValueError: If the folder does not hold a classifier.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

        folder = Path(folder)
        if not (folder / "sentiment.json").is_file():
            raise ValueError(
                f"Classifier: {str(folder)!r} holds no classifier. Run: lightning-peft sentiment --arms suite."
            )
        about = json.loads((folder / "sentiment.json").read_text(encoding="utf-8"))
        path = about["model"] or str(minilm())
        self.tokenizer, self.labels = AutoTokenizer.from_pretrained(path), about["labels"]
        self.net = ReviewNet(path, lr=0.0, steps=0).eval()
        load_adapter(self.net.backbone, folder)
        self.net.head.load_state_dict(load_file(folder / "head.safetensors"))

    @torch.no_grad()
    def __call__(self, texts: str | list[str]) -> list[str]:
        """Return the label of each text."""
        rows = [texts] if isinstance(texts, str) else texts
        return [self.labels[i] for i in self.net(tokenize(self.tokenizer, rows, TOKENS)).argmax(1).tolist()]

    def export(self, folder: str | Path) -> None:
        """Write the encoder with the adapter merged into it, as a plain transformers folder, and the head beside it."""
        plain: Any = merge_adapter(self.net.backbone, unload=True)
        plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.net.head.state_dict(), Path(folder) / "head.safetensors")

"""The head-only phase of ``schedules.py``: what it costs beyond a forward pass without gradients and the step of a head."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from schedule_arms import SEED
from schedule_runs import Clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

from lightning_peft.callbacks import FreezeSchedule, Phase

HAND = "hand-written loop"
WARM_UP = 2


@dataclass(frozen=True)
class Encoder:
    """A BERT of random weights, of the size of MiniLM, and its input."""

    hidden: int = 384
    layers: int = 6
    vocabulary: int = 30522
    rows: int = 16
    tokens: int = 64
    steps: int = 8
    """Steps of a round."""

    def batches(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the loader of token ids ``(rows, tokens)`` and labels."""
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(self.vocabulary, (self.steps * self.rows, self.tokens), generator=generator)
        return DataLoader(TensorDataset(ids, ids[:, 0] % 2), self.rows)


class Classifier(pl.LightningModule):
    """A head on the mean of an encoder's outputs.

    Args:
        size: The encoder's.
        no_grad: Whether the user wrote that the encoder runs without gradients, and gave the optimizer the head alone.
    """

    def __init__(self, size: Encoder, *, no_grad: bool = False) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        config = BertConfig(
            hidden_size=size.hidden, intermediate_size=4 * size.hidden, num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32, vocab_size=size.vocabulary,
        )  # fmt: skip
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(size.hidden, 2)
        self.size, self.no_grad = size, no_grad

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        with torch.set_grad_enabled(not self.no_grad):
            features = self.backbone(batch[0]).last_hidden_state.mean(1)
        return cross_entropy(self.head(features), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW((self.head if self.no_grad else self).parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the batches."""
        return self.size.batches()


def by_hand(size: Encoder) -> list[float]:
    """Return when every step of the plain loop began."""
    net = Classifier(size, no_grad=True)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1e-3)
    starts = []
    for ids, labels in size.batches():
        starts.append(time.perf_counter())
        with torch.no_grad():
            features = net.backbone(ids).last_hidden_state.mean(1)
        loss = cross_entropy(net.head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return starts


def by_trainer(size: Encoder, *callbacks: pl.Callback, no_grad: bool = False) -> list[float]:
    """Return when every step of a Trainer began."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, callbacks=[*callbacks, clock], default_root_dir=tempfile.gettempdir(),
        enable_checkpointing=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(size, no_grad=no_grad))
    return clock.starts


def head_only(size: Encoder) -> FreezeSchedule:
    """Return our schedule, in a head-only phase to the end of the round."""
    return FreezeSchedule([Phase(["head.*"], steps=size.steps + 1), Phase(["*"])])


HEAD_ARMS: dict[str, Callable[[Encoder], list[float]]] = {
    HAND: by_hand,
    "Trainer, the user's own no_grad": lambda size: by_trainer(size, no_grad=True),
    "ours": lambda size: by_trainer(size, head_only(size)),
}


def time_head_only(rounds: int, size: Encoder) -> dict[str, list[float]]:
    """Return the median seconds of a step, by arm and round; each round begins with another arm."""
    times: dict[str, list[float]] = {name: [] for name in HEAD_ARMS}
    names = list(HEAD_ARMS)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            starts = HEAD_ARMS[name](size)
            taken = [after - before for before, after in itertools.pairwise(starts)]
            times[name].append(statistics.median(taken[WARM_UP:]))
    return times

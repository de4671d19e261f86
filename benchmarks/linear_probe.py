"""An epoch of a linear probe whose features are cached, beside one that runs its frozen backbone in every step.

The job is the review job's: MiniLM, packaged reviews, a linear head on sentence vectors. The peer is Lightning's own
``BackboneFinetuning``, which never unfreezes here. Both train the same rows in the same order, validation included, in turns.
Then the cached run is compared with an uncached one of ours, weight by weight: dropout stays on under the peer, which makes it
another job.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer

from lightning_peft import LinearProbeMixin
from lightning_peft.data.packaged import minilm
from lightning_peft.files import write_text
from lightning_peft.recipes.sentiment_data import SentimentData
from lightning_peft.recipes.sentiment_net import ReviewNet

TARGET, CLOSE = 50.0, 1e-6
RATE = 1e-2


class PeerNet(ReviewNet):
    """Every parameter is the peer's to freeze; its optimizer begins with the head alone, as the peer asks."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=RATE)


class ProbedNet(LinearProbeMixin, ReviewNet):
    """Ours; the steps ask for features."""

    def features(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.embed(tokens)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(5 * self.features(tokens))
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=RATE)


class EpochSeconds(pl.Callback):
    """Notes how long each epoch takes, from its first batch to the end of its validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def loaders(count: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    data = SentimentData(AutoTokenizer.from_pretrained(str(minilm())), None, batch_size=32)
    return data.rows(data.train[:count], shuffle=True), data.val_dataloader()


def fitted(
    net: ReviewNet, rows: int, epochs: int, *callbacks: pl.Callback
) -> tuple[list[float], dict[str, Tensor], float]:
    """Return the seconds of each epoch, the head, and the validation accuracy."""
    clock = EpochSeconds()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    pl.seed_everything(1, verbose=False)
    trainer.fit(net, *loaders(rows))
    return clock.seconds, net.head.state_dict(), float(trainer.callback_metrics["learn/accuracy"])


def made(kind: type[ReviewNet], **options: Any) -> ReviewNet:
    pl.seed_everything(0, verbose=False)
    return kind(model=str(minilm()), lr=RATE, steps=1000, **options)


def measure(rows: int, rounds: int, epochs: int) -> dict[str, Any]:
    later: dict[str, list[float]] = {"cached": [], "BackboneFinetuning": []}
    first, ratios, accuracy = [], [], {}
    for _ in tqdm(range(rounds), desc="rounds"):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            ours, _, accuracy["cached"] = fitted(made(ProbedNet, feature_cache=folder), rows, epochs)
            first.append(time.perf_counter() - start - sum(ours[1:]))
        peer = BackboneFinetuning(unfreeze_backbone_at_epoch=10**6)
        theirs, _, accuracy["BackboneFinetuning"] = fitted(made(PeerNet), rows, 2, peer)
        later["cached"].append(statistics.median(ours[1:]))
        later["BackboneFinetuning"].append(theirs[1])
        ratios.append(theirs[1] / later["cached"][-1])
    few = min(rows, 320)
    heads = [fitted(made(ProbedNet, feature_cache=cache), few, 3)[1] for cache in (True, None)]
    return {
        "rows": rows,
        "rounds": rounds,
        "epochs": epochs,
        "threads": torch.get_num_threads(),
        "seconds of a later epoch": later,
        "ratios": ratios,
        "seconds until the second epoch": first,
        "accuracy": accuracy,
        "difference": max(float((heads[0][name] - heads[1][name]).abs().max()) for name in heads[0]),
    }


def show(found: dict[str, Any]) -> None:
    ratio, console = statistics.median(found["ratios"]), Console()
    table = Table(
        "target",
        "limit",
        "found",
        "",
        title=f"{found['rows']} reviews, {found['rounds']} rounds, {found['threads']} threads",
    )
    spread = f"{ratio:.0f} ({min(found['ratios']):.0f} to {max(found['ratios']):.0f})"
    table.add_row(
        "epoch >= 2: BackboneFinetuning / cached", f">= {TARGET:.0f}", spread, "ok" if ratio >= TARGET else "missed"
    )
    difference = found["difference"]
    table.add_row(
        "head, cached against uncached", f"<= {CLOSE:g}", f"{difference:.1e}", "ok" if difference <= CLOSE else "missed"
    )
    console.print(table)
    for name, seconds in found["seconds of a later epoch"].items():
        console.print(f"{name}: {statistics.median(seconds):.3f} s an epoch, accuracy {found['accuracy'][name]:.3f}")
    console.print(
        f"cached, all until the second epoch: {statistics.median(found['seconds until the second epoch']):.1f} s"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1600, help="training reviews (1600)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of the cached run (12)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/linear_probe.json"))
    options = parser.parse_args()
    found = measure(options.rows, options.rounds, options.epochs)
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()

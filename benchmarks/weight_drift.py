"""What watching costs: one look of WeightDrift and of GradientFlow, beside the training step.

A BERT of MiniLM's size (6 layers, width 384, 30,522 words) with a head, 16 x 64 tokens, AdamW, float32, on the CPU. The
callbacks' own hooks are timed within a Lightning run that trains all weights, so that steps and looks take turns on the
same machine: in every round some steps, of each the time outside the hooks, and one look. The fraction of a round is its look
and its bookkeeping of ``EVERY`` steps, over ``EVERY`` median steps of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from lightning_peft.callbacks.gradient_flow import GradientFlow
from lightning_peft.callbacks.weight_drift import WeightDrift
from lightning_peft.files import write_text

EVERY = 50
STEPS = 4
"""Steps of a round: a look of WeightDrift after the last, one of GradientFlow during it."""


class Reader(pl.LightningModule):
    """A BERT of MiniLM's size, of random weights, and a head that classifies its first token."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(384, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch of token ids, ``(rows, tokens)``."""
        features = self.backbone(input_ids=batch).last_hidden_state[:, 0]
        return nn.functional.cross_entropy(self.head(features), batch[:, 1] % 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all weights, which all decay."""
        return torch.optim.AdamW(self.parameters(), lr=2e-5, weight_decay=0.01)


class Clock(pl.Callback):
    """Take the time of every batch, and of what the watchers do in it."""

    def __init__(self, watchers: list[pl.Callback]) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.batches: list[dict[str, float]] = []
        hooks = ("on_before_optimizer_step", "_before_step", "_after_step", "on_train_batch_end")
        for watcher in watchers:
            for hook in hooks:
                if hook in vars(type(watcher)):
                    setattr(watcher, hook, self._timed(type(watcher).__name__, getattr(watcher, hook)))

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            hook(*arguments)
            self.spent[name] += time.perf_counter() - start

        return timed

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a batch."""
        self.spent.clear()
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End it; this callback comes last."""
        whole = time.perf_counter() - self._start
        self.batches.append({"step": whole - sum(self.spent.values()), **self.spent})


def measure(rounds: int) -> dict[str, Any]:
    """Return times of every round, in seconds, and fractions of the step."""
    pl.seed_everything(0, verbose=False)
    net, watchers = Reader(), [GradientFlow(STEPS, first=0), WeightDrift(STEPS)]
    clock = Clock(watchers)
    data = torch.randint(1, 30_000, (16 * STEPS * (rounds + 1), 64))
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=TensorBoardLogger(folder), enable_checkpointing=False,
            enable_model_summary=False, callbacks=[*watchers, clock],
        ).fit(net, DataLoader(data, 16))  # fmt: skip
    found = []
    for number in range(1, rounds + 1):  # the first round warms up
        batches = clock.batches[number * STEPS : (number + 1) * STEPS]
        step = statistics.median(batch["step"] for batch in batches)
        # GradientFlow looks at the first step of a round, WeightDrift after the last.
        idle = statistics.median(batch["WeightDrift"] for batch in batches[:-1])
        look, flow = batches[-1]["WeightDrift"] - idle, batches[0]["GradientFlow"]
        found.append(
            {
                "step": step, "drift_look": look, "drift_bookkeeping": idle, "flow_look": flow,
                "drift_of_step": (look + EVERY * idle) / (EVERY * step), "flow_of_step": flow / step,
            }
        )  # fmt: skip
    return {
        "rounds": found, "parameters": sum(p.numel() for p in net.parameters()), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "every": EVERY,
    }  # fmt: skip


def show(results: dict[str, Any]) -> None:
    """Print medians and quartiles."""
    rows = {
        "step, ms": ("step", 1e3),
        "WeightDrift: one look, ms": ("drift_look", 1e3),
        "WeightDrift: bookkeeping of a step, ms": ("drift_bookkeeping", 1e3),
        f"WeightDrift every {EVERY} steps, % of the steps": ("drift_of_step", 1e2),
        "GradientFlow: one look, ms": ("flow_look", 1e3),
        "GradientFlow: one look, % of a step": ("flow_of_step", 1e2),
    }
    table = Table(
        "", "median", "quartiles", title=f"{len(results['rounds'])} rounds, {results['parameters']:,} weights"
    )
    for title, (key, unit) in rows.items():
        low, middle, high = statistics.quantiles([unit * found[key] for found in results["rounds"]], n=4)
        table.add_row(title, f"{middle:.3g}", f"{low:.3g} - {high:.3g}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are measured (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/weight_drift.json"), help="the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options.rounds)
    write_text(options.out, json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()

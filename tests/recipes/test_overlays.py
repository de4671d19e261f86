"""The overlays put a technique on a module that knows nothing of it, and keep what its own config says."""

import sys
import types

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import LinearProbe, LoRA, adapted
from lightning_peft.callbacks import ForgettingEvaluation, FreezeSchedule, OldTask, ReplayMixing, ZeroInitHead
from lightning_peft.recipes import command, keep_what_it_knows
from lightning_peft.recipes.overlays import overlays
from tests.toy import Toy, rows, same, weights

ADAPTERS = {"lora": LoRA(rank=2), "linear_probe": LinearProbe()}


class Deep(Toy):
    """A toy whose layers are called as those of a BERT of twelve layers."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
        encoder = nn.Sequential()
        encoder.add_module("layer", layers)
        self.backbone = nn.Sequential(self.backbone)
        self.backbone.add_module("encoder", encoder)


class OldRows(Dataset):
    """Rows of the old task, as a class that YAML can name."""

    def __init__(self, seed: int = 3) -> None:
        self.rows = rows(20, seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        return self.rows[i]


def old_step(module, batch):
    return module(batch[0]), batch[1]


@pytest.fixture
def project(monkeypatch, tmp_path):
    """A user's project, in a folder with a config of its own."""
    found = types.ModuleType("my_project")
    found.MyModule, found.Deep, found.OldRows, found.OldTestRows = Toy, Deep, OldRows, OldRows
    found.Adapted, found.old_step = adapted(Toy), old_step
    old_step.__module__ = OldRows.__module__ = "my_project"
    monkeypatch.setitem(sys.modules, "my_project", found)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["my_train.py"])
    trainer = {"max_epochs": 4, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    stopping = {"monitor": "loss", "patience": 9, "check_on_train_epoch_end": True}
    own = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stopping}
    config = {"trainer": {**trainer, "enable_model_summary": False, "callbacks": [own]}, "seed_everything": 0}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    return found


def run(module: type, name: str, capsys, *more: str) -> LightningCLI:
    command.main(["recipes", "show", name])
    with open("overlay.yaml", "w") as file:
        file.write(capsys.readouterr().out)
    options = ["fit", "--config=mine.yaml", "--config=overlay.yaml", "--trainer.enable_checkpointing=false", *more]
    return LightningCLI(module, save_config_callback=None, args=options)


def added(cli: LightningCLI) -> list[type]:
    return [
        type(callback) for callback in cli.trainer.callbacks if type(callback).__module__.startswith("lightning_peft")
    ]


def test_the_list_names_every_overlay_with_one_sentence(capsys):
    command.main(["recipes"])
    printed = capsys.readouterr().out
    for name, text in overlays().items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert line.rstrip().endswith(".")
        assert set(yaml.safe_load(text)) <= {"trainer", "model"}
    assert {"head_first", "gradual_unfreeze", "lora", "linear_probe", "keep_what_it_knows"} == set(overlays())


def test_the_overlay_and_the_function_train_the_same_weights(project, capsys, fit):
    cli = run(Toy, "keep_what_it_knows", capsys)
    assert set(added(cli)) == {ZeroInitHead, FreezeSchedule, ReplayMixing, ForgettingEvaluation}
    assert any(isinstance(callback, EarlyStopping) for callback in cli.trainer.callbacks)
    pl.seed_everything(0, verbose=False)
    net = Toy()
    task = OldTask(OldRows(), MulticlassAccuracy(num_classes=2), old_step)
    fit(net, *keep_what_it_knows(memory=OldRows(), old_tasks={"old": task}), epochs=4)
    assert same(weights(net), weights(cli.model))
    assert not torch.equal(net.head.weight, torch.zeros_like(net.head.weight))


@pytest.mark.parametrize(("name", "module"), [("head_first", Toy), ("gradual_unfreeze", Deep)])
def test_a_schedule_comes_on_top_of_the_user_s_own_callbacks(project, capsys, name, module):
    cli = run(module, name, capsys)
    assert FreezeSchedule in added(cli)
    assert any(isinstance(callback, EarlyStopping) for callback in cli.trainer.callbacks)


def test_gradual_unfreezing_frees_more_every_epoch(project, capsys):
    counts = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                counts.append([p.requires_grad for _, p in sorted(pl_module.named_parameters())].count(True))

    cli = run(Deep, "gradual_unfreeze", capsys)
    trainer = pl.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[*cli.trainer.callbacks[:2], Watch()],
    )  # fmt: skip
    trainer.fit(Deep())
    assert counts == [2, 2 + 8, 2 + 24, 2 + 24 + 4]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_comes_from_the_overlay(project, capsys, name):
    more = ["--model.adapter.init_args.rank=2"] if name == "lora" else []  # the toy is too small for rank 8
    cli = run(project.Adapted, name, capsys, *more)
    assert cli.model.adapter == ADAPTERS[name]
    assert cli.model.adapted_network is cli.model.backbone
    assert not cli.model.backbone[0].weight.requires_grad

"""Keys, loggers and the TensorBoard page."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import LoRA, LoRAMixin
from lightning_peft.callbacks import ForgettingEvaluation, FreezeSchedule, OldTask, ReplayMixing
from lightning_peft.logging import check_key
from tests.toy import Toy, rows


class LoRAToy(LoRAMixin, Toy): ...


def old_step(module, batch):
    return module(batch[0]), batch[1]


def callbacks(*names):
    task = OldTask(rows(20, seed=3), MulticlassAccuracy(num_classes=2), old_step)
    return [
        FreezeSchedule.head_first("head", steps=2),
        ReplayMixing(rows(20, seed=3), ratio=0.25),
        *(ForgettingEvaluation({name: task}, every_n_epochs=1) for name in names),
    ]


def train(fit, names=("old", "older"), **options):
    return fit(LoRAToy(adapter=LoRA(rank=2)), *callbacks(*names), epochs=2, **options)


@pytest.mark.parametrize("key", ["forgetting", "forgetting/", "forgotten/old", "/old"])
def test_a_key_outside_the_grammar_is_refused(key):
    with pytest.raises(ValueError, match="must be family/name"):
        check_key(key)


def test_all_callbacks_share_one_page_and_every_chart_has_its_curve(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    train(fit, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (config,) = events.Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    charts = {
        f"{category.title}: {chart.title}": list(chart.multiline.tag)
        for category in page.category
        for chart in category.chart
    }
    assert charts == {
        "What trains: parameters": ["schedule/trainable_parameters"],
        "What trains: phase": ["schedule/phase"],
        "Replay: share of old rows": ["replay/ratio"],
        "Old tasks: forgetting": ["forgetting/old", "forgetting/older"],
        "Old tasks: retained": ["retained/old", "retained/older"],
    }
    curves = set(events.Tags()["scalars"])
    assert {key for keys in charts.values() for key in keys} <= curves


def test_every_logger_gets_every_value(fit, tmp_path):
    loggers = [
        CSVLogger(tmp_path, name="", version="csv"),
        TensorBoardLogger(tmp_path, name="", version="one", default_hp_metric=False),
        TensorBoardLogger(tmp_path, name="", version="two", default_hp_metric=False),
    ]
    train(fit, logger=loggers)
    header = set((tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {"forgetting/old", "schedule/phase", "adapter/trainable_parameters"} <= header
    for version in ("one", "two"):
        tags = EventAccumulator(str(tmp_path / version)).Reload().Tags()
        assert header - {"step", "epoch"} <= set(tags["scalars"])
        assert tags["tensors"] == ["custom_scalars__config__"]


def test_a_second_fit_with_the_same_logger_does_not_write_the_page_twice(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    train(fit, logger=logger)
    train(fit, logger=logger)
    assert len(EventAccumulator(str(tmp_path / "run")).Reload().Tensors("custom_scalars__config__")) == 1


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}, {"limit_train_batches": 2}])
def test_it_trains_without_loggers_and_in_short_runs(fit, options):
    trainer = train(fit, **options)
    assert torch.isfinite(trainer.callback_metrics["forgetting/old"])


@pytest.mark.filterwarnings("ignore:.*barebones")
def test_it_trains_barebones(fit):
    train(fit, barebones=True, logger=None, enable_checkpointing=None, enable_progress_bar=None,
          enable_model_summary=None)  # fmt: skip


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_it_trains_on_overfit_batches_without_replay(fit):
    schedule, _, forgetting = callbacks("old")
    trainer = fit(LoRAToy(adapter=LoRA(rank=2)), schedule, forgetting, epochs=2, overfit_batches=1)
    assert "forgetting/old" in trainer.callback_metrics

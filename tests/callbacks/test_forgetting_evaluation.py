"""Old tasks are measured without a trace in the training, and the drop counts from before it."""

import copy
import csv
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_peft import LoRA, add_adapter
from lightning_peft.callbacks import ForgettingEvaluation, OldTask
from lightning_peft.callbacks.forgetting_report import draw_learned
from tests.old_tasks import OLD, Noisy, accuracy, error, expected_accuracy, expected_error, regress
from tests.toy import StepsTwice, Toy, rows, same, weights


class Watch(pl.Callback):
    """Writes down what can be monitored after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({key: float(value) for key, value in trainer.callback_metrics.items() if "/" in key})


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_bit_identical_with_and_without_it(fit, workers):
    nets = []
    for callbacks in (
        [],
        [ForgettingEvaluation({"a": accuracy(DataLoader(OLD, 7, num_workers=workers)), "b": error()}, every_n_steps=3)],
    ):
        pl.seed_everything(5, verbose=False)
        nets.append(Noisy())
        fit(nets[-1], *callbacks, epochs=2)
    assert same(weights(nets[0]), weights(nets[1]))
    assert nets[0].modes == nets[1].modes


def test_a_frozen_batch_norm_in_eval_keeps_its_statistics_and_its_mode_through_a_run(fit):
    net = Noisy()
    frozen = weights(net.backbone[4])
    fit(net, ForgettingEvaluation({"old": accuracy()}, every_n_steps=1), steps=4)
    assert same(weights(net.backbone[4]), frozen)
    assert [modes["backbone.4"] for modes in net.modes] == [False] * 4
    assert [modes["backbone.1"] for modes in net.modes] == [True] * 4


def test_the_drop_is_before_minus_after_and_turned_round_where_lower_is_better(fit, net):
    before = expected_accuracy(net), expected_error(net)
    measure = ForgettingEvaluation({"a": accuracy(), "e": error()})
    trainer = fit(net, measure, epochs=3)
    after = expected_accuracy(net), expected_error(net)
    assert before != after
    assert measure.before == pytest.approx(dict(zip("ae", before, strict=True)), rel=1e-5)
    assert measure.after == pytest.approx(dict(zip("ae", after, strict=True)), rel=1e-5)
    assert measure.forgetting["a"] == pytest.approx(before[0] - after[0], abs=1e-5)
    assert measure.forgetting["e"] == pytest.approx(after[1] - before[1], abs=1e-5)
    assert float(trainer.callback_metrics["forgetting/e"]) == pytest.approx(after[1] - before[1], abs=1e-5)
    assert float(trainer.callback_metrics["retained/a"]) == pytest.approx(after[0], abs=1e-5)


def test_nothing_is_forgotten_while_nothing_learns(fit, net):
    net.lr = 0.0
    measure = ForgettingEvaluation({"a": accuracy(), "e": error()}, every_n_steps=1)
    fit(net, measure)
    assert measure.forgetting == {"a": 0.0, "e": 0.0}


def test_a_second_fit_that_begins_earlier_is_measured_to_its_end(fit, tmp_path):
    fit(Toy(), steps=2).save_checkpoint(tmp_path / "two.ckpt")
    measure = ForgettingEvaluation({"old": accuracy()})
    fit(Toy(), measure, steps=6)
    fit(Toy(), measure, steps=6, ckpt_path=tmp_path / "two.ckpt")
    assert [entry["step"] for entry in measure.history] == [0, 6, 6]


def test_no_interval_is_skipped_where_steps_jump(fit):
    measure = ForgettingEvaluation({"old": accuracy()}, every_n_steps=3)
    fit(StepsTwice(), measure, epochs=2)
    assert [entry["step"] for entry in measure.history] == [0, 4, 6, 10, 12, 16]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 8]),
        ({"every_n_steps": 3}, [0, 3, 6, 8]),
        ({"every_n_steps": 4}, [0, 4, 8]),
        ({"every_n_epochs": 1}, [0, 4, 8]),
        ({"every_n_epochs": 2}, [0, 8]),
    ],
)
def test_the_log_has_both_curves_at_the_start_in_between_and_at_the_end(fit, net, tmp_path, options, steps):
    logger = CSVLogger(tmp_path, name="", version="")
    measure = ForgettingEvaluation({"old": accuracy(), "error": error()}, **options)
    fit(net, measure, epochs=2, logger=logger, log_every_n_steps=100)
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        lines = [line for line in csv.DictReader(stream) if line["retained/old"]]
    assert [int(line["step"]) for line in lines] == steps
    for name in ("old", "error"):
        assert float(lines[0][f"forgetting/{name}"]) == 0.0
        assert float(lines[0][f"retained/{name}"]) == pytest.approx(measure.before[name])
        assert float(lines[-1][f"retained/{name}"]) == pytest.approx(measure.after[name])
        assert float(lines[-1][f"forgetting/{name}"]) == pytest.approx(measure.forgetting[name])


def test_steps_are_optimizer_steps_also_where_gradients_accumulate(fit, net, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    measure = ForgettingEvaluation({"old": accuracy()}, every_n_steps=1)
    fit(net, measure, epochs=2, accumulate_grad_batches=2, logger=logger)
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        assert [int(line["step"]) for line in csv.DictReader(stream) if line["retained/old"]] == [0, 1, 2, 3, 4]


def test_values_can_be_monitored_from_the_first_step_on(fit, net, tmp_path):
    watch = Watch()
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="forgetting/error", every_n_train_steps=1)
    fit(net, ForgettingEvaluation({"error": error()}, every_n_steps=2), watch, best, steps=4)
    assert [set(step) for step in watch.steps] == [{"retained/error", "forgetting/error"}] * 4
    assert watch.steps[0]["forgetting/error"] == 0.0
    assert watch.steps[1] != watch.steps[0]
    assert watch.steps[2] == watch.steps[1]
    assert float(best.best_model_score) == min(step["forgetting/error"] for step in watch.steps)


def test_a_resumed_run_keeps_its_baseline(fit, tmp_path):
    def run(**options):
        net, measure = Toy(), ForgettingEvaluation({"a": accuracy(), "e": error()})
        save = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        fit(net, measure, save, **options)
        return net, measure

    _, whole = run(steps=6)
    before = dict(whole.before)
    resumed_net, resumed = run(steps=8, ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.before == before
    assert resumed.after["e"] == pytest.approx(expected_error(resumed_net), rel=1e-5)
    assert resumed.forgetting["e"] == pytest.approx(expected_error(resumed_net) - before["e"], abs=1e-5)


class SavesAt(pl.Callback):
    def __init__(self, step: int, path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_run_that_resumes_after_its_last_step_is_measured_at_its_end_too(fit, tmp_path):
    whole, again = (ForgettingEvaluation({"a": accuracy(), "b": error()}, every_n_steps=3) for _ in range(2))
    fit(Toy(), whole, SavesAt(8, tmp_path / "last.ckpt"), max_steps=8, epochs=-1)
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    fit(Toy(), again, max_steps=8, epochs=-1, ckpt_path=tmp_path / "last.ckpt", logger=logger)
    assert [entry["step"] for entry in whole.history] == [0, 3, 6, 8]
    assert again.history == whole.history
    assert json.loads((tmp_path / "logs" / "forgetting.json").read_text())["after"] == whole.after


def test_the_state_makes_a_second_object_equal(fit, net):
    first = ForgettingEvaluation({"a": accuracy()}, every_n_steps=2)
    fit(net, first)
    second = ForgettingEvaluation({"a": accuracy()}, every_n_steps=2)
    second.load_state_dict(first.state_dict())
    assert second.before == first.before
    assert second.forgetting == first.forgetting
    assert second.state_dict() == first.state_dict()


def test_another_run_with_the_same_callback_has_a_baseline_of_its_own(fit):
    measure = ForgettingEvaluation({"e": error()})
    for _ in range(2):
        net = Toy()
        before = expected_error(net)
        fit(net, measure)
        assert measure.before["e"] == pytest.approx(before, rel=1e-5)


def test_a_trainer_that_fits_on_keeps_the_baseline(trainer, net):
    measure = ForgettingEvaluation({"e": error()})
    before = expected_error(net)
    made = trainer(measure, epochs=1)
    made.fit(net)
    made.fit_loop.max_epochs = 2
    made.fit(net)
    assert measure.before["e"] == pytest.approx(before, rel=1e-5)
    assert measure.forgetting["e"] == pytest.approx(expected_error(net) - before, abs=1e-5)


def head_sum(module, batch):
    return module.head.weight[0].sum().detach().reshape(1), torch.zeros(1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: EMAWeightAveraging(decay=0.5, update_starting_at_step=6),
        lambda: EMAWeightAveraging(decay=0.5, update_starting_at_step=100),
        lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1),
    ],
    ids=["from the start", "late", "never", "stochastic"],
)
def test_the_last_value_is_of_the_weights_that_training_ends_with(fit, net, average, first):
    """The task's error is the square of a sum of weights, so the module itself tells what it must be."""
    measure = ForgettingEvaluation({"sum": OldTask(rows(4), MeanSquaredError(), head_sum)}, every_n_epochs=1)
    fit(net, *([measure, average()] if first else [average(), measure]), epochs=3)
    assert measure.after["sum"] == pytest.approx(net.head.weight[0].sum().item() ** 2, rel=1e-5)


def test_two_callbacks_with_different_tasks_stand_side_by_side(fit, net, tmp_path):
    both = [ForgettingEvaluation({"a": accuracy()}), ForgettingEvaluation({"e": error()}, every_n_epochs=1)]
    assert both[0].state_key != both[1].state_key
    trainer = fit(net, *both)
    assert {"forgetting/a", "forgetting/e"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_old_rows_have_the_dtype_of_the_run(fit, precision):
    net, measure = Toy(), ForgettingEvaluation({"a": accuracy()})
    fit(net, measure, steps=2, precision=precision)
    assert 0 <= measure.after["a"] <= 1


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_measures_the_same_before_and_after_a_fit(fit, twin):
    original, results = ForgettingEvaluation({"e": error()}, every_n_steps=2), []
    for callback in (twin(original), original, None):
        pl.seed_everything(5, verbose=False)
        measure = callback or twin(original)
        fit(Toy(), measure)
        results.append(measure.state_dict())
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "tasks={} must be at least one OldTask, each with a name"),
        ({"": error()}, {}, "must be at least one OldTask, each with a name"),
        (
            {"old": (OLD, MeanSquaredError(), regress)},
            {},
            r"'old' is a tuple; wrap it as OldTask\(data, metric, step\)",
        ),
        (None, {"every_n_steps": 0}, "every_n_steps=0 must be a whole number of at least 1"),
        (None, {"every_n_epochs": -1}, "every_n_epochs=-1 must be a whole number"),
        (None, {"every_n_steps": 1.5}, "every_n_steps=1.5 must be a whole number"),
        (None, {"every_n_steps": 1, "every_n_epochs": 1}, "exclude each other; give one"),
    ],
)
def test_bad_arguments_are_refused_at_once(tasks, options, message):
    with pytest.raises(ValueError, match=f"ForgettingEvaluation: .*{message}|ForgettingEvaluation: {message}"):
        ForgettingEvaluation({"old": error()} if tasks is None else tasks, **options)


def test_a_step_that_the_metric_cannot_use_is_refused_before_the_first_step(fit, net):
    start, watch = weights(net), Watch()
    task = OldTask(OLD, MeanSquaredError(), lambda module, batch: None)
    with pytest.raises(ValueError, match="OldTask: the step of 'old' returned None"):
        fit(net, ForgettingEvaluation({"old": task}), watch)
    assert watch.steps == []
    assert same(weights(net), start)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_what_would_take_too_much_of_the_time_is_left_out(fit, net, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lightning_peft.callbacks.time_share.time", clock)

    class Trains(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clock.now += 1.0

    measuring = ForgettingEvaluation({"a": accuracy()}, every_n_steps=1, max_fraction_of_time=0.25)

    def slow(trainer, pl_module, tasks):
        clock.now += 2.0
        return {"a": 0.5}

    monkeypatch.setattr("lightning_peft.callbacks.forgetting_evaluation.measure", slow)
    fit(net, Trains(), measuring, epochs=4)
    # Two seconds are a quarter of eight: six of training must have passed. The last one is always made.
    assert [entry["step"] for entry in measuring.history] == [0, 6, 12, 16]


def test_a_share_of_the_time_is_one():
    for share in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=rf"max_fraction_of_time={share} must lie in \(0, 1\]"):
            ForgettingEvaluation({"a": accuracy()}, max_fraction_of_time=share)


def test_with_adapters_off_the_old_network_answers(fit):
    net = Toy()
    first = expected_accuracy(net)
    add_adapter(net.backbone, LoRA(rank=2, targets=["*"]))
    net.head.requires_grad_(False)
    net.lr = 1.0
    trainer = fit(net, ForgettingEvaluation({"a": accuracy()}, adapter_off=True), epochs=3)
    assert float(trainer.callback_metrics["retained/a/adapter_off"]) == pytest.approx(first)
    assert float(trainer.callback_metrics["retained/a"]) != pytest.approx(first)
    with pytest.raises(ValueError, match="adapter_off=True, but Toy has no adapter"):
        fit(Toy(), ForgettingEvaluation({"a": accuracy()}, adapter_off=True))


def test_the_summary_and_the_picture_tell_the_run(fit, net, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    measuring = ForgettingEvaluation({"a": accuracy()}, every_n_epochs=1, learned="loss")
    fit(net, measuring, epochs=2, logger=logger)
    summary = json.loads((tmp_path / "forgetting.json").read_text())
    assert summary["before"] == measuring.before
    assert summary["forgetting"] == measuring.forgetting
    assert [entry["step"] for entry in summary["history"]] == [0, 4, 8]
    assert [entry["learned"] is None for entry in summary["history"]] == [True, False, False]
    logger.experiment.flush()
    pictures = EventAccumulator(str(tmp_path)).Reload().Tags()["images"]
    assert "forgetting/learned" in pictures
    axes = draw_learned(measuring.history, "loss").axes[0]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [entry["forgetting"]["a"] for entry in measuring.history[1:]]


def test_what_was_learned_is_not_told_of_weights_that_were_put_in_at_the_end(fit, net):
    measuring = ForgettingEvaluation({"a": accuracy()}, every_n_epochs=1, learned="loss")
    fit(net, measuring, EMAWeightAveraging(decay=0.5), epochs=2)
    assert [entry["learned"] is None for entry in measuring.history] == [True, False, False, True]

"""Old tasks are measured without a trace in the training, and the drop counts from before it."""

import copy
import csv
import pickle
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric, MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.callbacks import ForgettingEvaluation, OldTask
from lightning_peft.callbacks.forgetting_evaluation import evaluate
from tests.toy import Toy, rows, same, weights

OLD = rows(50, seed=9)


class Noisy(Toy):
    """Everything that a careless evaluation would disturb: dropout, running statistics, a frozen layer in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8)
        )
        self.backbone[4].eval().requires_grad_(False)
        self.modes: list[dict[str, bool]] = []

    def training_step(self, batch, batch_idx):
        self.modes.append({name: child.training for name, child in self.named_modules()})
        return super().training_step(batch, batch_idx)


def classify(module, batch):
    x, y = batch
    return module(x).argmax(1), y


def regress(module, batch):
    x, y = batch
    return module(x)[:, 1], y.to(x)


def accuracy(data=OLD, step=classify) -> OldTask:
    return OldTask(data, MulticlassAccuracy(num_classes=2, average="micro"), step)


def error(data=OLD) -> OldTask:
    return OldTask(data, MeanSquaredError(), regress)


def expected_accuracy(net: nn.Module) -> float:
    twin = copy.deepcopy(net).eval()
    x, y = OLD.tensors
    with torch.no_grad():
        return float((twin(x.to(next(twin.parameters()))).argmax(1) == y).double().mean())


def expected_error(net: nn.Module) -> float:
    twin = copy.deepcopy(net).eval().double()
    x, y = OLD.tensors
    with torch.no_grad():
        return float((twin(x.double())[:, 1] - y).square().mean())


class Watch(pl.Callback):
    """Writes down what can be monitored after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({key: float(value) for key, value in trainer.callback_metrics.items() if "/" in key})


class Dicey(Dataset):
    """Rows that draw from every generator there is."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.randn(4) + random.random() + np.random.rand(), index % 2


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


def test_rows_that_draw_random_numbers_leave_every_generator_where_it_was(net):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    evaluate(net, accuracy(Dicey()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_gives_back_the_mode_of_every_single_module(mode):
    net = Noisy()
    net.train(mode)
    net.backbone[4].train(not mode)
    before = {name: child.training for name, child in net.named_modules()}
    evaluate(net, accuracy())
    assert {name: child.training for name, child in net.named_modules()} == before


def test_a_step_that_fails_gives_back_the_modes_too():
    def step(module, batch):
        raise RuntimeError("broken")

    net = Noisy()
    before = {name: child.training for name, child in net.named_modules()}
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(net, accuracy(step=step))
    assert {name: child.training for name, child in net.named_modules()} == before


def test_a_frozen_batch_norm_in_eval_keeps_its_statistics_and_its_mode_through_a_run(fit):
    net = Noisy()
    frozen = weights(net.backbone[4])
    fit(net, ForgettingEvaluation({"old": accuracy()}, every_n_steps=1), steps=4)
    assert same(weights(net.backbone[4]), frozen)
    assert [modes["backbone.4"] for modes in net.modes] == [False] * 4
    assert [modes["backbone.1"] for modes in net.modes] == [True] * 4


def test_evaluation_runs_in_eval_mode_without_gradients_and_leaves_those_that_are_there(net):
    flags = []

    def step(module, batch):
        flags.append((module.training, torch.is_grad_enabled()))
        return classify(module, batch)

    net.head.weight.grad = torch.ones_like(net.head.weight)
    evaluate(net, accuracy(step=step))
    assert set(flags) == {(False, False)}
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))


@pytest.mark.parametrize("data", [OLD, DataLoader(OLD, 7), DataLoader(OLD, 7, shuffle=True, drop_last=True)])
def test_the_value_is_that_of_all_rows_however_they_are_batched(net, data):
    assert evaluate(net, accuracy(data)) == pytest.approx(expected_accuracy(net), abs=1e-6)
    assert evaluate(net, error(data)) == pytest.approx(expected_error(net), rel=1e-5)


def test_an_evaluation_does_not_remember_the_one_before(net):
    task = accuracy()
    task.metric.update(torch.zeros(500, dtype=torch.long), torch.ones(500, dtype=torch.long))
    assert evaluate(net, task) == evaluate(net, task) == pytest.approx(expected_accuracy(net), abs=1e-6)


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


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_the_direction_may_be_given_where_the_metric_does_not_say(higher, sign):
    assert OldTask(OLD, MeanMetric(), regress, higher_is_better=higher).sign == sign
    assert accuracy().sign == 1
    assert error().sign == -1
    assert OldTask(OLD, MeanSquaredError(), regress, higher_is_better=True).sign == 1


def test_nothing_is_forgotten_while_nothing_learns(fit, net):
    net.lr = 0.0
    measure = ForgettingEvaluation({"a": accuracy(), "e": error()}, every_n_steps=1)
    fit(net, measure)
    assert measure.forgetting == {"a": 0.0, "e": 0.0}


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


class Stream(IterableDataset):
    def __iter__(self):
        return iter(OLD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": []}, "OldTask: data: the list is empty"),
        ({"data": Stream()}, "OldTask: data: Stream has no length"),
        ({"data": DataLoader(Stream(), 4)}, "OldTask: data: Stream has no length"),
        ({"step": None}, r"OldTask: step=None must be a function of \(module, batch\)"),
        ({"step": "classify"}, r"OldTask: step='classify' must be a function of \(module, batch\)"),
        ({"step": lambda batch: batch}, r"OldTask: step=<function .* must be a function of \(module, batch\)"),
        ({"metric": torch.mean}, "OldTask: metric=<built-in method mean .* must be a torchmetrics Metric"),
        ({"metric": MeanMetric()}, "MeanMetric does not say whether higher is better. Pass higher_is_better="),
    ],
)
def test_an_old_task_that_cannot_be_measured_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        OldTask(**{"data": OLD, "metric": MeanSquaredError(), "step": regress, **arguments})


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "tasks={} is empty; give at least one OldTask by name"),
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


class Both(Metric):
    """A metric of two numbers."""

    higher_is_better = True

    def update(self, first, second):
        pass

    def compute(self):
        return torch.ones(2)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            OldTask(OLD, MeanSquaredError(), lambda module, batch: None),
            "the step of 'old' returned None; it must return",
        ),
        (
            OldTask(OLD, MeanSquaredError(), lambda module, batch: module(batch[0])),
            "the step of 'old' .*MeanSquaredError.update",
        ),
        (
            OldTask(OLD, MeanSquaredError(), lambda module, batch: (module(batch[0]), batch[1])),
            "the step of 'old' .*MeanSquaredError.update",
        ),
        (OldTask(OLD, Both(), regress), "Both of 'old' gives 2 values; it must give one number"),
    ],
    ids=["nothing", "too few", "shapes", "two numbers"],
)
def test_a_step_that_the_metric_cannot_use_is_refused_before_the_first_step(fit, net, task, message):
    start, watch = weights(net), Watch()
    with pytest.raises(ValueError, match=f"ForgettingEvaluation: .*{message}|ForgettingEvaluation: {message}"):
        fit(net, ForgettingEvaluation({"old": task}), watch)
    assert watch.steps == []
    assert same(weights(net), start)

"""An old task is measured without a trace, on all rows, in the metric's own unit."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric, MeanSquaredError, Metric

from lightning_peft.callbacks import OldTask
from lightning_peft.old_task import evaluate
from tests.old_tasks import OLD, Noisy, accuracy, classify, error, expected_accuracy, expected_error, regress


class Dicey(Dataset):
    """Rows that draw from every generator there is."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.randn(4) + random.random() + np.random.rand(), index % 2


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


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_the_direction_may_be_given_where_the_metric_does_not_say(higher, sign):
    assert OldTask(OLD, MeanMetric(), regress, higher_is_better=higher).sign == sign
    assert accuracy().sign == 1
    assert error().sign == -1
    assert OldTask(OLD, MeanSquaredError(), regress, higher_is_better=True).sign == 1


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
def test_a_step_that_the_metric_cannot_use_is_refused(net, task, message):
    with pytest.raises(ValueError, match=f"OldTask: .*{message}|OldTask: {message}"):
        evaluate(net, task, name="old")

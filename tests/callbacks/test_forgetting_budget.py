"""A limit on forgetting is kept, the same on a resumed run, and what is reported is not what is guarded."""

import copy
import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.callbacks import ExactResume, ForgettingEvaluation, OldTask, ReplayMixing
from lightning_peft.callbacks.forgetting_budget import ForgettingBudget
from lightning_peft.data.ratio_controller import RatioController
from tests.old_tasks import accuracy
from tests.toy import StepsTwice, Toy, same, weights


def points(count, seed, *, turned=False):
    """Two classes in the plane; turned, the labels are the other way round in one half of it."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    x[:, 1] = -x[:, 1].abs() if turned else x[:, 1].abs()
    y = (x[:, 0] > 0).long()
    return TensorDataset(x, 1 - y if turned else y)


class Planes(pl.LightningModule):
    """Learns the turned half and forgets the other, unless it is replayed."""

    def __init__(self, lr=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        self.lr = lr
        self.settle()

    def settle(self):
        x, y = points(400, 1).tensors
        optimizer = torch.optim.Adam(self.net.parameters(), 0.05)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            optimizer.step()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("learn/new", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def train_dataloader(self):
        return DataLoader(points(320, 2, turned=True), 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(points(100, 3, turned=True), 100)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), self.lr)


def old(seed=4, count=200):
    return OldTask(points(count, seed), MulticlassAccuracy(2), lambda module, batch: (module(batch[0]), batch[1]))


def replay():
    return ReplayMixing(points(400, 1), 0.1)


def drop(before, net):
    x, y = points(1000, 9).tensors
    return before - float((net(x).argmax(1) == y).float().mean())


def test_the_controller_is_its_formula():
    controller, excess, ratio = RatioController(first=0.3, gain=0.8, target=0.6, smoothing=0.25), None, 0.3
    for used in (2.0, -1.0, 0.5, 9.0, 0.0, 0.0, -3.0):
        excess = used if excess is None else 0.25 * used + 0.75 * excess
        odds = ratio / (1 - ratio) * math.exp(0.8 * min(max(excess - 0.6, -1), RatioController.limit))
        ratio = min(max(odds / (1 + odds), 0.005), 0.75)
        assert controller.update(used) == pytest.approx(ratio, rel=1e-12)
    twin = RatioController()
    twin.load_state_dict(controller.state_dict())
    assert twin.update(1.0) != controller.ratio
    twin.gain, twin.target, twin.smoothing = 0.8, 0.6, 0.25
    twin.load_state_dict(controller.state_dict())
    assert twin.update(1.0) == controller.update(1.0)


def test_the_ratio_follows_what_is_used_and_the_budget_is_kept(fit):
    free, kept = Planes(), Planes()
    before = drop(1.0, free)
    fit(free, epochs=6, limit_val_batches=0)
    budget, mixing = ForgettingBudget(0.05, tasks={"old": old()}), replay()
    fit(kept, mixing, budget, epochs=6, limit_val_batches=0)
    assert drop(1 - before, free) > 0.1
    assert drop(1 - before, kept) < 0.05
    assert [entry["step"] for entry in budget.history] == [20, 40, 60, 80, 100, 120]
    assert [change[1] for change in mixing.ratio.changes[1:]] == [entry["ratio"] for entry in budget.history]
    steady = RatioController()
    assert [steady.update(entry["used"]["old"]) for entry in budget.history] == [e["ratio"] for e in budget.history]


def test_no_interval_is_skipped_where_steps_jump(fit):
    budget = ForgettingBudget(1.0, tasks={"old": accuracy()}, action="warn", every_n_steps=3)
    fit(StepsTwice(), budget, epochs=2)
    assert [entry["step"] for entry in budget.history] == [4, 6, 10, 12, 16]


def test_a_second_fit_that_begins_earlier_is_measured_again(fit, tmp_path):
    fit(Toy(), steps=2).save_checkpoint(tmp_path / "two.ckpt")
    budget = ForgettingBudget(1.0, tasks={"old": accuracy()}, action="warn", every_n_steps=3)
    fit(Toy(), budget, epochs=3)
    fit(Toy(), budget, epochs=2, ckpt_path=tmp_path / "two.ckpt")
    assert [entry["step"] for entry in budget.history] == [3, 6, 9, 12, 3, 6]


def test_a_second_fit_goes_back_to_no_weights_of_the_first(fit, tmp_path):
    start = fit(Planes(), steps=2, limit_val_batches=0)
    start.save_checkpoint(tmp_path / "two.ckpt")
    budget = ForgettingBudget(0.5, tasks={"old": old()}, action="rollback", every_n_steps=3)
    fit(Planes(), budget, steps=6, limit_val_batches=0)
    assert budget.best is not None
    budget._used = lambda values: {"old": 2.0}  # from now on nothing is inside
    with pytest.warns(UserWarning, match="at no measurement were all drops inside their limits"):
        fit(Planes(), budget, steps=6, limit_val_batches=0, ckpt_path=tmp_path / "two.ckpt")


def test_of_several_tasks_the_one_that_has_used_up_most_decides(fit):
    tasks = {"old": old(), "safety": old(seed=5)}
    budget = ForgettingBudget({"old": 0.5, "safety": 0.01}, tasks=tasks, every_n_steps=10)
    made = fit(Planes(), replay(), budget, limit_val_batches=0)
    steady = RatioController()
    for entry in budget.history:
        assert entry["ratio"] == steady.update(max(entry["used"].values()))
    assert float(made.callback_metrics["budget/safety"]) == pytest.approx(budget.history[-1]["used"]["safety"])


def test_a_limit_that_is_passed_stops_the_run(fit):
    budget = ForgettingBudget(0.05, tasks={"old": old()}, action="stop", every_n_steps=5)
    made = fit(Planes(), budget, epochs=6, limit_val_batches=0)
    assert made.global_step < 120
    assert budget.history[-1]["used"]["old"] > 1
    assert all(entry["used"]["old"] <= 1 for entry in budget.history[:-1])


def test_a_limit_that_is_passed_is_said_once(fit):
    budget = ForgettingBudget(0.05, tasks={"old": old()}, action="warn", every_n_steps=5)
    with pytest.warns(UserWarning, match="'old' has lost .* of at most 0.05 at step") as said:
        fit(Planes(), budget, epochs=3, limit_val_batches=0)
    assert sum("has lost" in str(one.message) for one in said) == 1


class Remembers(pl.Callback):
    """Keeps every state, to compare with."""

    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states[trainer.global_step] = weights(pl_module)


def test_the_latest_weights_inside_the_budget_come_back(fit):
    net, remembers = Planes(lr=0.01), Remembers()
    budget = ForgettingBudget(0.02, tasks={"old": old()}, action="rollback", every_n_steps=5)
    fit(net, remembers, budget, epochs=6, limit_val_batches=0)
    inside = [entry["step"] for entry in budget.history if entry["used"]["old"] <= 1]
    assert 0 < inside[-1] < 120
    assert same(weights(net), remembers.states[inside[-1]])


def test_the_best_weights_inside_the_budget_come_back(fit):
    net, remembers = Planes(lr=0.005), Remembers()
    budget = ForgettingBudget(
        0.05, tasks={"old": old()}, action=["replay", "rollback"], every_n_steps=5, monitor="learn/new"
    )
    fit(net, remembers, replay(), budget, epochs=3, val_check_interval=4)
    assert same(weights(net), remembers.states[budget.best["step"]])
    x, y = points(100, 3, turned=True).tensors
    assert float((net(x).argmax(1) == y).float().mean()) == pytest.approx(budget.best["value"])
    x, y = points(200, 4).tensors
    assert budget.before["old"] - float((net(x).argmax(1) == y).float().mean()) <= 0.05


def test_nothing_inside_the_budget_is_said(fit):
    budget = ForgettingBudget(1e-9, tasks={"old": old()}, action="rollback", every_n_steps=100)
    with pytest.warns(UserWarning, match="at no measurement were all drops inside their limits"):
        fit(Planes(), budget, epochs=6, limit_val_batches=0)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("at", [7, 20, 33])
def test_a_run_that_resumes_steers_as_the_whole_one(at, fit, tmp_path):
    def run(folder, ckpt_path=None):
        torch.manual_seed(6)
        net, budget = (
            Planes(),
            ForgettingBudget(0.05, tasks={"old": old()}, action=["replay", "rollback"], every_n_steps=10),
        )
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=at, save_top_k=-1)
        fit(net, replay(), budget, ExactResume(), keep, epochs=2, limit_val_batches=0, ckpt_path=ckpt_path)
        return net, budget

    net, budget = run("whole")
    (path,) = (tmp_path / "whole").glob(f"*step={at}.ckpt")
    again, resumed = run("again", path)
    assert resumed.history == budget.history
    assert resumed.before == budget.before
    assert same(weights(again), weights(net))


def test_two_fits_of_one_budget_are_two_runs(fit):
    budget = ForgettingBudget(0.05, tasks={"old": old()}, every_n_steps=10)
    histories = []
    for _ in range(2):
        torch.manual_seed(6)
        fit(Planes(), replay(), budget, limit_val_batches=0)
        histories.append(budget.history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_made_in_a_run_is_whole(twin, fit):
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.made = twin(budget)

    budget, copies = ForgettingBudget(0.05, tasks={"old": task()}, every_n_steps=10), Copies()
    fit(Planes(), replay(), budget, copies, limit_val_batches=0)
    assert copies.made.history == budget.history


def step(module, batch):
    return module(batch[0]), batch[1]


def task():
    return OldTask(points(200, 4), MulticlassAccuracy(2), step)


def test_watching_leaves_training_bit_identical(fit):
    nets = [Planes(), Planes()]
    for net, callbacks in zip(nets, ([], [ForgettingBudget(10.0, tasks={"old": old()}, action="warn")]), strict=True):
        torch.manual_seed(6)
        fit(net, *callbacks, limit_val_batches=0)
    assert same(weights(nets[0]), weights(nets[1]))


def test_guarded_rows_are_not_reported(fit):
    whole = old()
    guard, report = whole.split(seed=3)
    rows = [set(part.loader.dataset.indices) for part in (guard, report)]
    assert rows[0] | rows[1] == set(range(200))
    assert not rows[0] & rows[1]
    fit(Planes(), ForgettingBudget(1.0, tasks={"old": guard}, action="warn"), ForgettingEvaluation({"old": report}))
    for reported in (whole, guard, whole.split(seed=4)[0]):
        with pytest.raises(ValueError, match="guard task 'old' and reported task 'all' share rows"):
            fit(Planes(), ForgettingEvaluation({"all": reported}), ForgettingBudget(0.05, tasks={"old": guard}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": 0}, "max_drop=0 of 'old' must be above 0, in the unit of its metric"),
        ({"max_drop": {"new": 0.1}}, r"max_drop=.* must name each of the tasks \['old'\]"),
        ({"tasks": {}}, "at least one OldTask"),
        ({"action": "pray"}, "action='pray' must be among 'replay', 'stop', 'rollback', 'warn'"),
        ({"action": []}, r"action=\[\] must be among"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number"),
        ({"mode": "best"}, "mode='best' must be 'max' or 'min'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=f"ForgettingBudget: .*{message}"):
        ForgettingBudget(**{"tasks": {"old": old()}, **arguments})


def test_steering_needs_replay(fit):
    with pytest.raises(ValueError, match="action='replay' has nothing to steer. Add ReplayMixing"):
        fit(Planes(), ForgettingBudget(0.05, tasks={"old": old()}))


def test_a_task_is_not_split_into_nothing():
    with pytest.raises(ValueError, match="share=0.001 of 200 rows leaves one part empty"):
        old().split(0.001)

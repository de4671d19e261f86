"""Learning rates per phase: exactly scaled while the optimizer steps, unseen by every LR scheduler."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_peft.callbacks import FreezeSchedule, Phase
from lightning_peft.callbacks.step_rates import StepRates
from tests.toy import Batches, Toy, rows, same, weights

SCHEDULERS = {
    "LambdaLR": lambda optimizer, lr: schedulers.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "StepLR": lambda optimizer, lr: schedulers.StepLR(optimizer, 2, 0.5),
    "LinearLR": lambda optimizer, lr: schedulers.LinearLR(optimizer, 0.2, total_iters=6),
    "OneCycleLR": lambda optimizer, lr: schedulers.OneCycleLR(optimizer, lr, total_steps=20),
    "CosineAnnealingLR": lambda optimizer, lr: schedulers.CosineAnnealingLR(optimizer, 10),
    "CosineAnnealingWarmRestarts": lambda optimizer, lr: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
    "SequentialLR": lambda optimizer, lr: schedulers.SequentialLR(
        optimizer, [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "ReduceLROnPlateau": lambda optimizer, lr: schedulers.ReduceLROnPlateau(
        optimizer, patience=0, threshold=1e9, eps=0
    ),
}


class Plain(Toy):
    """SGD without momentum, so that a step is exactly rate times gradient; rows in order."""

    def __init__(self, scheduler=None, **options):
        torch.manual_seed(3)
        super().__init__(**options)
        self.scheduler = scheduler
        self.double()

    def train_dataloader(self):
        return DataLoader(rows(24, dtype=torch.float64), 6)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        if self.scheduler is None:
            return optimizer
        made = SCHEDULERS[self.scheduler](optimizer, self.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": made, "interval": "step", "monitor": "loss"},
        }


class Rates(pl.Callback):
    """The rate that each step took, by parameter: what it moved over its gradient."""

    def __init__(self):
        self.steps, self.seen = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights(pl_module)
        self.seen.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moved = {}
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                step = self.before[name] - parameter.detach()
                moved[name] = float(step.norm() / parameter.grad.norm())
        self.steps.append(moved)

    def of(self, name):
        return [moved.get(name, 0.0) for moved in self.steps]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scaled_phase_trains_as_with_an_optimizer_of_the_scaled_rate_under_every_scheduler(scheduler, fit):
    scaled, by_hand, plain = Plain(scheduler), Plain(scheduler, lr=0.01), Plain(scheduler)
    seen = Rates()
    fit(scaled, FreezeSchedule([Phase(["*"], lr_scale=0.1)]), seen, epochs=2)
    fit(by_hand, epochs=2)
    for name, value in weights(by_hand).items():
        torch.testing.assert_close(weights(scaled)[name], value, rtol=0, atol=1e-14)
    unscaled = Rates()
    fit(plain, unscaled, epochs=2)
    if scheduler != "ReduceLROnPlateau":  # which looks at the loss, and that is another one
        assert seen.seen == unscaled.seen


def test_what_a_phase_frees_warms_up_and_what_trained_before_does_not(fit):
    rates = Rates()
    phases = [Phase(["head.*"], steps=2), Phase(["*"], lr_scale={"backbone.*": 0.5}, warmup_steps=4)]
    fit(Plain(), FreezeSchedule(phases), rates, epochs=2)
    assert rates.of("head.weight") == pytest.approx([0.1] * 8)
    assert rates.of("backbone.0.weight") == pytest.approx([0, 0, 0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])


def test_the_first_matching_glob_counts_and_the_rest_keeps_its_rate(fit):
    rates = Rates()
    scale = {"backbone.0.weight": 0.2, "backbone.*": 0.5}
    fit(Plain(), FreezeSchedule([Phase(["*"], lr_scale=scale)]), rates)
    first = {name: rates.of(name)[0] for name in rates.steps[0]}
    assert first == pytest.approx({
        "backbone.0.weight": 0.02, "backbone.0.bias": 0.05, "backbone.2.weight": 0.05, "backbone.2.bias": 0.05,
        "head.weight": 0.1, "head.bias": 0.1,
    })  # fmt: skip


def test_accumulation_warms_up_by_optimizer_steps(fit):
    rates = Rates()
    fit(Plain(), FreezeSchedule([Phase(["*"], warmup_steps=4)]), rates, epochs=2, accumulate_grad_batches=2)
    assert rates.of("head.weight")[1::2] == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_several_optimizers_stepped_by_hand_are_scaled_each(fit):
    class ByHand(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            parts = (self.backbone, self.head)
            return [torch.optim.SGD(part.parameters(), lr) for part, lr in zip(parts, (0.1, 1.0), strict=True)]

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in optimizers:
                optimizer.step()

    rates = Rates()
    phases = [Phase(["head.*"], steps=4, lr_scale=0.5), Phase(["*"], lr_scale=0.1)]  # each batch is two steps
    fit(ByHand(), FreezeSchedule(phases), rates)
    assert rates.of("head.weight") == pytest.approx([0.5, 0.5, 0.1, 0.1])
    assert rates.of("backbone.0.weight") == pytest.approx([0, 0, 0.01, 0.01])


@pytest.mark.parametrize("stop", range(1, 9))
def test_resuming_in_a_warm_up_goes_on_as_if_nothing_had_happened(stop, fit, tmp_path):
    def run(skip, ckpt_path=None):
        net = Toy()
        net.train_dataloader = lambda: Batches(skip)
        phases = [
            Phase(["head.*"], steps=2),
            Phase(["*"], steps=3, lr_scale=0.3, warmup_steps=4, frozen_state="reset"),
            Phase(["backbone.*"], frozen_state="reset", lr_scale={"*.weight": 0.2}),
        ]
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1, filename="{step}")
        fit(net, FreezeSchedule(phases), keep, epochs=3, ckpt_path=ckpt_path)
        return net

    whole = run(0)
    assert same(weights(run(stop % 4, tmp_path / "kept" / f"step={stop}.ckpt")), weights(whole))


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_momentum_of_what_is_frozen_again_is_kept_or_reset_as_the_phase_says(state, net, fit):
    class Momentum(pl.Callback):
        def __init__(self):
            self.held = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            held = trainer.optimizers[0].state
            self.held.append({name for name, parameter in pl_module.named_parameters() if held.get(parameter)})

    momentum = Momentum()
    phases = [Phase(["head.*"], steps=1), Phase(["*"], steps=1), Phase(["head.*"], frozen_state=state)]
    fit(net, FreezeSchedule(phases), momentum)
    head, everything = {"head.weight", "head.bias"}, {name for name, _ in net.named_parameters()}
    assert momentum.held == [
        head,
        *([everything if state == "keep" else head] * 3),
    ]  # the third phase begins after step 2


def test_a_step_that_breaks_leaves_the_optimizer_its_own_rate(net, fit):
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            raise ZeroDivisionError

    net.configure_optimizers = lambda: Breaks(net.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError):
        fit(net, FreezeSchedule([Phase(["*"], lr_scale={"head.*": 0.5})]))
    groups = net.optimizers().param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(6, 0.1)]


def test_a_step_that_breaks_and_is_caught_scales_only_itself(fit):
    class Skips(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            def closure():
                optimizer.zero_grad()
                if batch_idx == 1:
                    raise ZeroDivisionError
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))

            optimizer = self.optimizers()
            try:
                optimizer.step(closure)
            except ZeroDivisionError:
                self.caught = True

    rates = Rates()
    fit(Skips(), FreezeSchedule([Phase(["*"], lr_scale=0.5)]), rates)
    assert [seen[0] for seen in rates.seen] == [0.1] * 4


def test_an_optimizer_may_count_in_its_groups_and_is_left_alone_afterwards():
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            super().step(closure)

    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, rates = Counts([parameter], lr=0.5), StepRates()
    rates.attach([optimizer], lambda _: 0.5)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()
    assert (optimizer.param_groups[0]["count"], optimizer.param_groups[0]["lr"]) == (2, 0.5)
    assert parameter.detach().tolist() == [0.5] * 3
    rates.detach()
    optimizer.step()
    assert parameter.detach().tolist() == [0.0] * 3


def test_a_training_step_sees_its_groups_and_may_set_their_rates(fit):
    class Sets(Plain):
        def configure_optimizers(self):
            parts = (self.backbone, self.head)
            return torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=self.lr)

        def training_step(self, batch, batch_idx):
            groups = self.trainer.optimizers[0].param_groups
            assert len(groups) == 2  # although the first one is frozen
            if self.global_step == 2:
                groups[1]["lr"] = 0.01
            return super().training_step(batch, batch_idx)

    rates = Rates()
    phases = [Phase(["head.*"], steps=3, lr_scale=0.5), Phase(["*"])]
    fit(Sets(), FreezeSchedule(phases), rates)
    assert rates.of("head.weight") == pytest.approx([0.05, 0.05, 0.005, 0.01])


def test_lbfgs_takes_one_scale_and_refuses_two(fit):
    class Quasi(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=self.lr, max_iter=1)

    by_hand, scaled = Quasi(lr=0.01), Quasi()
    fit(by_hand)
    fit(scaled, FreezeSchedule([Phase(["*"], lr_scale=0.1)]))
    for name, value in weights(by_hand).items():
        torch.testing.assert_close(weights(scaled)[name], value, rtol=0, atol=1e-14)
    phases = [Phase(["*"], steps=50), Phase(["*"], lr_scale={"head.*": 0.1})]
    with pytest.raises(ValueError, match="LBFGS has one learning rate for all"):
        fit(Quasi(), FreezeSchedule(phases))


def test_lbfgs_moves_nothing_that_is_frozen_again(fit):
    class Quasi(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=self.lr)

    class Heads(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(pl_module.head.weight.detach().clone())

    heads = Heads()
    fit(Quasi(), FreezeSchedule([Phase(["*"], steps=2), Phase(["backbone.*"])]), heads)
    assert not torch.equal(heads.seen[0], heads.seen[1])
    assert all(torch.equal(head, heads.seen[1]) for head in heads.seen[2:])


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_that_is_stepped_past_lightning_is_scaled_too(with_closure, fit):
    class Raw(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            def closure():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))

            optimizer = self.optimizers(use_pl_optimizer=False)
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    rates = Rates()
    fit(Raw(), FreezeSchedule([Phase(["*"], lr_scale=0.5)]), rates, steps=None)
    assert rates.of("head.weight") == pytest.approx([0.05] * 4)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_made_while_it_runs_scales_nothing_of_the_run(again, net, fit):
    class Copies(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.copied = again(schedule)

    schedule, copies = FreezeSchedule([Phase(["*"], lr_scale=0.5)]), Copies()
    fit(net, schedule, copies)
    assert not copies.copied._rates.attached
    fit(net, copies.copied)


def test_a_copy_made_in_a_later_phase_begins_with_the_first(fit):
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.copied = copy.deepcopy(schedule)

    schedule, copies = FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"], warmup_steps=4)]), Copies()
    fit(Plain(), schedule, copies)
    rates = Rates()
    fit(Plain(), copies.copied, rates)
    assert rates.of("backbone.0.weight") == pytest.approx([0, 0, 0.025, 0.05])


def test_the_rate_that_a_step_takes_is_logged_by_block(fit, tmp_path):
    phases = [Phase(["head.*"], steps=2), Phase(["*"], lr_scale={"backbone.*": 0.5}, warmup_steps=2)]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(Plain(), FreezeSchedule(phases), LearningRateMonitor(), logger=logger, log_every_n_steps=1)
    log = EventAccumulator(str(tmp_path)).Reload()
    rates = {
        tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"] if "lr" in tag
    }
    assert rates["schedule/lr/head"] == [(step, pytest.approx(0.1)) for step in range(4)]
    assert rates["schedule/lr/backbone.2"] == [(2, pytest.approx(0.025)), (3, pytest.approx(0.05))]
    assert [rate for _, rate in rates["lr-SGD"]] == pytest.approx(
        [0.1] * len(rates["lr-SGD"])
    )  # what the scheduler says


def test_the_timeline_shows_what_trained_when_also_after_a_resume(fit, tmp_path):
    phases = [Phase(["head.*"], steps=2), Phase(["*"], steps=4), Phase(["head.*", "backbone.2.weight"])]
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    fit(Plain(), FreezeSchedule(phases), keep, epochs=2)
    schedule, logger = FreezeSchedule(phases), TensorBoardLogger(tmp_path, name="", version="")
    fit(Plain(), schedule, keep, epochs=2, logger=logger, ckpt_path=tmp_path / "kept" / "step=4.ckpt")
    assert schedule.clock.history == [(0, 0), (1, 2), (2, 6)]
    assert "schedule/timeline" in EventAccumulator(str(tmp_path), {"images": 0}).Reload().Tags()["images"]
    assert schedule._parameters.shares(Plain())[2] == pytest.approx({"backbone.0": 0, "backbone.2": 64 / 72, "head": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scale": 0}, "lr_scale=0 must be finite and above 0; what should not move is left out of train"),
        ({"lr_scale": {"*": -1.0}}, "lr_scale=.* must be finite and above 0"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 must be a whole number"),
        ({"frozen_state": "drop"}, "frozen_state='drop' is unknown; take one of keep, reset"),
    ],
)
def test_bad_numbers_are_refused_when_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        Phase(["*"], **options)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase(["head.*"], warmup_steps=3), "phase 1 frees nothing that phase 0 did not train, so warmup_steps=3"),
        (
            Phase(["head.*"], lr_scale={"backbone.*": 0.1}),
            r"lr_scale of phase 1: 'backbone.\*' matches none of 2 parameters",
        ),
    ],
)
def test_rates_that_no_parameter_could_take_are_refused_before_training(phase, message, net, fit):
    with pytest.raises(ValueError, match=message):
        fit(net, FreezeSchedule([Phase(["*"], epochs=50), phase]))

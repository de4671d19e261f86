"""The penalty's gradient is that of the formula, once per step, and a resumed run has the same penalty."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_peft import LoRA, LoRAMixin
from lightning_peft.callbacks import FreezeSchedule, Phase
from lightning_peft.callbacks.ewc import EWC
from tests.toy import Batches, Toy, rows, same, weights

OLD = rows(20, seed=9)
RATE = 30.0


def logits(module, batch):
    return module(batch[0].to(module.dtype))


class Plain(Toy):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Penalised(Plain):
    """The same penalty in the loss itself, for autograd to differentiate."""

    fisher, start = None, None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.fisher is None:
            self.fisher, self.start = fisher_of(self), weights(self)
        parts = [
            (f * (p - self.start[n]) ** 2).sum() for (n, p), f in zip(self.named_parameters(), self.fisher, strict=True)
        ]
        return loss + RATE / 2 * sum(parts)


def fisher_of(net):
    """From the definition, in one go: log-probabilities of each row and class, differentiated and squared."""
    out = [torch.zeros_like(p) for p in net.parameters()]
    for x, _ in OLD:
        log_p = net(x[None].to(net.dtype))[0].log_softmax(-1)
        for number, one in enumerate(log_p):
            gradients = torch.autograd.grad(one, list(net.parameters()), retain_graph=number == 0)
            for place, gradient in enumerate(gradients):
                out[place] += one.detach().exp() * gradient**2 / len(OLD)
    return out


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}], ids=str)
def test_training_is_that_with_the_penalty_in_the_loss(fit, options):
    ends = []
    for kind, callbacks in ((Plain, (EWC(OLD, logits, RATE),)), (Penalised, ()), (Plain, ())):
        pl.seed_everything(1, verbose=False)
        net = kind().double()
        fit(net, *callbacks, epochs=4, **options)
        ends.append(weights(net))
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-12) for name in ends[0])
    assert max(float((ends[0][name] - ends[2][name]).abs().max()) for name in ends[0]) > 1e-3


class Manual(Toy):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=self.lr) for part in (self.backbone, self.head)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()


def test_each_optimizer_of_a_module_that_steps_by_hand_adds_its_own_part_once(fit):
    ends = []
    for kind in (Plain, Manual):
        pl.seed_everything(1, verbose=False)
        net = kind().double()
        fit(net, EWC(OLD, logits, RATE), epochs=2)
        ends.append(weights(net))
    assert same(*ends)


class Gradients(pl.Callback):
    """Keeps what was added to the gradients at the third step, and the weights it was added at."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 2:
            self.at = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            kept = {name: None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()}
            self.seen = [*getattr(self, "seen", []), kept]


def test_the_gradient_that_it_adds_is_that_of_its_own_penalty_by_autograd(fit):
    net, ewc, watch = Plain().double(), EWC(OLD, logits, RATE), Gradients()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    fit(net, Watched(watch), ewc, watch, steps=3)
    before, after = watch.seen
    at = {name: value.requires_grad_() for name, value in watch.at.items()}
    penalty = RATE / 2 * sum((ewc.fisher[name] * (at[name] - start[name]) ** 2).sum() for name in at)
    for name, gradient in zip(at, torch.autograd.grad(penalty, list(at.values())), strict=True):
        assert torch.allclose(after[name] - before[name], gradient, rtol=1e-9, atol=1e-15)
        assert gradient.abs().max() > 1e-6


class Watched(pl.Callback):
    """Looks in front of the callback under test."""

    def __init__(self, watch) -> None:
        self.watch = watch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.watch.on_before_optimizer_step(trainer, pl_module, optimizer)


class Wide(MixedPrecision):
    """A gradient scaler without half precision, so that scales can be compared."""

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_the_penalty_is_of_the_same_size(fit, fused):
    class Scaled(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, fused=fused)

    ends = []
    for scale in (1.0, 1024.0):
        pl.seed_everything(1, verbose=False)
        net = Scaled()
        plugin = Wide("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        fit(net, EWC(OLD, logits, RATE), epochs=2, plugins=[plugin])
        ends.append(weights(net))
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6) for name in ends[0])


class Probe(LoRAMixin, Plain):
    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))


def test_frozen_parameters_have_no_part_in_it(fit):
    net, ewc = Probe(), EWC(OLD, logits, RATE)
    fit(net, ewc)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert ewc.fisher.keys() == ewc.state_dict()["start"].keys() == trained
    assert "backbone.0.weight" not in trained


def test_what_a_schedule_frees_later_is_held_where_it_is_named(fit):
    net, ewc = Plain(), EWC(OLD, logits, 1e5, parameters="backbone.*")
    start = weights(net.backbone)
    flags = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            flags.append(pl_module.backbone[0].weight.requires_grad)
            if len(flags) == 2:
                assert same(weights(pl_module.backbone), start)

    schedule = FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"])])
    fit(net, schedule, ewc, Look(), steps=3)
    assert flags == [False, True, True]
    assert ewc.fisher.keys() == {f"backbone.{name}" for name in start}


def test_weights_that_old_rows_need_move_less(fit):
    distance = []
    for callbacks in ((), (EWC(OLD, logits, 3.0),), (EWC(OLD, logits, RATE),)):
        pl.seed_everything(1, verbose=False)
        net = Plain()
        start = weights(net)
        fisher = fisher_of(net)
        fit(net, *callbacks, epochs=10)
        moved = [
            (f * (p.detach() - start[name]) ** 2).sum()
            for (name, p), f in zip(net.named_parameters(), fisher, strict=True)
        ]
        distance.append(float(sum(moved)))
    assert distance[0] > 1.1 * distance[1] > 1.5 * distance[2]


@pytest.mark.parametrize("done", [1, 3, 4, 7])
def test_a_resumed_run_has_the_penalty_of_the_first_start(fit, tmp_path, done):
    def run(ewc, skip=0, **options):
        pl.seed_everything(1, verbose=False)
        net, save = Plain(), pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(net, ewc, save, epochs=3, fit_with=(Batches(skip),), **options)
        return net

    first, second = EWC(OLD, logits, RATE), EWC(OLD, refuses, RATE)
    whole = run(first)
    torch.load(tmp_path / f"step={done}.ckpt", weights_only=True)
    again = run(second, skip=done % 4, ckpt_path=tmp_path / f"step={done}.ckpt")
    assert same(weights(whole), weights(again))
    assert same(first.fisher, second.fisher)
    assert first.penalty(whole) == second.penalty(again) > 0


def refuses(module, batch):
    raise AssertionError("the Fisher information is in the checkpoint")


def test_a_new_fit_begins_anew(fit):
    ewc, ends = EWC(OLD, logits, RATE), []
    for _ in range(2):
        pl.seed_everything(2, verbose=False)
        net = Plain()
        fit(net, ewc)
        ends.append(weights(net))
    assert same(*ends)


def test_computing_it_changes_no_draw_of_the_training(fit):
    ends = []
    for callbacks in ((), (EWC(DataLoader(OLD, 4, shuffle=True), logits, 1e-30),)):
        pl.seed_everything(3, verbose=False)
        net = Plain(dropout=0.3)
        fit(net, *callbacks, epochs=3)
        ends.append((weights(net), torch.rand(3)))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_does_the_same_before_during_and_after_a_fit(fit, twin):
    class Copies(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.copy = twin(trainer.callbacks[0])

    def ended(ewc, *callbacks):
        pl.seed_everything(2, verbose=False)
        net = Plain()
        fit(net, ewc, *callbacks)
        return weights(net)

    ewc, copies = EWC(OLD, logits, RATE), Copies()
    before, during = twin(ewc), ended(ewc, copies)
    for other in (before, copies.copy, twin(ewc)):
        assert same(ended(other), during)


def test_several_old_tasks_stand_side_by_side_and_log_their_penalties(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    net, one = Plain().double(), EWC(OLD, logits, RATE)
    two = EWC(OLD, logits, 2 * RATE, name="other")
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer = fit(net, one, two, epochs=3, logger=logger, log_every_n_steps=5)
    now = weights(net)
    wanted = RATE / 2 * float(sum((one.fisher[name] * (now[name] - start[name]) ** 2).sum() for name in start))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name, factor in (("old", 1), ("other", 2)):
        scalars = events.Scalars(f"drift/ewc/{name}")
        assert [event.step for event in scalars] == [5, 10, 12]
        assert scalars[-1].value == pytest.approx(factor * wanted, rel=1e-6)
        assert float(trainer.callback_metrics[f"drift/ewc/{name}"]) == pytest.approx(factor * wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "rate=0.0 must be a finite number above 0"),
        ({"rate": True}, "rate=True must be"),
        ({"rate": float("inf")}, "rate=inf must be"),
        ({"step": 3}, "step=3 must be a function"),
        ({"labels": "own"}, "labels='own' must be one of"),
        ({"data": []}, "data: the list is empty"),
        ({"data": iter([1])}, "data: list_iterator has no length"),
        ({"name": ""}, "name='' must not be empty"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=f"EWC: {message}"):
        EWC(**{"data": OLD, "step": logits, "rate": 1.0, **change})


def test_before_training_it_refuses_names_that_match_nothing_and_a_network_that_does_not_train(fit):
    with pytest.raises(ValueError, match="EWC: 'bakbone.*' matches none of 6 parameters"):
        fit(Plain(), EWC(OLD, logits, 1.0, parameters="bakbone.*"))

    class Rests(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(ValueError, match="EWC: no parameter requires a gradient"):
        fit(Rests().requires_grad_(False), EWC(OLD, logits, 1.0))

"""A module is held to what it was: to the right reference, in every step, and it forgets less for it."""

import copy
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import FullFinetuneMixin, LoRA, LoRAMixin, ReplayMixin, merge_adapter
from lightning_peft.callbacks import FreezeSchedule, ReplayMixing
from lightning_peft.callbacks.freeze_schedule import Phase
from lightning_peft.mixins.distill_mixin import DistillMixin
from tests.toy import Toy, rows, same, weights

OLD = TensorDataset(torch.randn(40, 4, generator=torch.Generator().manual_seed(8)), torch.zeros(40).long())


class Normed(Toy):
    """Running statistics and dropout, which a reference must neither use as they are now nor disturb."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.backbone.append(nn.BatchNorm1d(8))

    def distill_outputs(self, batch):
        return self(batch[0])


class Plain(DistillMixin, Normed):
    pass


class Full(DistillMixin, FullFinetuneMixin, Normed):
    pass


class WithLoRA(LoRAMixin, DistillMixin, Normed):
    pass


def make(kind):
    torch.manual_seed(4)
    return kind(adapter=LoRA(rank=2)) if kind is WithLoRA else kind()


def distilling(weight=1.0):
    return ReplayMixing(OLD, ratio=0.5, weight=weight)


KINDS = pytest.mark.parametrize("kind", [Plain, Full, WithLoRA])


class Looks(pl.Callback):
    """What the reference says in every step, and whether anything but the step itself changed."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.reference_outputs(OLD.tensors))


@KINDS
def test_the_reference_is_the_network_before_training_in_every_step(fit, kind):
    net, looks = make(kind), Looks()
    with torch.no_grad():
        before = copy.deepcopy(net).eval()(OLD.tensors[0])
    fit(net, distilling(), looks, epochs=2)
    assert len(looks.seen) == 8
    assert all(torch.equal(seen, before) for seen in looks.seen)
    assert not torch.allclose(net.eval()(OLD.tensors[0]), before, atol=1e-2)


@KINDS
def test_the_step_is_the_divergence_from_what_the_network_was(fit, kind):
    net = make(kind)
    with torch.no_grad():
        q = copy.deepcopy(net).eval()(OLD.tensors[0]).softmax(1)
    fit(net, distilling())
    net.eval()
    found = net.replay_step(OLD.tensors)
    log_p = net(OLD.tensors[0]).log_softmax(1)
    torch.testing.assert_close(found, F.kl_div(log_p, q, reduction="batchmean"))


@KINDS
def test_it_is_zero_before_the_first_step(kind):
    net = make(kind)
    net.configure_model()
    net.eval()
    net.keep_reference()
    assert float(net.replay_step(OLD.tensors).detach()) == 0


def test_the_gradient_is_that_of_the_formula(fit):
    net = make(Plain).double()
    old = [OLD.tensors[0].double(), OLD.tensors[1]]
    net.keep_reference()
    with torch.no_grad():
        q = copy.deepcopy(net).eval()(old[0]).softmax(1)
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    net.eval()
    net.replay_step(old).backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    log_p = net(old[0]).log_softmax(1)
    (q * (q.log() - log_p)).sum(1).mean().backward()
    for mine, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-14)


@KINDS
def test_the_reference_pass_changes_nothing_of_the_training(fit, kind):
    """A twin that draws the same rows and has the same forward, but asks for no reference."""

    class Twin(kind):
        def replay_step(self, batch):
            return self.distill_outputs(batch).square().mean()

    class Asks(Twin):
        def replay_step(self, batch):
            self.reference_outputs(batch)
            return super().replay_step(batch)

    ends = []
    for one in (Twin, Asks):
        torch.manual_seed(4)
        net = one(adapter=LoRA(rank=2)) if kind is WithLoRA else one()
        pl.seed_everything(5, verbose=False)
        fit(net, distilling(), epochs=2)
        ends.append(weights(net))
    assert same(*ends)


@KINDS
def test_the_copy_is_in_no_optimizer_and_not_in_the_weights_of_a_checkpoint(fit, tmp_path, kind):
    net = make(kind)
    names = {name for name, _ in net.named_parameters()}
    trainer = fit(net, distilling(), ModelCheckpoint(tmp_path, filename="end"))
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held <= {id(p) for p in net.parameters()}
    assert net.distill_reference.parameters.keys() == ({"head.weight", "head.bias"} if kind is WithLoRA else names)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() <= set(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in saved.items())


class GoesOn(DataLoader):
    """The toy's rows in order; the first ``skip`` batches of the first pass are left out."""

    def __init__(self, skip: int = 0) -> None:
        super().__init__(rows(24), 6)
        self.skip = skip

    def __iter__(self):
        skip, self.skip = self.skip, 0  # at the first row, not when Lightning tries whether it can iterate
        yield from list(super().__iter__())[skip:]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Saves(pl.Callback):
    """Saves after so many steps; it has no state, so a resumed run does not miss it."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@KINDS
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_run_that_resumes_anywhere_ends_like_one_that_never_stopped(fit, tmp_path, kind, stop):
    def run(*callbacks, skip=0, **options):
        pl.seed_everything(5, verbose=False)
        net = make(kind)
        net.backbone[2].p = 0.0  # a plain resume does not bring generators back
        fit(net, distilling(), *callbacks, fit_with=(GoesOn(skip),), epochs=2, **options)
        return net

    whole = run(Saves(tmp_path / "mid.ckpt", stop))
    again = run(skip=stop % 4, ckpt_path=tmp_path / "mid.ckpt")
    first, second = whole.distill_reference, again.distill_reference
    assert same(first.parameters, second.parameters)
    assert same(first.buffers, second.buffers)
    assert same(weights(whole), weights(again))


def test_a_checkpoint_without_a_reference_is_said(fit, tmp_path):
    fit(Normed(), Saves(tmp_path / "end.ckpt", 4))
    with pytest.warns(UserWarning, match="Plain: the checkpoint has no reference of DistillMixin"):
        fit(make(Plain), distilling(), ckpt_path=tmp_path / "end.ckpt", fit_with=(GoesOn(),), epochs=2)


def test_a_new_fit_has_a_new_reference_and_a_copy_keeps_its_own(fit):
    net = make(Plain)
    fit(net, distilling())
    first, middle = net.distill_reference, weights(net)
    twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    fit(net, distilling())
    assert torch.equal(net.distill_reference.parameters["head.weight"], middle["head.weight"])
    for twin in twins:
        assert same(twin.distill_reference.parameters, first.parameters)
        assert torch.equal(twin.reference_outputs(OLD.tensors), twins[0].reference_outputs(OLD.tensors))


def test_in_a_sequence_the_reference_may_be_what_the_fit_before_left(fit):
    net = make(WithLoRA)
    net.distill_from = "start"
    fit(net, distilling())
    with torch.no_grad():
        learned = copy.deepcopy(net).eval()(OLD.tensors[0])
    looks = Looks()
    fit(net, distilling(), looks)
    assert all(torch.equal(seen, learned) for seen in looks.seen)
    assert not torch.allclose(net.eval()(OLD.tensors[0]), learned, atol=1e-3)


def test_what_a_schedule_frees_later_is_held_to_what_it_was(fit):
    net, looks = make(Plain), Looks()
    with torch.no_grad():
        before = copy.deepcopy(net).eval()(OLD.tensors[0])
    fit(net, FreezeSchedule([Phase(train=["head.*"], epochs=1), Phase(train=["*"])]), distilling(), looks, epochs=2)
    assert all(torch.equal(seen, before) for seen in looks.seen)
    assert not torch.equal(net.backbone[0].weight, net.distill_reference.parameters["backbone.0.weight"])


def test_the_reference_of_a_merged_adapter_is_still_the_pretrained_network(fit):
    net = make(WithLoRA)
    with torch.no_grad():
        before = copy.deepcopy(net).eval()(OLD.tensors[0])
    fit(net, distilling())
    merge_adapter(net.adapted_network)
    assert torch.equal(net.reference_outputs(OLD.tensors), before)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_half_precision_the_reference_stays_what_it_was(fit, precision):
    class Records(DistillMixin, Toy):
        seen: list = []

        def distill_outputs(self, batch):
            return self(batch[0])

        def reference_outputs(self, batch):
            found = super().reference_outputs([OLD.tensors[0].to(self.dtype)])
            self.seen.append(found)
            return super().reference_outputs(batch)

    Records.seen.clear()
    net = Records()
    fit(net, distilling(), precision=precision, epochs=2)
    assert len(Records.seen) == 8
    assert all(torch.equal(seen, Records.seen[0]) for seen in Records.seen)


def test_a_compiled_module_has_the_same_reference_and_the_same_end(fit):
    class Silent(DistillMixin, Toy):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def distill_outputs(self, batch):
            return self(batch[0])

    ends = []
    for compiled in (False, True):
        pl.seed_everything(5, verbose=False)
        net = Silent()
        fit(torch.compile(net, backend="aot_eager") if compiled else net, distilling(), epochs=2)
        ends.append(net)
    assert same(ends[0].distill_reference.parameters, ends[1].distill_reference.parameters)
    torch.testing.assert_close(weights(ends[0]), weights(ends[1]))


def test_features_masks_targets_and_temperature_reach_the_loss():
    class Features(DistillMixin, Toy):
        distill = "mse"

        def distill_outputs(self, batch):
            return self.backbone(batch[0])

    class Masked(DistillMixin, Toy):
        distill_temperature = 2.0
        exclude_target = True

        def distill_outputs(self, batch):
            return torch.cat([self(batch[0]), self.backbone(batch[0])], 1)

        def distill_mask(self, batch):
            return batch[0][:, 0] > 0

        def distill_targets(self, batch):
            return batch[1]

    batch = OLD.tensors
    for kind in (Features, Masked):
        net = kind()
        net.keep_reference()
        with torch.no_grad():
            then = net.distill_outputs(batch)
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
            now, found = net.distill_outputs(batch), float(net.replay_step(batch))
        if kind is Features:
            assert found == pytest.approx(float(((now - then) ** 2).mean()))
            continue
        kept = batch[0][:, 0] > 0
        log_p, q = ((it[kept][:, 1:] / 2).log_softmax(1) for it in (now, then))  # the target is class 0 everywhere
        assert found == pytest.approx(4 * float((q.exp() * (q - log_p)).sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill": "kld"}, "Wrong: distill='kld' must be 'kl'"),
        ({"distill_from": "now"}, "distill_from='now' must be 'pretrained' or 'start'"),
        ({"distill_temperature": 0}, "distill_temperature=0 must be a number above 0"),
        ({"distill": "mse", "exclude_target": True}, "distill='mse' has no temperature and no target"),
        ({"distill": "mse", "distill_temperature": 2.0}, "distill='mse' has no temperature"),
    ],
)
def test_settings_that_do_not_fit_are_refused_when_the_class_is_made(fit, settings, message):
    with pytest.raises(ValueError, match=message):
        type("Wrong", (DistillMixin, Normed), settings)
    net = make(Plain)
    for name, value in settings.items():
        setattr(net, name, value)
    with pytest.raises(ValueError, match=message.replace("Wrong", "Plain")):
        fit(net, distilling())


def test_missing_methods_and_a_missing_reference_are_named(fit):
    class Bare(DistillMixin, Toy):
        pass

    with pytest.raises(
        ValueError, match=r"Bare: has DistillMixin but no distill_outputs. Define distill_outputs\(self"
    ):
        fit(Bare(), distilling())
    net = make(Plain)
    net.exclude_target = True
    with pytest.raises(ValueError, match="Plain: has DistillMixin but no distill_targets"):
        fit(net, distilling())
    with pytest.raises(ValueError, match="Plain: there is no reference yet"):
        make(Plain).replay_step(OLD.tensors)


def test_bases_that_would_be_skipped_are_refused():
    class Rehearses(Toy):
        def replay_step(self, batch):
            return self(batch[0]).sum()

    with pytest.raises(TypeError, match=r"Write class Wrong\(DistillMixin, Normed\)"):
        type("Wrong", (Normed, DistillMixin), {})
    with pytest.raises(TypeError, match="Wrong: DistillMixin would hide the replay_step of Rehearses"):
        type("Wrong", (DistillMixin, Rehearses), {})
    assert issubclass(Plain, ReplayMixin)


def digits():
    load_digits = pytest.importorskip("sklearn.datasets", reason="needs the extra recipes").load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32)
    turned = torch.tensor(np.rot90(x.numpy().reshape(-1, 8, 8), axes=(1, 2)).copy()).reshape(-1, 64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], turned[order], torch.tensor(y)[order]


class Digits(pl.LightningModule):
    def __init__(self, data):
        super().__init__()
        self.data = data
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def distill_outputs(self, batch):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return DataLoader(self.data, 90, shuffle=True)


class DigitsHeld(DistillMixin, Digits):
    pass


def test_on_digits_a_module_that_is_held_to_what_it_was_forgets_less(fit):
    upright, turned, y = digits()
    pretrained = Digits(TensorDataset(upright[:900], y[:900]))
    fit(pretrained, epochs=6)

    def accuracy(net, x):
        return float((net.net(x[1200:]).argmax(1) == y[1200:]).float().mean())

    before, after = accuracy(pretrained, upright), {}
    for kind, callbacks in ((Digits, []), (DigitsHeld, [ReplayMixing(TensorDataset(upright[900:1200]), ratio=0.5)])):
        net = kind(TensorDataset(turned[:900], y[:900]))
        net.load_state_dict(pretrained.state_dict())
        fit(net, *callbacks, epochs=4)
        after[kind] = accuracy(net, upright), accuracy(net, turned)
    assert before > 0.9
    assert before - after[Digits][0] > 0.15
    assert before - after[DigitsHeld][0] < 0.5 * (before - after[Digits][0])
    assert after[DigitsHeld][1] > after[Digits][1] - 0.05

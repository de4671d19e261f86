"""Distances are those from the first weights, and their two parts those of a sum over every step."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_peft import LoRA, LoRAMixin
from lightning_peft.callbacks import FreezeSchedule, Phase, ZeroInitHead
from lightning_peft.callbacks.weight_drift import WeightDrift
from tests.toy import Batches, Toy, rows, same, weights

BLOCKS = ("backbone.0", "backbone.2", "head")


class Decaying(Toy):
    """AdamW with a rate that changes at every step; biases do not decay."""

    def configure_optimizers(self):
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 0.5},
            {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Exact(pl.Callback):
    """The sum over every step, from the weights before it, the rates in force, and the flags; in float64."""

    def on_train_start(self, trainer, pl_module):
        self.start = {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}
        self.decay = {name: torch.zeros_like(value) for name, value in self.start.items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        names = {id(p): name for name, p in pl_module.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.decay[names[id(p)]] -= group["lr"] * group["weight_decay"] * p.detach().double()

    def on_train_end(self, trainer, pl_module):
        self.end = {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}

    def block(self, block):
        def norm(values):
            return float(torch.cat([value.flatten() for value in values]).norm())

        names = [name for name in self.start if name.startswith(block)]
        moved = {name: self.end[name] - self.start[name] for name in names}
        return {
            "distance": norm(moved.values()),
            "decay": norm(self.decay[name] for name in names),
            "gradient": norm(moved[name] - self.decay[name] for name in names),
            "norm": norm(self.end[name] for name in names) / norm(self.start[name] for name in names),
        }


@pytest.mark.parametrize(("every", "tolerance"), [(1, 3e-3), (5, 1e-2)])
def test_the_split_is_that_of_the_sum_over_every_step(fit, every, tolerance):
    net, drift, exact = Decaying().double(), WeightDrift(every), Exact()
    fit(net, drift, exact, epochs=10)
    assert drift.values.keys() == set(BLOCKS)
    for block in BLOCKS:
        wanted = exact.block(block)
        assert {kind: drift.values[block][kind] for kind in ("distance", "norm")} == pytest.approx(
            {kind: wanted[kind] for kind in ("distance", "norm")}, rel=1e-12
        )
        assert wanted["decay"] > 0.1
        assert drift.values[block] == pytest.approx(wanted, rel=tolerance)


class Scales(pl.Callback):
    """Learning rates scaled for the length of a step, in groups of their own."""

    def on_fit_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers

        def scale(optimizer, *_):
            self.kept = optimizer.param_groups
            optimizer.param_groups = [
                {**group, "params": [p], "lr": group["lr"] * 0.1} for group in self.kept for p in group["params"]
            ]

        def restore(optimizer, *_):
            optimizer.param_groups = self.kept

        optimizer.register_step_pre_hook(scale)
        optimizer.register_step_post_hook(restore)


class ScalesLater(Scales):
    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)


@pytest.mark.parametrize("scales", [Scales, ScalesLater])
@pytest.mark.parametrize("first", [True, False])
def test_rates_that_are_scaled_for_the_step_only_count_as_scaled(fit, scales, first):
    net, drift, exact = Decaying().double(), WeightDrift(1), Exact()
    fit(net, *((scales(), drift) if first else (drift, scales())), exact, epochs=2)
    for block in BLOCKS:
        assert drift.values[block] == pytest.approx(exact.block(block), rel=3e-3)


def test_a_frozen_parameter_neither_moves_nor_decays_and_costs_nothing_until_it_trains(fit):
    class Kept(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            names.append(set(trainer.callbacks[0].state_dict()["drifts"]))

    names, net, drift, exact = [], Decaying().double(), WeightDrift(2), Exact()
    schedule = FreezeSchedule([Phase(["head.*"], steps=5), Phase(["*"], steps=4), Phase(["backbone.0.*"])])
    fit(net, drift, schedule, exact, Kept(), epochs=4)
    assert names[4] == {"head.weight", "head.bias"}
    assert names[5] == {name for name, _ in net.named_parameters()}
    for block in BLOCKS:
        assert drift.values[block] == pytest.approx(exact.block(block), rel=1e-2)


class Probe(LoRAMixin, Toy):
    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def test_of_an_adapter_the_checkpoint_holds_copies_of_what_trains_only(fit, tmp_path):
    save = pl.callbacks.ModelCheckpoint(tmp_path, "last")
    net = Probe()
    fit(net, WeightDrift(), save)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["WeightDrift"]["drifts"]
    trained = {name: p.numel() for name, p in net.named_parameters() if p.requires_grad}
    assert {name: found["reference"].numel() for name, found in saved.items()} == trained
    assert "backbone.0.weight" not in trained


def test_a_start_at_zero_has_no_relative_norm_and_is_the_one_that_other_callbacks_set(fit):
    net, drift = Decaying(), WeightDrift()
    fit(net, drift, ZeroInitHead())
    assert drift.values["head"].keys() == {"distance", "decay", "gradient"}
    assert drift.values["head"]["distance"] == pytest.approx(
        float(torch.cat([p.detach().flatten() for p in net.head.parameters()]).norm())
    )


@pytest.mark.parametrize("every", [3, 5])
@pytest.mark.parametrize("done", [3, 4, 7])
def test_a_resumed_run_measures_from_the_first_start(fit, tmp_path, every, done):
    def save():
        return pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def run(drift, skip=0, **options):
        pl.seed_everything(1, verbose=False)
        net = Decaying()
        fit(net, drift, save(), epochs=3, fit_with=(Batches(skip),), **options)
        return net, drift

    net, whole = run(WeightDrift(every))
    kept = {name: found["reference"].clone() for name, found in whole.state_dict()["drifts"].items()}
    again, resumed = run(WeightDrift(every), skip=done % 4, ckpt_path=tmp_path / f"step={done}.ckpt")
    assert same(weights(net), weights(again))
    assert resumed.values == whole.values
    assert same(kept, {name: found["reference"] for name, found in resumed.state_dict()["drifts"].items()})


def test_a_run_that_is_made_longer_goes_on_as_if_it_had_not_stopped(fit, tmp_path):
    def run(drift, epochs, **options):
        pl.seed_everything(1, verbose=False)
        return fit(Decaying(), drift, epochs=epochs, fit_with=(Batches(),), **options)

    whole, first, second = WeightDrift(3), WeightDrift(3), WeightDrift(3)
    run(whole, 3)
    run(first, 2).save_checkpoint(tmp_path / "stopped.ckpt")  # after step 8, two steps behind the last look
    run(second, 3, ckpt_path=tmp_path / "stopped.ckpt")
    assert second.values == whole.values


def test_a_resumed_run_leaves_the_state_that_it_came_from_alone_and_forgets_what_the_module_lacks(fit, tmp_path):
    first = WeightDrift(2)
    trainer = fit(Decaying(), first, fit_with=(Batches(),))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    second, state = WeightDrift(2), first.state_dict()
    state["drifts"]["gone.weight"] = state["drifts"]["head.weight"]
    kept = pickle.loads(pickle.dumps(state))
    second.load_state_dict(state)
    second.load_state_dict = lambda _: None  # these very tensors, not those of the file
    fit(Decaying(), second, epochs=2, fit_with=(Batches(),), ckpt_path=tmp_path / "stopped.ckpt")
    assert second.state_dict()["drifts"].keys() == first.state_dict()["drifts"].keys()
    assert all(
        torch.equal(kept["drifts"][name]["decayed"], found["decayed"])
        for name, found in state["drifts"].items()
        if found["decayed"] is not None
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_bit_identical_with_and_without_it(fit, dropout):
    ends = []
    for callbacks in ((), (WeightDrift(2),)):
        pl.seed_everything(3, verbose=False)
        net = Decaying(dropout=dropout)
        fit(net, *callbacks, epochs=3, gradient_clip_val=0.1)
        ends.append((weights(net), torch.rand(3)))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_new_fit_begins_anew(fit):
    drift = WeightDrift(2)
    ends = []
    for _ in range(2):
        pl.seed_everything(2, verbose=False)
        fit(Decaying(), drift)
        ends.append(drift.values)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_measures_the_same_before_during_and_after_a_fit(fit, twin):
    class Copies(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.copy = twin(trainer.callbacks[0])

    def measured(drift, *callbacks):
        pl.seed_everything(2, verbose=False)
        fit(Decaying(), drift, *callbacks)
        return drift.values

    drift, copies = WeightDrift(3), Copies()
    before, during = twin(drift), measured(drift, copies)
    assert not copies.copy._handles  # or letting go of the copy would take the hooks of the run
    assert measured(before) == during == measured(copies.copy) == measured(twin(drift)) == measured(drift)


def test_decay_that_passes_through_momentum_is_not_split_and_that_is_said(fit, net):
    drift = WeightDrift(2)
    with pytest.warns(UserWarning, match="WeightDrift: weight decay of SGD cannot be told from the gradient.*AdamW"):
        fit(net, drift)
    assert all(found.keys() == {"distance", "norm"} for found in drift.values.values())


class TwoGroups(Decaying):
    """A part of the head decays in a way that is not known, the rest does not decay."""

    def configure_optimizers(self):
        groups = [
            {"params": [*self.backbone.parameters(), self.head.weight], "weight_decay": 0.0},
            {"params": [self.head.bias], "weight_decay": 0.1},
        ]
        return torch.optim.Adam(groups, lr=0.02)


def test_the_split_is_left_out_only_where_it_is_not_known(fit):
    drift = WeightDrift()
    with pytest.warns(UserWarning, match="weight decay of Adam"):
        fit(TwoGroups(), drift)
    assert drift.values["head"].keys() == {"distance", "norm"}
    assert drift.values["backbone.0"]["decay"] == 0.0
    assert drift.values["backbone.0"]["gradient"] == drift.values["backbone.0"]["distance"] > 0


class Fused(Decaying):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.5, fused=True)


class Overflows(pl.Callback):
    """Tells a fused optimizer what the gradient scaler tells it: that every second step has an infinite gradient."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        optimizer.found_inf = torch.tensor(float(trainer.global_step % 2))
        self.weight = pl_module.head.weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moved.append(not torch.equal(self.weight, pl_module.head.weight))


moved: list[bool] = []


def test_a_step_that_a_fused_optimizer_leaves_out_has_no_decay(fit):
    moved.clear()
    drift = WeightDrift()
    fit(Fused(), drift, Overflows(), steps=4)
    assert moved == [True, False, True, False]
    assert {found["steps"] for found in drift.state_dict()["drifts"].values()} == {2}
    assert all(found["rates"] == pytest.approx(2 * 0.02 * 0.5) for found in drift.state_dict()["drifts"].values())


def test_blocks_may_be_named_and_others_keep_no_copy(fit):
    drift = WeightDrift(blocks={"below": "backbone.*"})
    fit(Decaying(), drift)
    assert list(drift.values) == ["below"]
    assert all(name.startswith("backbone.") for name in drift.state_dict()["drifts"])
    with pytest.raises(ValueError, match="WeightDrift: 'bakbone.*' matches none of 6 parameters"):
        fit(Decaying(), WeightDrift(blocks={"below": "bakbone.*"}))


def test_it_looks_every_so_many_steps_and_after_the_last(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    drift = WeightDrift(5)
    trainer = fit(Decaying(), drift, epochs=3, logger=logger)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for block in BLOCKS:
        for kind, value in drift.values[block].items():
            scalars = events.Scalars(f"drift/{kind}/{block}")
            assert [event.step for event in scalars] == [5, 10, 12]
            assert scalars[-1].value == pytest.approx(value)
            assert float(trainer.callback_metrics[f"drift/{kind}/{block}"]) == pytest.approx(value)


def test_a_second_fit_that_begins_earlier_is_looked_at(fit, tmp_path, monkeypatch):
    fit(Decaying(), steps=2).save_checkpoint(tmp_path / "two.ckpt")
    drift, steps = WeightDrift(3), []
    monkeypatch.setattr(drift, "_look", lambda trainer, module: steps.append(trainer.global_step))
    fit(Decaying(), drift, steps=8)
    fit(Decaying(), drift, steps=7, ckpt_path=tmp_path / "two.ckpt")
    assert steps == [3, 6, 8, 3, 6, 7]


class Manual(Decaying):
    """Two optimizers, stepped by hand: the step counter of the trainer goes by two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return (
            torch.optim.AdamW(self.backbone.parameters(), lr=0.02, weight_decay=0.5),
            torch.optim.SGD(self.head.parameters(), lr=0.02, weight_decay=0.5),
        )

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()


def test_every_optimizer_of_a_module_that_steps_by_hand_counts(fit):
    drift, exact = WeightDrift(3), Exact()
    fit(Manual().double(), drift, exact, epochs=3)
    assert drift.state_dict()["drifts"]["head.weight"]["looks"] == 8  # after 4, 6, 10, 12, 16, 18, 22 and 24 steps
    for block in BLOCKS:
        assert drift.values[block] == pytest.approx(exact.block(block), rel=1e-2)


def test_no_hook_is_left_behind(fit):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop")

    for callbacks in ((), (Stops(),)):
        net, drift, kept = Decaying(), WeightDrift(), []
        net.configure_optimizers = lambda net=net, kept=kept: kept.append(Decaying.configure_optimizers(net)) or kept[0]
        try:
            fit(net, *callbacks, drift)
        except RuntimeError as error:
            assert str(error) == "stop"  # noqa: PT017
        (optimizer,), _ = kept[0]
        schedulers = 1  # a scheduler has a hook of its own
        assert len(optimizer._optimizer_step_post_hooks) <= schedulers
        assert not optimizer._optimizer_step_pre_hooks
        assert not drift._handles


@pytest.mark.parametrize("every", [0, -1, 2.5])
def test_an_interval_out_of_range_is_refused(every):
    with pytest.raises(ValueError, match=f"WeightDrift: every_n_steps={every} must be a whole number of at least 1"):
        WeightDrift(every)


def test_accumulated_batches_are_one_step(fit):
    net, drift, exact = Decaying().double(), WeightDrift(1), Exact()
    loader = DataLoader(rows(24, dtype=torch.float64), 6)
    fit(net, drift, exact, epochs=3, accumulate_grad_batches=2, fit_with=(loader,))
    assert drift.state_dict()["looked_at"] == drift.state_dict()["drifts"]["head.weight"]["looks"] == 6
    for block in BLOCKS:
        assert drift.values[block] == pytest.approx(exact.block(block), rel=1e-2)

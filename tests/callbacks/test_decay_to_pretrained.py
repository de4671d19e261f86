"""Weights go back to where they began, by the formula, with the rates of every step, also in a resumed run."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import LoRA, LoRAMixin
from lightning_peft.callbacks import FreezeSchedule, Phase
from lightning_peft.callbacks.decay_to_pretrained import DecayToPretrained
from tests.toy import Batches, Toy, rows, same, weights


class Still(Toy):
    """Zero gradients: nothing but decay moves a weight."""

    decay, kind = 0.0, torch.optim.AdamW

    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        return self.kind(trainable, lr=self.lr, weight_decay=self.decay)


class Moved(pl.Callback):
    """Takes the weights away from where they began, once, behind the first step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            with torch.no_grad():
                for p in pl_module.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn_like(p))


def test_without_gradients_weights_go_to_where_they_began_and_those_of_adamw_to_zero(fit):
    net = Still().double()
    start = weights(net)
    fit(net, DecayToPretrained(5.0), Moved(), steps=64, epochs=20)  # lr * rate * steps = 32
    for name, value in weights(net).items():
        assert (value - start[name]).abs().max() <= 2e-14
    net = Still().double()
    net.decay = 5.0
    fit(net, steps=64, epochs=20)
    assert all(value.abs().max() < 1e-12 for value in weights(net).values())


class Probe(LoRAMixin, Still):
    decay = 5.0

    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))


def test_of_lora_decay_to_zero_and_decay_to_the_start_are_both_a_return_to_the_pretrained_network(fit):
    x = torch.randn(5, 4, dtype=torch.float64)
    for decay, callbacks in ((5.0, ()), (0.0, (DecayToPretrained({"backbone.*": 5.0}),))):
        net = Probe().double()
        net.decay, before = decay, net.backbone(x)
        fit(net, *callbacks, Moved(), steps=64, epochs=20)
        assert torch.allclose(net.backbone(x), before, rtol=0, atol=1e-12)


class Stepping(Toy):
    """Momentum and a rate that changes at every step."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Formula(pl.Callback):
    """Steps of SGD with momentum 0.9 and the pull, by hand."""

    def __init__(self, rate, lr=None) -> None:
        self.rate, self.lr, self.steps = rate, lr, 0

    def on_train_start(self, trainer, pl_module):
        self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.now = {name: value.clone() for name, value in self.start.items()}
        self.momentum = {name: torch.zeros_like(value) for name, value in self.start.items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in pl_module.named_parameters():
            if id(p) in held and p.grad is not None:
                lr = held[id(p)]["lr"] * (self.lr(name) if self.lr else 1.0)
                self.momentum[name] = 0.9 * self.momentum[name] + p.grad
                stepped = self.now[name] - lr * self.momentum[name]
                self.now[name] = stepped - lr * self.rate(name) * (stepped - self.start[name])

    def check(self, pl_module):
        for name, p in pl_module.named_parameters():
            assert torch.allclose(p, self.now[name], rtol=0, atol=1e-12), name


def rate_of(name):
    return 0.7 if name.startswith("head") else 2.0 if name == "backbone.0.weight" else 0.0


RATES = {"head.*": 0.7, "backbone.0.weight": 2.0, "*": 0.0}


def test_every_step_is_the_formula_with_rates_by_name_and_the_learning_rate_of_the_step(fit):
    net, formula = Stepping().double(), Formula(rate_of)
    fit(net, DecayToPretrained(RATES), formula, epochs=3)
    formula.check(net)
    assert not torch.allclose(net.backbone[0].weight, formula.start["backbone.0.weight"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_rates_that_are_scaled_for_the_step_only_count_as_scaled(fit, first):
    def lr(name):
        return 0.5 if name.startswith("backbone") else 1.0

    net, formula = Stepping().double(), Formula(rate_of, lr)
    schedule = FreezeSchedule([Phase(["*"], lr_scale={"backbone.*": 0.5})])
    decay = DecayToPretrained(RATES)
    fit(net, *((decay, schedule) if first else (schedule, decay)), formula, epochs=3)
    formula.check(net)


def test_accumulated_batches_are_one_step_and_clipping_does_not_cut_the_pull(fit):
    net, formula = Stepping().double(), Formula(rate_of)
    fit(net, DecayToPretrained(RATES), formula, epochs=3, accumulate_grad_batches=2)
    formula.check(net)
    net, decay = Still().double(), DecayToPretrained(5.0)
    start = weights(net)
    fit(net, decay, Moved(), epochs=20, steps=64, gradient_clip_val=1e-9)
    assert max(float((value - start[name]).abs().max()) for name, value in weights(net).items()) <= 2e-14


class Manual(Stepping):
    """Two optimizers, stepped by hand, of which one rests every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [
            torch.optim.SGD(part.parameters(), lr=lr, momentum=0.9)
            for part, lr in ((self.backbone, 0.05), (self.head, 0.1))
        ]

    def training_step(self, batch, batch_idx):
        for number, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if number == 0 or batch_idx % 2:
                optimizer.step()


def test_every_optimizer_of_a_module_that_steps_by_hand_pulls_its_own(fit):
    net, formula = Manual().double(), Formula(rate_of)
    fit(net, DecayToPretrained(RATES), formula, epochs=3)
    formula.check(net)


def test_what_is_frozen_is_neither_moved_nor_copied_and_pulled_to_its_own_start_once_it_trains(fit):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((set(decay.state_dict()["start"]), weights(pl_module.backbone)))

    seen, net, decay = [], Stepping(), DecayToPretrained(2.0)
    start = weights(net.backbone)
    fit(net, decay, FreezeSchedule([Phase(["head.*"], steps=5), Phase(["*"])]), Look(), epochs=3)
    assert seen[4][0] == {"head.weight", "head.bias"}
    assert all(same(found, start) for _, found in seen[:5])
    assert not same(seen[5][1], start)
    assert same({name[9:]: kept for name, kept in decay.state_dict()["start"].items() if name[:4] == "back"}, start)


def test_a_weight_without_a_gradient_takes_no_step_and_is_not_pulled(fit):
    class Spare(Still):
        def __init__(self) -> None:
            super().__init__()
            self.spare = torch.nn.Linear(2, 2)

    class Keep(Moved):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            kept.append(weights(pl_module))

    kept, net = [], Spare()
    fit(net, DecayToPretrained(1.0), Keep(), steps=3)
    assert torch.equal(kept[0]["spare.weight"], kept[2]["spare.weight"])
    assert not torch.equal(kept[0]["head.weight"], kept[2]["head.weight"])


class Twice(torch.optim.AdamW):
    """A step that calls the one of its base, whose hooks run too where an optimizer of the base was made before."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_within_a_step_is_one_pull(fit):
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    ends = []
    for kind in (torch.optim.AdamW, Twice):
        pl.seed_everything(1, verbose=False)
        net = Still().double()
        net.kind = kind
        fit(net, DecayToPretrained(1.0), Moved(), epochs=2)
        ends.append(weights(net))
    assert same(*ends)


class Fused(Stepping):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


class Overflows(pl.Callback):
    """Tells a fused optimizer what the gradient scaler tells it: that every second step has an infinite gradient."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        optimizer.found_inf = torch.tensor(float(trainer.global_step % 2))
        self.weight = pl_module.head.weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moved.append(not torch.equal(self.weight, pl_module.head.weight))


moved: list[bool] = []


def test_a_step_that_a_fused_optimizer_leaves_out_has_no_pull(fit):
    moved.clear()
    fit(Fused(), DecayToPretrained(1.0), Overflows(), steps=4)
    assert moved == [True, False, True, False]


@pytest.mark.parametrize("done", [1, 3, 4, 7])
def test_a_resumed_run_pulls_to_the_same_place(fit, tmp_path, done):
    def run(skip=0, **options):
        pl.seed_everything(1, verbose=False)
        net, save = Stepping(), pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(net, DecayToPretrained(RATES), save, epochs=3, fit_with=(Batches(skip),), **options)
        return net

    whole = run()
    saved = torch.load(tmp_path / f"step={done}.ckpt", weights_only=True)["callbacks"]["DecayToPretrained"]["start"]
    assert saved.keys() == {"head.weight", "head.bias", "backbone.0.weight"}
    assert same(weights(whole), weights(run(skip=done % 4, ckpt_path=tmp_path / f"step={done}.ckpt")))


def test_a_resumed_run_leaves_the_state_that_it_came_from_alone_and_forgets_what_the_module_lacks():
    decay = DecayToPretrained(1.0)
    decay.load_state_dict({"start": {"gone.weight": torch.ones(2)}})
    trainer = pl.Trainer(callbacks=[decay], max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Stepping())
    assert "gone.weight" not in decay.state_dict()["start"]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_does_the_same_before_during_and_after_a_fit(fit, twin):
    class Copies(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.copy = twin(trainer.callbacks[0])

    def ended(decay, *callbacks):
        pl.seed_everything(2, verbose=False)
        net = Stepping()
        fit(net, decay, *callbacks)
        return weights(net)

    decay, copies = DecayToPretrained(RATES), Copies()
    before, during = twin(decay), ended(decay, copies)
    assert not copies.copy._handles
    for other in (before, copies.copy, twin(decay), decay):
        assert same(ended(other), during)


def test_an_optimizer_that_decays_to_zero_is_named_with_the_cure(fit, net):
    with pytest.warns(
        UserWarning, match="DecayToPretrained: SGD also decays 'head.weight' and 1 more to zero.*weight_decay=0"
    ):
        fit(net, DecayToPretrained({"head.*": 0.1}))


def test_no_hook_is_left_behind(fit):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop")

    for callbacks in ((), (Stops(),)):
        net, decay, kept = Still(), DecayToPretrained(0.5), []
        net.configure_optimizers = lambda net=net, kept=kept: kept.append(Still.configure_optimizers(net)) or kept[0]
        try:
            fit(net, *callbacks, decay)
        except RuntimeError as error:
            assert str(error) == "stop"  # noqa: PT017
        assert not kept[0]._optimizer_step_post_hooks
        assert not kept[0]._optimizer_step_pre_hooks
        assert not decay._handles


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (-1.0, "rate=-1.0 of '\\*' must be a finite number of at least 0"),
        (float("nan"), "rate=nan of"),
        ({"a": True}, "rate=True of 'a'"),
        ({"head.*": 0.0}, ".* pulls nothing"),
        ({}, ".* pulls nothing"),
    ],
)
def test_a_rate_out_of_range_is_refused(rate, message):
    with pytest.raises(ValueError, match=f"DecayToPretrained: {message}"):
        DecayToPretrained(rate)


def test_before_training_it_refuses_names_that_match_nothing_and_pulls_beyond_the_start(fit):
    with pytest.raises(ValueError, match="DecayToPretrained: 'bakbone.*' matches none of 6 parameters"):
        fit(Still(), DecayToPretrained({"bakbone.*": 0.1}))
    with pytest.raises(ValueError, match="rate=20.0 of 'backbone.0.weight' with a learning rate of 0.1 is a pull of 2"):
        fit(Still(), DecayToPretrained(20.0))


def test_a_schedule_that_raises_the_rate_later_does_not_carry_weights_beyond_their_start(fit):
    class Rising(Still):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 50.0 if step > 2 else 1.0)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    net = Rising()
    start = weights(net)
    fit(net, DecayToPretrained(1.0), Moved(), steps=4)
    assert same(weights(net), start)


def test_rows_in_a_loader_of_the_users_own_are_fine_too(fit):
    net, formula = Stepping().double(), Formula(rate_of)
    fit(net, DecayToPretrained(RATES), formula, fit_with=(DataLoader(rows(24, dtype=torch.float64), 5),))
    formula.check(net)

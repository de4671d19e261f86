"""What is shown are the gradients and steps that there were; nothing of the training changes."""

import copy
import io
import itertools
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_peft import LoRA, adapted
from lightning_peft.callbacks import FreezeSchedule, Phase, ZeroInitHead
from lightning_peft.callbacks.gradient_flow import GradientFlow
from tests.toy import Batches, Toy, rows, same, weights

BLOCKS = {"low": "backbone.0.*", "high": "backbone.2.*", "head": "head.*"}


class Ordered(Toy):
    """The toy on rows in their own order, in float64."""

    def train_dataloader(self):
        return DataLoader(rows(24, dtype=torch.float64), 6)


def by_hand(net, *, steps, rows_per_step=6, clip=None):
    """Train a copy without Lightning; return norms and ratios by block and step, and leave the weights in ``net``."""
    optimizer = net.configure_optimizers()
    data = rows(24, dtype=torch.float64)
    norms, ratios = ({block: [] for block in ("backbone.0", "backbone.2", "head")} for _ in range(2))
    for step in range(steps):
        first = step * rows_per_step % 24
        x, y = data[first : first + rows_per_step]
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        parts = {block: [p for name, p in net.named_parameters() if name.startswith(block)] for block in norms}
        before = {block: torch.cat([p.detach().flatten() for p in parts[block]]) for block in parts}
        for block, found in parts.items():
            norms[block].append((step, float(torch.cat([p.grad.flatten() for p in found]).norm())))
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        for block, found in parts.items():
            moved = torch.cat([p.detach().flatten() for p in found]) - before[block]
            ratios[block].append((step, float(moved.norm() / before[block].norm())))
    return norms, ratios


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for block, values in wanted.items():
        assert [step for step, _ in found[block]] == [step for step, _ in values]
        assert [value for _, value in found[block]] == pytest.approx([value for _, value in values], rel=1e-10)
    return True


@pytest.mark.parametrize("clip", [None, 0.05])
def test_norms_are_those_before_clipping_and_updates_those_that_were_made(fit, clip):
    net, flow = Ordered().double(), GradientFlow()
    norms, ratios = by_hand(copy.deepcopy(net), steps=8, clip=clip)
    trainer = fit(net, flow, epochs=2, gradient_clip_val=clip)
    assert close(flow.norms, norms)
    assert close(flow.updates, ratios)
    assert float(trainer.callback_metrics["flow/gradient/head"]) == pytest.approx(norms["head"][-1][1])
    assert float(trainer.callback_metrics["flow/update/head"]) == pytest.approx(ratios["head"][-1][1])


def test_accumulated_gradients_are_those_of_the_whole_batch(fit):
    net, flow = Ordered().double(), GradientFlow()
    norms, ratios = by_hand(copy.deepcopy(net), steps=2, rows_per_step=12)
    fit(net, flow, accumulate_grad_batches=2)
    assert close(flow.norms, norms)
    assert close(flow.updates, ratios)


def test_every_first_step_is_looked_at_and_few_later_ones(fit, net):
    flow = GradientFlow(4, first=3)
    fit(net, flow, epochs=4)
    assert [step for step, _ in flow.norms["head"]] == [0, 1, 2, 4, 8, 12]
    assert [step for step, _ in flow.updates["head"]] == [0, 1, 2, 4, 8, 12]


def test_of_a_zero_head_the_first_gradient_below_it_is_zero(fit, net):
    flow = GradientFlow()
    fit(net, flow, ZeroInitHead(), steps=2)
    assert flow.norms["backbone.0"][0] == (0, 0.0)
    assert flow.norms["backbone.0"][1][1] > 0
    assert flow.norms["head"][0][1] > 0
    assert [step for step, _ in flow.updates["head"]] == [1]  # nothing to relate the first step to


def test_a_frozen_block_has_no_value(fit, net):
    flow = GradientFlow()
    fit(net, flow, FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"])]))
    assert {block: [step for step, _ in values] for block, values in flow.norms.items()} == {
        "backbone.0": [2, 3], "backbone.2": [2, 3], "head": [0, 1, 2, 3],
    }  # fmt: skip


def test_blocks_may_be_named_and_a_glob_without_match_is_refused_before_training(fit, net):
    flow = GradientFlow(blocks={"below": "backbone.*"})
    fit(net, flow, steps=1)
    assert list(flow.norms) == ["below"]
    start = weights(net)
    with pytest.raises(ValueError, match="GradientFlow: 'bakbone.*' matches none of 6 parameters"):
        fit(net, GradientFlow(blocks={"below": "bakbone.*"}))
    assert same(weights(net), start)


def test_an_adapter_s_blocks_are_those_that_train(fit):
    flow = GradientFlow(blocks={"backbone": "backbone.*", "head": "head.*"})
    net = adapted(Toy, LoRA(rank=2), backbone="backbone")()
    fit(net, flow, steps=2)
    by_name = GradientFlow(blocks={"added": "*lora*", "head": "head.*"})
    fit(adapted(Toy, LoRA(rank=2), backbone="backbone")(), by_name, steps=2)
    assert flow.norms.keys() == {"backbone", "head"}
    assert by_name.norms.keys() == {"added", "head"}


class ByHand(Ordered):
    """Two optimizers that share a block; the second one steps twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        head = [self.head.weight, *self.backbone.parameters()]
        return torch.optim.AdamW(head, lr=0.1), torch.optim.SGD([self.head.bias], lr=0.1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.seen = [self.head.weight.grad.norm(), self.head.bias.grad.norm()]
        first.step()
        second.step()
        second.step()
        first.zero_grad()
        second.zero_grad()


def test_a_block_of_two_optimizers_has_the_norm_of_both_parts(fit):
    net, flow = ByHand().double(), GradientFlow()
    fit(net, flow, steps=3)
    weight, bias = (float(norm) for norm in net.seen)
    # One batch: both optimizers together at step 0, and the second one's second step by itself.
    assert flow.norms["head"] == [
        (0, pytest.approx((weight**2 + bias**2) ** 0.5, rel=1e-12)),
        (2, pytest.approx(bias, rel=1e-12)),
    ]
    assert flow.norms["backbone.0"][0][0] == 0
    assert len(flow.norms["backbone.0"]) == 1


def test_each_optimizer_has_its_own_count_of_steps(fit):
    net, flow = ByHand().double(), GradientFlow(2, first=0)
    fit(net, flow, steps=9)
    # The first one's steps are the trainer's 0, 3 and 6, of which every second counts; the second one's 1 2, 4 5 and 7 8.
    assert [step for step, _ in flow.norms["backbone.0"]] == [0, 6]
    assert [step for step, _ in flow.norms["head"]] == [0, 4, 6]


class Searching(Ordered):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_an_optimizer_that_asks_for_several_gradients_is_looked_at_once_a_step(fit):
    net, flow = Searching().double(), GradientFlow()
    start = copy.deepcopy(net)
    fit(net, flow, steps=2)
    x, y = rows(24, dtype=torch.float64)[:6]
    F.cross_entropy(start(x), y).backward()
    assert [step for step, _ in flow.norms["head"]] == [0, 1]
    assert flow.norms["head"][0][1] == pytest.approx(
        float(torch.cat([p.grad.flatten() for p in start.head.parameters()]).norm())
    )


class Overflowing(pl.plugins.precision.MixedPrecision):
    """Leaves the second step out, as a gradient scaler does that finds an infinite gradient."""

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        if model.global_step != 1:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        result = closure()
        self._after_closure(model, optimizer)
        return result


def test_a_step_that_the_gradient_scaler_leaves_out_has_a_gradient_and_no_update(fit, net):
    flow = GradientFlow()
    fit(net, flow, plugins=[Overflowing("bf16-mixed", "cpu")])
    assert [step for step, _ in flow.norms["head"]] == [0, 1, 2, 3]
    assert [step for step, _ in flow.updates["head"]] == [0, 2, 3]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_bit_identical_with_and_without_it(fit, dropout):
    ends = []
    for callbacks in ((), (GradientFlow(2, first=3),)):
        pl.seed_everything(3, verbose=False)
        net = Toy(dropout=dropout)
        fit(net, *callbacks, epochs=3, gradient_clip_val=0.1)
        ends.append((weights(net), torch.rand(3)))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("done", [2, 4, 5])
def test_a_resumed_run_has_seen_the_whole(fit, tmp_path, done):
    def save():
        return pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def run(callback, skip=0, **options):
        pl.seed_everything(1, verbose=False)
        fit(Toy(), callback, save(), epochs=3, fit_with=(Batches(skip),), **options)
        return callback

    whole = run(GradientFlow(3, first=3))
    resumed = run(GradientFlow(3, first=3), skip=done % 4, ckpt_path=tmp_path / f"step={done}.ckpt")
    assert [step for step, _ in whole.norms["head"]] == [0, 1, 2, 3, 6, 9]
    assert resumed.norms == whole.norms
    assert resumed.updates == whole.updates
    state = torch.load(tmp_path / f"step={done}.ckpt", weights_only=True)["callbacks"]["GradientFlow"]
    read = GradientFlow()
    read.load_state_dict(state)
    assert read.norms == {
        block: [(step, value) for step, value in values if step < done] for block, values in whole.norms.items()
    }


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_sees_the_same_before_during_and_after_a_fit(fit, twin):
    class Copies(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.copy = twin(trainer.callbacks[0])

    def seen(flow, *callbacks):
        pl.seed_everything(2, verbose=False)
        fit(Toy(), flow, *callbacks)
        return flow.norms

    flow, copies = GradientFlow(), Copies()
    before, during = twin(flow), seen(flow, copies)
    assert not copies.copy._handles  # or letting go of the copy would take the hooks of the run
    assert seen(before) == during == seen(copies.copy) == seen(twin(flow)) == seen(flow)


def test_no_hook_is_left_behind(fit, net):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop")

    for callbacks in ((), (Stops(),)):
        kept = []
        net.configure_optimizers = lambda kept=kept: kept.append(Toy.configure_optimizers(net)) or kept[0]
        flow = GradientFlow()
        try:
            fit(net, *callbacks, flow)
        except RuntimeError as error:
            assert str(error) == "stop"  # noqa: PT017
        assert not kept[0]._optimizer_step_post_hooks
        assert not flow._handles


def test_a_long_run_keeps_its_first_looks_and_thins_out_the_rest_evenly(fit, net, monkeypatch):
    monkeypatch.setattr("lightning_peft.callbacks.gradient_flow._KEPT", 8)
    flow = GradientFlow(1, first=3)
    fit(net, flow, epochs=9)
    steps = [step for step, _ in flow.norms["head"]]
    assert len(steps) == 3 + 8
    assert steps[:3] == [0, 1, 2]
    assert steps[-1] == 35
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= 2 * (35 - 2) / 8


def test_tensorboard_has_the_scalars_the_charts_and_one_picture(fit, net, tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version=name, default_hp_metric=False) for name in ("one", "two")]
    flow = GradientFlow(2, first=1)
    fit(net, flow, logger=loggers)
    for name in ("one", "two"):
        events = EventAccumulator(str(tmp_path / name)).Reload()
        for kind, table in (("gradient", flow.norms), ("update", flow.updates)):
            for block, values in table.items():
                scalars = events.Scalars(f"flow/{kind}/{block}")
                assert [(event.step, event.value) for event in scalars] == [
                    (step, pytest.approx(value)) for step, value in values
                ]
        assert events.Tags()["images"] == ["flow/gradient"]
        (image,) = events.Images("flow/gradient")
        assert image.step == 4
        assert Image.open(io.BytesIO(image.encoded_image_string)).size[0] >= 800


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}, {"limit_train_batches": 1}])
def test_it_watches_without_loggers_and_in_short_runs(fit, net, options):
    flow = GradientFlow()
    fit(net, flow, **options)
    assert flow.norms["head"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number of at least 1"),
        ({"first": -1}, "first=-1 must be a whole number of at least 0"),
        ({"every_n_steps": 2.5}, "every_n_steps=2.5"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"GradientFlow: {message}"):
        GradientFlow(**arguments)


def test_a_frozen_head_still_lets_its_gradient_through(fit, net):
    """What enters the backbone does not depend on whether the head itself trains."""
    open_head, frozen_head = GradientFlow(), GradientFlow()
    other = copy.deepcopy(net)
    other.head.requires_grad_(False)
    fit(net, open_head, steps=1, fit_with=(Batches(),))
    fit(other, frozen_head, steps=1, fit_with=(Batches(),))
    assert open_head.norms["backbone.0"] == frozen_head.norms["backbone.0"]
    assert "head" not in frozen_head.norms

"""A gradient loses what points against the old one, exactly; nothing else changes."""

import copy
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.callbacks.freeze_schedule import FreezeSchedule, Phase
from lightning_peft.callbacks.gradient_projection import GradientProjection, project_gradients
from tests.toy import Toy, rows, same, weights


def turned(count, seed=7, dtype=torch.float32):
    """Old rows whose labels are the opposite of the new ones'."""
    x, y = rows(count, seed, dtype).tensors
    return TensorDataset(x, 1 - y)


def loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class Gradients(pl.Callback):
    """The gradient before every step; stands before or behind the projection."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(flat(p.grad.clone() for p in pl_module.parameters() if p.grad is not None))


def spied(fit, net, projection, **options):
    """Train; return the gradients before and after projection, and the old rows' by a second, separate computation."""
    before, after, references = Gradients(), Gradients(), []

    class Reference(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            twin = copy.deepcopy(pl_module)
            x, y = projection.rows.tensors
            index = projection.indices(trainer.global_step)
            for parameter in twin.parameters():
                parameter.grad = None
            loss(twin, (x[index], y[index])).backward()
            references.append(flat(p.grad for p in twin.parameters() if p.grad is not None))

    fit(net, Reference(), before, projection, after, **options)
    return zip(before.seen, after.seen, references, strict=True)


def by_hand(g, r):
    """Equation 11 of the paper, in numpy."""
    g, r = g.numpy(), r.numpy()
    return g if g @ r >= 0 else g - (g @ r) / (r @ r) * r


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_gradient_is_the_paper_s_and_none_points_against_the_old_one(fit, accumulate):
    projection = GradientProjection(turned(30, dtype=torch.float64), loss, batch_size=8)
    steps = list(spied(fit, Toy().double(), projection, epochs=3, accumulate_grad_batches=accumulate))
    assert len(steps) == 12 // accumulate
    against = [float(g @ r) < 0 for g, _, r in steps]
    assert any(against)
    for g, projected, r in steps:
        np.testing.assert_allclose(projected.numpy(), by_hand(g, r), rtol=1e-10, atol=1e-14)
        assert float(projected @ r) >= -1e-12
    assert (projection.steps, projection.projected) == (len(steps), sum(against))
    g, _, r = steps[-1]
    assert projection.alignment == pytest.approx(float(g @ r / (g.norm() * r.norm())), rel=1e-10)


def test_where_both_agree_nothing_changes_bit_for_bit(fit):
    projection = GradientProjection(rows(24), loss, batch_size=24)
    x, y = rows(24).tensors
    for before, after, reference in spied(fit, Toy(), projection, fit_with=(DataLoader(rows(24), 24),), epochs=6):
        assert float(before @ reference) > 0
        assert torch.equal(before, after)
    assert projection.projected == 0
    assert projection.alignment == pytest.approx(1, abs=1e-5)


class Noisy(Toy):
    def __init__(self):
        super().__init__(dropout=0.5)
        self.backbone.append(nn.BatchNorm1d(8))


def test_without_a_conflict_the_whole_run_is_bit_identical(fit):
    """Also with dropout, running statistics, and rows that draw random numbers themselves."""

    class Drawing(TensorDataset):
        def __getitem__(self, index):
            torch.rand(3), np.random.rand(3)
            return super().__getitem__(index)

    def constant(module, batch):
        module(batch[0])
        return module.head.weight.sum() * 0  # its gradient is zero: never a conflict

    ends = []
    for callbacks in ((), (GradientProjection(Drawing(*turned(30).tensors), constant, batch_size=8),)):
        pl.seed_everything(5, verbose=False)
        net = Noisy()
        fit(net, *callbacks, epochs=2)
        ends.append(weights(net))
    assert same(*ends)


def test_running_statistics_count_old_rows_only_if_asked(fit):
    def statistics(**options):
        pl.seed_everything(5, verbose=False)
        net = Noisy()
        fit(net, GradientProjection(turned(30), loss, batch_size=8, **options), steps=1)
        return net.backbone[4].num_batches_tracked

    assert statistics() == 1
    assert statistics(update_statistics=True) == 2


def test_old_rows_come_by_seed_and_step_alone_and_ranks_share_them():
    projection = GradientProjection(turned(10), loss, batch_size=4, seed=3)
    drawn = [index for step in range(5) for index in projection.indices(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert GradientProjection(turned(10), loss, batch_size=4, seed=4).indices(0) != projection.indices(0)
    for world in (1, 2, 3, 4):
        parts = [projection.indices(2, rank, world) for rank in range(world)]
        assert [index for part in parts for index in part] == projection.indices(2)
        assert all(parts)


@pytest.mark.parametrize("world", [2, 3])
def test_the_mean_over_ranks_is_the_gradient_on_all_rows(fit, world):
    """The reduction alone, on stand-ins for the processes: no process is launched."""
    net, memory = Toy().double(), turned(20, dtype=torch.float64)
    parameters, shares = list(net.parameters()), []
    projection = GradientProjection(memory, loss, batch_size=7)

    class Strategy:
        def batch_to_device(self, batch):
            return batch

        def reduce(self, tensor, reduce_op):
            assert reduce_op == "mean"
            shares.append(tensor.clone())
            return torch.stack(shares).mean(0)

    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)

    class Stand:
        strategy, precision_plugin, scaler, train_dataloader = Strategy(), trainer.precision_plugin, None, None
        global_step, world_size, global_rank = 5, world, 0

    for rank in range(world):
        Stand.global_rank = rank
        found = projection._reference(Stand, net, parameters)
    whole = [memory[index] for index in projection.indices(5)]
    expected = loss(net, (torch.stack([x for x, _ in whole]), torch.stack([y for _, y in whole])))
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, parameters)), rtol=1e-12, atol=1e-14)


def test_clipping_comes_after(fit):
    after, clipped = Gradients(), []

    class Clips(Toy):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            clipped.append(flat(p.grad.clone() for p in self.parameters()))

    fit(Clips(), GradientProjection(turned(30), loss, batch_size=8), after, epochs=2, gradient_clip_val=0.01)
    assert float(after.seen[0].norm()) > 0.02
    for free, short in zip(after.seen, clipped, strict=True):
        torch.testing.assert_close(short, free * 0.01 / (free.norm() + 1e-6), rtol=1e-4, atol=1e-8)


def test_only_what_trains_is_projected(fit):
    projection = GradientProjection(turned(30, dtype=torch.float64), loss, batch_size=8)
    net = Toy().double()
    start = weights(net)
    schedule = FreezeSchedule([Phase(train=["head.*"])])
    after = Gradients()
    fit(net, schedule, projection, after, epochs=2)
    assert all(seen.numel() == 18 for seen in after.seen)
    assert torch.equal(net.backbone[0].weight, start["backbone.0.weight"])
    assert projection.projected > 0


def test_on_old_rows_it_forgets_less(fit):
    """The other half of the space has the opposite labels."""
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    y, half = (x.sum(1) > 0).long(), x[:, 0] > 0
    old, new = TensorDataset(x[half], y[half]), TensorDataset(x[~half], 1 - y[~half])
    learned = Toy()
    fit(learned, fit_with=(DataLoader(old, 20),), epochs=3)
    losses = {}
    for name, callbacks in (("without", ()), ("with", (GradientProjection(old, loss),))):
        net = copy.deepcopy(learned)
        fit(net, *callbacks, fit_with=(DataLoader(new, 20),), epochs=3)
        losses[name] = [float(loss(net, data.tensors).detach()) for data in (old, new)]
    before = float(loss(learned, old.tensors).detach())
    assert losses["with"][0] - before < 0.5 * (losses["without"][0] - before)


class Saves(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_ends_like_one_that_never_stopped(fit, tmp_path):
    def run(*callbacks, **options):
        pl.seed_everything(5, verbose=False)
        net, projection = Toy(), GradientProjection(turned(30), loss, batch_size=8)
        net.train_dataloader = lambda: DataLoader(rows(24), 6)
        fit(net, projection, *callbacks, epochs=3, **options)
        return weights(net), projection.state_dict()

    whole = run(Saves(tmp_path / "first.ckpt"))
    torch.load(tmp_path / "first.ckpt", weights_only=True)
    again = run(ckpt_path=tmp_path / "first.ckpt")
    assert same(whole[0], again[0])
    assert whole[1] == again[1]
    assert whole[1]["steps"] == 12


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_does_the_same(fit, twin):
    def run(projection):
        pl.seed_everything(5, verbose=False)
        net = Toy()
        fit(net, projection, epochs=2)
        return weights(net)

    projection = GradientProjection(turned(30), loss, batch_size=8)
    first = twin(projection)
    ends = run(projection), run(first), run(twin(projection)), run(projection)
    assert all(same(ends[0], end) for end in ends[1:])


def test_it_logs_how_often_it_projected(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    projection = GradientProjection(turned(30), loss, batch_size=8)
    trainer = fit(Toy(), projection, epochs=2, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    shares = [event.value for event in events.Scalars("replay/projected")]
    assert shares[-1] == pytest.approx(projection.projected / 8)
    assert 0 < projection.projected <= 8
    assert float(trainer.callback_metrics["replay/alignment"]) == pytest.approx(projection.alignment)


def test_the_function_leaves_alone_what_it_must():
    g, r = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    for gradient, reference in (
        (g, -r),
        (g, torch.zeros(2)),
        (g, torch.tensor([1.0, 0.5])),  # orthogonal
        (torch.tensor([float("nan"), 1.0]), r),
        (torch.tensor([1.0, -2.0]), torch.tensor([0.0, float("inf")])),
    ):
        mine = gradient.clone()
        assert project_gradients([mine], [reference])[0] is False
        assert torch.equal(mine, gradient) or gradient.isnan().any()
    assert project_gradients([], []) == (False, 0.0)


def test_half_precision_is_projected_too(fit):
    projection = GradientProjection(turned(30), loss, batch_size=8)
    fit(Toy(), projection, epochs=2, precision="bf16-mixed")
    assert projection.projected > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientProjection(turned(30), "loss"), "step='loss' must be a function"),
        (lambda: GradientProjection(turned(30), loss, batch_size=0), "batch_size=0 must be a whole number"),
        (
            lambda: GradientProjection(TensorDataset(torch.zeros(0, 4)), loss),
            "GradientProjection: memory: the TensorDataset is empty",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_work_is_refused_before_training(fit, trainer):
    with pytest.raises(ValueError, match="strategy ModelParallelStrategy"):
        GradientProjection(turned(30), loss).setup(
            trainer(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)), Toy(), "fit"
        )
    with pytest.raises(ValueError, match="the first row of the memory cannot be put into a batch"):
        fit(Toy(), GradientProjection([object()] * 3, loss))
    with pytest.raises(ValueError, match="step returned .*; it must return the loss"):
        fit(Toy(), GradientProjection(turned(30), lambda module, batch: module(batch[0]).argmax(1)))

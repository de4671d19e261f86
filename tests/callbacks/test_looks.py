"""Callbacks that look at a generative module change nothing, look when they say, and go on after a resume."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.callbacks import ExactResume, GenerationMetrics, LatentPlane, SampleGrid
from tests.toy import Toy, rows, same, weights


class Sketch(pl.LightningModule):
    """A tiny autoencoder with dropout and batch normalisation, whose rows are images of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
        self.decoder = nn.Linear(3, 4)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, latents):
        return self.decoder(latents).reshape(-1, 1, 2, 2)

    def sample(self, count):
        return self.decode(torch.randn(count, 3, device=self.device))

    def training_step(self, batch, batch_idx):
        noisy = batch[0] + torch.randn_like(batch[0])
        return F.mse_loss(self.decoder(self.encode(noisy)), batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)

    def train_dataloader(self):
        return DataLoader(rows(24), 6, shuffle=True)


def real(count=30):
    return rows(count).tensors[0].reshape(-1, 1, 2, 2)


MADE = {
    "SampleGrid": lambda every=3: SampleGrid(count=4, every_n_steps=every),
    "LatentPlane": lambda every=3: LatentPlane(rows(20), every_n_steps=every, side=2),
    "GenerationMetrics": lambda every=3: GenerationMetrics(real(), count=20, k=2, every_n_steps=every),
}
each = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


def seen(callback):
    """What the last look found."""
    if isinstance(callback, GenerationMetrics):
        return callback.values
    return (callback.samples if isinstance(callback, SampleGrid) else callback.latents).tolist()


@each
def test_training_is_bit_identical_with_it(make, fit):
    ends, draws = [], []
    for callbacks in ([], [make(1)]):
        torch.manual_seed(2)
        net = Sketch()
        fit(net, *callbacks, epochs=2)
        ends.append(weights(net))
        draws.append(torch.rand(3))
        assert net.encoder[2].training
    assert same(*ends)
    assert torch.equal(*draws)


@each
def test_it_looks_every_so_many_steps_and_after_the_last(make, fit):
    callback, steps = make(3), []
    callback._look = lambda trainer, module: steps.append(trainer.global_step)
    fit(Sketch(), callback, epochs=5, accumulate_grad_batches=2)
    assert steps == [3, 6, 9, 10]


@each
def test_a_second_fit_that_begins_earlier_is_looked_at(make, fit, tmp_path):
    fit(Sketch(), steps=2).save_checkpoint(tmp_path / "two.ckpt")
    callback, steps = make(3), []
    callback._look = lambda trainer, module: steps.append(trainer.global_step)
    fit(Sketch(), callback, steps=8)
    fit(Sketch(), callback, steps=7, ckpt_path=tmp_path / "two.ckpt")
    assert steps == [3, 6, 8, 3, 6, 7]


@each
def test_a_look_is_in_eval_mode_without_gradient_and_from_the_same_seed(make, fit):
    found = []

    class Frozen(Sketch):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

        def sample(self, count):
            found.append((self.encoder.training, torch.is_grad_enabled(), torch.initial_seed()))
            return super().sample(count)

    callback, looks = make(1), []
    inner = callback._look

    def look(trainer, module):
        for layer in module.encoder:  # batch statistics would move with training batches
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_running_stats()
        inner(trainer, module)
        looks.append(seen(callback))

    callback._look = look
    fit(Frozen(), callback, epochs=1)
    assert len(looks) == 4
    assert all(one == looks[0] for one in looks)
    assert set(found) <= {(False, False, 0)}


@each
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_looks_where_the_whole_one_does(make, fit, tmp_path):
    def run(folder, ckpt_path=None):
        torch.manual_seed(2)
        callback, steps = make(3), []
        inner = callback._look
        callback._look = lambda trainer, module: (steps.append(trainer.global_step), inner(trainer, module))
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        fit(Sketch(), callback, ExactResume(), keep, epochs=2, ckpt_path=ckpt_path)
        return steps, seen(callback)

    whole, last = run("whole")
    again, after = run("again", tmp_path / "whole" / "step=4.ckpt")
    assert whole == [3, 6, 8]
    assert again == [6, 8]
    assert after == last


@each
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_are_looked_at(make, fit):
    first, second = make(1), make(1)
    net = Sketch()
    fit(net, first, EMAWeightAveraging(decay=0.9), epochs=2)
    fit(Sketch(), second, epochs=2)
    assert seen(first) != seen(second)


@each
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_what_was_seen(make, twin, fit):
    callback = make()
    fit(Sketch(), callback)
    assert seen(twin(callback)) == seen(callback)


@each
def test_several_of_a_kind_stand_side_by_side_under_names_and_keep_a_state_each(make, fit, tmp_path):
    def named(name):
        callback = make()
        callback.name = name
        return callback

    fit(Sketch(), *map(named, (None, "one", "two")), ModelCheckpoint(tmp_path, "end"), max_steps=2)
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    kind = type(make()).__name__
    assert [key for key in states if key.startswith(kind)] == [
        kind,
        f"{kind}{{'name': 'one'}}",
        f"{kind}{{'name': 'two'}}",
    ]


@each
@pytest.mark.parametrize("every", [0, -1, True, 2.5])
def test_an_interval_that_is_none_is_refused(make, every):
    with pytest.raises(ValueError, match=rf"every_n_steps={every} must be a whole number of at least 1"):
        make(every)


@pytest.mark.parametrize(
    ("name", "method"), [("SampleGrid", "sample"), ("LatentPlane", "encode"), ("GenerationMetrics", "sample")]
)
def test_a_module_that_cannot_is_named_before_the_first_step(name, method, fit):
    net = Toy()
    start = weights(net)
    with pytest.raises(ValueError, match=f"{name}: Toy has no method '{method}'; write one, or pass {method}="):
        fit(net, MADE[name]())
    assert same(weights(net), start)


def test_a_sampler_that_returns_another_number_is_named(fit):
    with pytest.raises(ValueError, match=r"SampleGrid: sample of 4 returned \(3, 1, 2, 2\)"):
        fit(Sketch(), SampleGrid(lambda module, count: module.sample(3), count=4))

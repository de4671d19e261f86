"""The line is that between the weights, also of adapters; the point that is kept is the one that the rule names."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import IA3, LoRA, LoRAMixin, VeRA, add_adapter, merge_adapter
from lightning_peft.callbacks import FreezeSchedule, OldTask, Phase
from lightning_peft.callbacks.weight_interpolation import WeightInterpolation, choose_alpha
from lightning_peft.weight_line import WeightLine
from tests.old_tasks import Noisy, accuracy, error
from tests.toy import Batches, Toy, rows, same, weights

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
ALPHAS = (0.0, 0.25, 0.5, 1.0)


def classify(module, batch):
    return module(batch[0]).argmax(1), batch[1]


def new_task(seed=4):
    return OldTask(rows(50, seed=seed), MulticlassAccuracy(num_classes=2, average="micro"), classify)


def wise(**options):
    return WeightInterpolation(new_task(), {"old": error()}, **{"alphas": ALPHAS, **options})


def between(start, end, alpha):
    return {name: (1 - alpha) * start[name] + alpha * end[name] for name in end}


class Kept(pl.Callback):
    """Weights and values at every point that is measured, seen from the metric's step."""

    def __init__(self) -> None:
        self.points = []

    def task(self):
        def step(module, batch):
            self.points.append((weights(module), copy.deepcopy(module).eval()))
            return module(batch[0])[:, 1], batch[1].float()

        return OldTask(rows(20, seed=9), MeanSquaredError(), step)


def test_every_point_is_measured_with_the_weights_of_the_formula_and_the_ends_are_exact(fit):
    net, kept = Toy(), Kept()
    start = weights(net)
    wise = WeightInterpolation(new_task(), {"old": kept.task()}, alphas=[1.0, 0.5, 0.0, 0.25])
    pl.seed_everything(1, verbose=False)
    fit(net, wise, epochs=3)
    twin = Toy()
    twin.load_state_dict(start)
    pl.seed_everything(1, verbose=False)
    fit(twin, epochs=3)  # the same training without the callback
    end = weights(twin)
    assert not same(start, end)
    x, y = rows(20, seed=9).tensors
    assert [point["alpha"] for point in wise.line] == [0.0, 0.25, 0.5, 1.0]
    for point, (found, net_then) in zip(wise.line, kept.points, strict=True):
        wanted = between(start, end, point["alpha"])
        assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-7) for name in wanted)
        with torch.no_grad():
            value = float((net_then(x)[:, 1] - y).square().mean())
        assert point["old"]["old"] == pytest.approx(value, rel=1e-5)
    assert same(kept.points[0][0], start)
    assert same(kept.points[-1][0], end)
    drops = [point["old"]["old"] - wise.line[0]["old"]["old"] for point in wise.line]
    assert [point["drop"]["old"] for point in wise.line] == pytest.approx(drops)
    assert same(weights(net), dict(zip(ALPHAS, (found for found, _ in kept.points), strict=True))[wise.alpha])


def point(alpha, new, **old):
    return {"alpha": alpha, "new": new, "old": old, "drop": {name: 0.9 - value for name, value in old.items()}}


LINE = [
    point(0.0, 0.1, a=0.9, b=0.9),
    point(0.5, 0.7, a=0.8, b=0.6),
    point(0.8, 0.7, a=0.7, b=0.7),
    point(1.0, 0.9, a=0.1, b=0.6),
]


@pytest.mark.parametrize(
    ("max_drop", "alpha"),
    # means: .5, .7, .7, .625
    [(None, 0.5), (0.0, 0.0), (0.15, 0.0), (0.25, 0.8), (0.31, 0.5), (0.9, 1.0)],
)
def test_the_rule_names_the_point(max_drop, alpha):
    old = {"a": accuracy(), "b": accuracy()}
    assert choose_alpha(LINE, accuracy(), old, max_drop) == alpha


def test_where_lower_is_better_the_lowest_is_the_best_and_no_number_never_is():
    line = [point(0.0, 0.5, a=0.5), point(0.5, 0.2, a=0.6), point(1.0, 0.3, a=0.2)]
    assert choose_alpha(line, error(), {"a": error()}) == 1.0
    assert choose_alpha(line, error(), {"a": error()}, max_drop=1.0) == 0.5
    assert choose_alpha([point(0.0, float("nan"), a=0.1), point(1.0, 0.1, a=0.1)], accuracy(), {"a": accuracy()}) == 1.0


class Probe(LoRAMixin, Toy):
    def __init__(self, **options) -> None:
        super().__init__(adapter=LoRA(rank=2, **options))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def moved_adapter(adapter):
    """A network that carries an adapter, the values it began with, and its present ones, all other than those."""
    torch.manual_seed(0)
    net = add_adapter(nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4)).double(), adapter)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    return net, start


@pytest.mark.parametrize(
    "adapter",
    [LoRA(rank=2, targets=["0", "1"], bias="all"), VeRA(rank=3, targets=["0"]), IA3(targets=["0"])],
    ids=lambda it: type(it).__name__,
)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_of_an_adapter_the_line_is_that_of_the_weights_it_amounts_to(adapter, alpha):
    net, start = moved_adapter(adapter)
    pretrained = {name: p for name, p in start.items() if "adapters" not in name}
    ended = {
        name: p.clone() for name, p in merge_adapter(copy.deepcopy(net)).named_parameters() if "adapters" not in name
    }
    WeightLine(net, start).go_to(alpha)
    merged = {name: p for name, p in merge_adapter(net).named_parameters() if "adapters" not in name}
    wanted = between(pretrained, ended, alpha)
    assert all(torch.allclose(merged[name], wanted[name], rtol=1e-12, atol=1e-12) for name in wanted)
    assert not torch.allclose(ended["0.weight"], pretrained["0.weight"])


def test_after_training_lora_the_kept_point_has_its_share_of_the_update(fit):
    torch.manual_seed(0)
    net = Probe()
    before = net.backbone(X).detach()
    kept = Kept()
    wise = WeightInterpolation(new_task(), {"old": kept.task()}, alphas=ALPHAS)
    fit(net, wise, epochs=3)
    with torch.no_grad():
        assert torch.allclose(kept.points[0][1].backbone(X), before, rtol=0, atol=1e-6)
        layers = [twin.backbone[0](X) for _, twin in kept.points]
    for alpha, found in zip(ALPHAS, layers, strict=True):
        assert torch.allclose(found, (1 - alpha) * layers[0] + alpha * layers[-1], rtol=0, atol=1e-6)
    assert not torch.allclose(layers[0], layers[-1], rtol=0, atol=1e-2)


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}], ids=str)
def test_updates_that_no_scaling_shrinks_are_refused_before_training(fit, options):
    with pytest.raises(ValueError, match="WeightInterpolation: the LoRA of 'backbone.0' has magnitudes.*dora=False"):
        fit(Probe(**options), wise())


def test_an_adapter_that_was_trained_before_and_layers_of_peft_are_refused(fit):
    net = Probe()
    fit(net, epochs=1)
    with pytest.raises(ValueError, match="the adapter of 'backbone.0' has been trained before.*Merge it"):
        fit(net, wise())
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="of the package peft.*from_peft"):
        WeightLine(model, {})


def test_running_statistics_go_along_and_counters_and_infinities_stay(fit):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net.register_buffer("mask", torch.full((2,), float("-inf")))
    start = weights(net)
    net(X)
    net(X)
    end = weights(net)
    WeightLine(net, start).go_to(0.25)
    found = weights(net)
    assert torch.allclose(found["1.running_mean"], 0.25 * end["1.running_mean"] + 0.75 * start["1.running_mean"])
    assert not torch.equal(start["1.running_mean"], end["1.running_mean"])
    assert torch.equal(found["mask"], start["mask"])
    net, kept = Noisy(), Kept()
    start = weights(net)
    fit(net, WeightInterpolation(new_task(), {"old": kept.task()}, alphas=[0, 0.5, 1]))
    (first, _), (middle, _), (last, _) = kept.points
    name = "backbone.1.running_var"
    assert torch.equal(first[name], start[name])
    assert torch.allclose(middle[name], (first[name] + last[name]) / 2)
    assert not torch.equal(first[name], last[name])
    assert int(first["backbone.1.num_batches_tracked"]) == int(last["backbone.1.num_batches_tracked"]) == 4


def test_the_end_of_the_line_is_the_averaged_weights_whatever_the_order(fit):
    ends = []
    for place in (0, 1, None):
        pl.seed_everything(1, verbose=False)
        net, kept = Toy(), Kept()
        callbacks = [EMAWeightAveraging(decay=0.5)]
        if place is not None:
            callbacks.insert(place, WeightInterpolation(new_task(), {"old": kept.task()}, alphas=[0.0, 1.0]))
        fit(net, *callbacks, epochs=2)
        ends.append(weights(net) if place is None else kept.points[-1][0])
    assert same(ends[0], ends[2])
    assert same(ends[1], ends[2])


def test_a_parameter_that_trains_later_goes_back_to_where_it_was_and_training_is_untouched(fit):
    ends = []
    kept = Kept()
    for extra in ((), (WeightInterpolation(new_task(), {"old": kept.task()}, alphas=[0.0, 1.0]),)):
        pl.seed_everything(3, verbose=False)
        net = Toy(dropout=0.3)
        last = Last()
        schedule = FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"])])
        start = weights(net)
        fit(net, schedule, last, *extra, epochs=2)
        ends.append((last.weights, torch.rand(2)))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert same(kept.points[0][0], start)
    assert same(kept.points[1][0], ends[1][0])


class Last(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights = weights(pl_module)


@pytest.mark.parametrize("done", [1, 4, 7])
def test_a_resumed_run_goes_back_along_the_same_line(fit, tmp_path, done):
    def run(callback, skip=0, **options):
        pl.seed_everything(1, verbose=False)
        net, save = Toy(), pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(net, callback, save, epochs=3, fit_with=(Batches(skip),), **options)
        return net

    first, second = wise(), wise()
    whole = run(first)
    torch.load(tmp_path / f"step={done}.ckpt", weights_only=True)
    again = run(second, skip=done % 4, ckpt_path=tmp_path / f"step={done}.ckpt")
    assert same(weights(whole), weights(again))
    assert first.line == second.line
    assert first.alpha == second.alpha


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_and_a_second_fit_find_the_same(fit, twin):
    def found(callback):
        pl.seed_everything(2, verbose=False)
        fit(Toy(), callback)
        return callback.line

    callback = WeightInterpolation(accuracy(), {"old": error()}, alphas=ALPHAS)
    before = twin(callback)
    line = found(callback)
    assert line == found(before) == found(twin(callback)) == found(callback)


def test_the_chosen_point_is_logged_drawn_and_saved(fit, tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    net, callback = Toy(), wise(path=tmp_path / "kept" / "wise.pt")
    trainer = fit(net, callback, epochs=3, logger=logger)
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0}).Reload()
    chosen = next(point for point in callback.line if point["alpha"] == callback.alpha)
    for key, value in {
        "drift/alpha": callback.alpha,
        "learn/interpolated": chosen["new"],
        "retained/interpolated/old": chosen["old"]["old"],
        "forgetting/interpolated/old": chosen["drop"]["old"],
    }.items():
        assert [(event.step, event.value) for event in events.Scalars(key)] == [(12, pytest.approx(value))]
        assert float(trainer.callback_metrics[key]) == pytest.approx(value)
    assert events.Tags()["images"] == ["retained/line"]
    saved = torch.load(callback.path, weights_only=True)
    assert same(saved["state_dict"], weights(net))
    assert saved["alpha"] == callback.alpha
    assert saved["line"] == callback.line
    table = callback.table()
    assert table.columns == ("alpha", "new", "old", "drop of old")
    assert [row[0] for row in table.rows if "*" in row[0]] == [f"{callback.alpha:g} *"]
    assert len(callback.draw().axes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": {}}, "tasks={} must be at least one OldTask"),
        ({"old": {"a": 3}}, "'a' is a int; wrap it"),
        ({"new": 3}, "'new' is a int; wrap it"),
        ({"alphas": [0.0, 0.5]}, "must lie in \\[0, 1\\], with both ends"),
        ({"alphas": [0.0, 1.0, 1.5]}, "must lie in \\[0, 1\\]"),
        ({"max_drop": -0.1}, "max_drop=-0.1 must be at least 0"),
        ({"max_drop": float("nan")}, "max_drop=nan must be at least 0"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=f"WeightInterpolation: .*{message}"):
        WeightInterpolation(**{"new": new_task(), "old": {"old": error()}, **change})

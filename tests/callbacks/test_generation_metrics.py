"""What is logged is what independent libraries measure of the module's samples; the feature network is in no checkpoint."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from lightning_peft.callbacks import GenerationMetrics
from tests.callbacks.test_looks import Sketch, real

neighbors = pytest.importorskip("sklearn.neighbors", reason="needs the extra recipes")
linalg = pytest.importorskip("scipy.linalg")
stats = pytest.importorskip("scipy.stats")


def network():
    torch.manual_seed(9)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh())


def nearest(rows, others):
    return neighbors.NearestNeighbors(n_neighbors=1).fit(others).kneighbors(rows)[0][:, 0]


def test_values_are_those_of_scikit_learn_and_scipy_on_the_last_weights_samples(fit):
    net, features = Sketch(), network()
    metrics = GenerationMetrics(real(), features=features, held_out=real(50)[30:], count=40, k=3, seed=5)
    trainer = fit(net, metrics)
    torch.manual_seed(5)
    with torch.no_grad():
        samples = net.eval().sample(40)
        one, other = (features(images).double().numpy() for images in (real(), samples))
    points, held, drawn = (images.flatten(1).double().numpy() for images in (real(), real(50)[30:], samples))
    gap, first, second = one.mean(0) - other.mean(0), np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    radii = neighbors.NearestNeighbors(n_neighbors=4).fit(points).kneighbors(points)[0][:, -1]
    own = neighbors.NearestNeighbors(n_neighbors=4).fit(drawn).kneighbors(drawn)[0][:, -1]
    apart = np.linalg.norm(drawn[:, None] - points[None], axis=2)
    expected = {
        "nearest": nearest(drawn, points).mean(),
        "precision": (apart <= radii).any(1).mean(),
        "recall": (apart <= own[:, None]).any(0).mean(),
        "density": (apart <= radii).sum(1).mean() / 3,
        "coverage": (apart.min(0) <= radii).mean(),
        "fid": gap @ gap + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real),
        "nearer": stats.mannwhitneyu(nearest(held, points), nearest(drawn, points)).statistic / (20 * 40),
    }
    assert metrics.values == pytest.approx(expected, abs=1e-6)
    logged = {f"generation/{name}": pytest.approx(value, abs=1e-5) for name, value in expected.items()}
    assert {key: float(value) for key, value in trainer.callback_metrics.items()} == logged


def test_without_network_and_held_out_rows_neither_is_measured(fit):
    metrics = GenerationMetrics(real(), count=20, k=2)
    fit(Sketch(), metrics)
    assert metrics.values.keys() == {"nearest", "precision", "recall", "density", "coverage"}


def test_two_names_share_their_charts_and_no_value(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    both = [GenerationMetrics(real(), count=20, k=2, seed=seed, name=f"seed_{seed}") for seed in range(2)]
    trainer = fit(Sketch(), *both, epochs=1, logger=logger)
    for metrics in both:
        logged = {
            key.rpartition("/")[2]: float(trainer.callback_metrics[key])
            for key in trainer.callback_metrics
            if metrics.name in key
        }
        assert logged == pytest.approx(metrics.values)
    layout = EventAccumulator(str(tmp_path / "run")).Reload().Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(layout[0].tensor_proto.string_val[0])
    (nearest,) = [chart for chart in page.category[0].chart if chart.title == "nearest neighbour"]
    assert list(nearest.multiline.tag) == ["generation/seed_0/nearest", "generation/seed_1/nearest"]


def test_the_network_is_in_no_checkpoint(fit, tmp_path):
    metrics = GenerationMetrics(real(), features=network(), count=20, k=2)
    fit(Sketch(), metrics, ModelCheckpoint(tmp_path, "end", save_weights_only=False))
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == Sketch().state_dict().keys()
    assert checkpoint["callbacks"]["GenerationMetrics"].keys() == {"looked_at", "values"}


@pytest.mark.parametrize("name", ["count", "k"])
@pytest.mark.parametrize("value", [0, 2.5, True])
def test_what_is_no_whole_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"GenerationMetrics: {name}={value} must be a whole number of at least 1"):
        GenerationMetrics(real(), **{name: value})


@pytest.mark.parametrize("options", [{"k": 30}, {"count": 4, "k": 4}])
def test_numbers_that_make_no_balls_are_refused(options):
    with pytest.raises(ValueError, match="GenerationMetrics: k=.* must be below count="):
        GenerationMetrics(real(), **options)


@pytest.mark.parametrize("held_out", [real()[:0], torch.rand(5, 1, 3, 3)])
def test_held_out_rows_that_cannot_be_compared_are_refused_at_once(held_out):
    with pytest.raises(ValueError, match="GenerationMetrics: held_out of .* must hold rows of"):
        GenerationMetrics(real(), held_out=held_out)


def test_samples_of_another_shape_are_named(fit):
    with pytest.raises(ValueError, match=r"samples of shape \(3,\) cannot be compared with real rows of \(1, 2, 2\)"):
        fit(Sketch(), GenerationMetrics(real(), lambda module, count: torch.rand(count, 3), count=20))

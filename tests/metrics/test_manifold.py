"""Manifold metrics against scikit-learn's neighbours and scipy's rank test, in float64."""

import pickle

import numpy as np
import pytest
import torch

from lightning_peft.metrics import DensityCoverage, Memorisation, NearestNeighbourDistance, PrecisionRecall
from lightning_peft.metrics.manifold import copying, covering_balls, nearest_distances, neighbour_radii

neighbors = pytest.importorskip("sklearn.neighbors", reason="needs the extra recipes")
stats = pytest.importorskip("scipy.stats")


def sets(real=90, generated=70, width=5):
    """Two clouds that overlap in part, as images of one row."""
    shift = torch.linspace(0, 1.2, width)
    return torch.randn(real, 1, 1, width), 0.8 * torch.randn(generated, 1, 1, width) + shift


def points(images):
    return images.flatten(1).double().numpy()


def radii(rows, k):
    distances, _ = neighbors.NearestNeighbors(n_neighbors=k + 1).fit(rows).kneighbors(rows)
    return distances[:, -1]


def inside(queries, rows, k):
    """A table of which query lies in the ball of which row, from radius queries one by one."""
    table = np.zeros((len(queries), len(rows)), bool)
    for place, (row, radius) in enumerate(zip(rows, radii(rows, k), strict=True)):
        found = neighbors.NearestNeighbors(radius=radius).fit(queries).radius_neighbors(row[None])[1][0]
        table[found, place] = True
    return table


def filled(metric, real, generated, batch=32):
    for rows, kind in ((real, True), (generated, False)):
        for part in rows.split(batch):
            metric.update(part, real=kind)
    return metric


@pytest.mark.parametrize("batch", [7, 90])
def test_the_nearest_distance_is_scikit_learn_s_however_batched(batch):
    real, generated = sets()
    expected = neighbors.NearestNeighbors(n_neighbors=1).fit(points(real)).kneighbors(points(generated))[0].mean()
    found = filled(NearestNeighbourDistance(), real, generated, batch).compute()
    assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_are_what_radius_queries_say(k):
    real, generated = sets()
    real_balls = inside(points(generated), points(real), k)
    generated_balls = inside(points(real), points(generated), k)
    first = filled(PrecisionRecall(k), real, generated).compute()
    second = filled(DensityCoverage(k), real, generated).compute()
    expected = {
        "precision": real_balls.any(1).mean(),
        "recall": generated_balls.any(1).mean(),
        "density": real_balls.sum(1).mean() / k,
        "coverage": real_balls.any(0).mean(),
    }
    assert min(expected.values()) > 0
    assert len(set(expected.values())) > 2
    assert {name: float(value) for name, value in {**first, **second}.items()} == pytest.approx(expected, abs=1e-6)


def test_a_set_reaches_itself_and_nothing_far_away():
    real, _ = sets()
    same, far = (filled(PrecisionRecall(), real, other).compute() for other in (real, real + 99))
    assert set(map(float, same.values())) == {1.0}
    assert set(map(float, far.values())) == {0.0}
    assert float(filled(DensityCoverage(), real, real).compute()["coverage"]) == 1.0


def test_one_mode_has_precision_and_no_recall_and_noise_around_all_the_reverse():
    real = torch.randn(200, 2)
    one_mode, wide = 0.01 * torch.randn(200, 2), 9 * torch.randn(200, 2)
    narrow, broad = (filled(PrecisionRecall(), real, other).compute() for other in (one_mode, wide))
    assert narrow["precision"] == 1
    assert narrow["recall"] < 0.05
    assert broad["precision"] < 0.3
    assert broad["recall"] > 0.9


def test_an_outlier_among_the_samples_lifts_recall_but_not_coverage():
    """Why coverage was proposed: Naeem et al. 2020, figure 3."""
    real = torch.randn(100, 2)
    samples = torch.cat([real[:10] + 0.01, torch.full((1, 2), 30.0)])
    assert filled(PrecisionRecall(k=10), real, samples).compute()["recall"] == 1
    assert filled(DensityCoverage(k=5), real, samples).compute()["coverage"] < 0.6


def test_distances_near_zero_are_not_lost_to_rounding():
    """Single precision by the expanded square would make the distance of copies of large values about 1."""
    rows = 1e3 + torch.rand(40, 64)
    assert float(nearest_distances(rows, rows).max()) < 1e-3
    assert float(nearest_distances(rows + 0.01, rows)[0]) == pytest.approx(0.08, rel=1e-2)


@pytest.mark.parametrize(("scale", "shift"), [(255, 0), (1, 1e4)])
def test_copies_lie_at_no_distance_whatever_the_scale(scale, shift):
    rows = torch.rand(60, 64, dtype=torch.float64) * scale + shift
    assert nearest_distances(rows[:9], rows).tolist() == [0.0] * 9
    twice = torch.cat([rows, rows[:9]])
    radii = neighbour_radii(twice, 1)
    assert radii[:9].tolist() == radii[-9:].tolist() == [0.0] * 9
    assert covering_balls(rows[:9], twice, radii).ge(2).all()
    exact = (rows[:9, None] - rows[None, 9:]).norm(dim=2).amin(1)
    assert torch.allclose(nearest_distances(rows[:9], rows[9:]), exact, rtol=1e-12, atol=0)


def test_rows_that_are_no_numbers_are_near_nothing_and_spoil_no_others():
    real, generated = sets()
    generated[0] = float("nan")
    assert float(filled(PrecisionRecall(), real, generated).compute()["recall"]) > 0
    assert covering_balls(generated[:1], real, neighbour_radii(real, 5)).tolist() == [0]


def test_parts_of_large_sets_are_joined_in_their_order(monkeypatch):
    real, generated = sets()
    whole = [f(generated, real) for f in (nearest_distances,)] + [neighbour_radii(real, 3)]
    whole.append(covering_balls(generated, real, whole[1]))
    monkeypatch.setattr("lightning_peft.metrics.manifold._ROWS", 8)
    assert torch.equal(nearest_distances(generated, real), whole[0])
    assert torch.allclose(neighbour_radii(real, 3), whole[1], atol=1e-12)
    assert torch.equal(covering_balls(generated, real, whole[1] + 1e-9), whole[2])


def test_copying_is_the_rank_test_of_scipy_ties_included():
    generated, held_out = (torch.rand(rows).mul(20).round().div(20) for rows in (60, 80))
    expected = stats.mannwhitneyu(held_out.numpy(), generated.numpy())
    nearer, z = copying(generated, held_out)
    assert nearer == pytest.approx(expected.statistic / 4800, abs=1e-9)
    assert z == pytest.approx((expected.statistic - 2400) / np.sqrt(60 * 80 * 141 / 12), abs=1e-9)


def test_copies_of_training_rows_are_noticed_and_fresh_rows_are_not():
    train, held_out, fresh = torch.randn(200, 3), torch.randn(100, 3), torch.randn(100, 3)
    found = []
    for samples in (train[:100] + 0.01, fresh):
        metric = filled(Memorisation(), train, samples)
        metric.update(held_out, real=True, held_out=True)
        found.append({name: float(value) for name, value in metric.compute().items()})
    assert found[0]["nearer"] > 0.9
    assert found[0]["z"] > 8
    assert abs(found[1]["z"]) < 3


@pytest.mark.parametrize("kind", [NearestNeighbourDistance, PrecisionRecall, DensityCoverage, Memorisation])
def test_states_are_joined_over_ranks(kind):
    metric = kind()
    assert set(metric._reductions) >= {"real", "generated"}
    assert {function.__name__ for function in metric._reductions.values()} == {"dim_zero_cat"}


@pytest.mark.parametrize("kind", [NearestNeighbourDistance, PrecisionRecall, DensityCoverage])
def test_a_metric_survives_pickle_forgets_on_reset_and_has_no_parameters(kind):
    real, generated = sets()
    metric = filled(kind(), real, generated)
    again = pickle.loads(pickle.dumps(metric))
    assert str(again.compute()) == str(metric.compute())
    assert not list(metric.parameters())
    metric.reset()
    metric.update(real, real=True)
    with pytest.raises(ValueError, match=f"{kind.__name__}: no generated rows yet"):
        metric.compute()


@pytest.mark.parametrize("kind", [NearestNeighbourDistance, PrecisionRecall, DensityCoverage])
@pytest.mark.parametrize("name", ["real", "generated"])
def test_updates_of_no_rows_are_as_no_update(kind, name):
    metric = kind()
    metric.update(torch.rand(9, 2), real=name == "generated")
    for _ in range(2):
        metric.update(torch.rand(0, 2), real=name == "real")
    with pytest.raises(ValueError, match=f"{kind.__name__}: no {name} rows yet"):
        metric.compute()


def test_held_out_rows_that_are_none_are_named():
    metric = Memorisation()
    metric.update(torch.rand(9, 2), real=True)
    metric.update(torch.rand(9, 2), real=False)
    metric.update(torch.rand(0, 2), real=True, held_out=True)
    with pytest.raises(ValueError, match="Memorisation: no held_out rows yet"):
        metric.compute()


def test_what_cannot_be_is_refused():
    for k in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"PrecisionRecall: k={k} must be a whole number of at least 1"):
            PrecisionRecall(k)
    with pytest.raises(ValueError, match="k=5 needs more than 5 rows; there are 5"):
        neighbour_radii(torch.rand(5, 2), 5)
    with pytest.raises(ValueError, match="rows of 1 values cannot be compared with rows of 2"):
        nearest_distances(torch.rand(5, 1), torch.rand(5, 2))
    with pytest.raises(ValueError, match="held_out=True is of real rows"):
        Memorisation().update(torch.rand(2, 2), real=False, held_out=True)

"""The Fréchet distance against scipy's matrix root, and a feature network that leaves no trace."""

import copy
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_peft.metrics import FrechetDistance

linalg = pytest.importorskip("scipy.linalg")


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Dropout(0.5))


def images():
    return torch.rand(120, 1, 4, 4), torch.rand(90, 1, 4, 4) ** 2


def filled(metric, real, generated):
    for rows, kind in ((real, True), (generated, False)):
        for part in rows.split(50):
            metric.update(part, real=kind)
    return metric


def by_hand(real, generated):
    """The formula of Heusel et al. 2017 in float64, with scipy's matrix root."""
    means = real.mean(0) - generated.mean(0)
    one, other = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    return means @ means + np.trace(one + other - 2 * linalg.sqrtm(one @ other).real)


def test_it_is_the_distance_of_scipy_s_matrix_root():
    net, (real, generated) = network().eval(), images()
    with torch.no_grad():
        expected = by_hand(*(net(rows).double().numpy() for rows in (real, generated)))
    found = float(filled(FrechetDistance(net, 6), real, generated).compute())
    assert expected > 0.01
    assert found == pytest.approx(expected, abs=1e-6)


def test_of_a_set_to_itself_it_is_zero():
    real, _ = images()
    assert float(filled(FrechetDistance(network(), 6), real, real).compute()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_no_numbers_give_none_and_do_not_end_the_process(value, capfd):
    real, generated = images()
    metric = filled(FrechetDistance(lambda rows: rows.flatten(1), 16), real, torch.full_like(generated, value))
    assert np.isnan(float(metric.compute()))
    assert capfd.readouterr() == ("", "")  # some routines complain here, and may not come back


def test_the_network_is_no_part_of_a_module_that_holds_the_metric():
    class Holder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.fid = FrechetDistance(network(), 6)

    holder = Holder()
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert not list(holder.fid.parameters())


def test_the_network_keeps_its_mode_and_dropout_does_not_act():
    net, (real, generated) = network().train(), images()
    values = [float(filled(FrechetDistance(net, 6), real, generated).compute()) for _ in range(2)]
    assert values[0] == values[1]
    assert all(child.training for child in net.modules())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_goes_on(twin):
    real, generated = images()
    metric = FrechetDistance(network(), 6)
    metric.update(real, real=True)
    again = twin(metric)
    for one in (metric, again):
        one.update(generated, real=False)
    assert torch.equal(metric.compute(), again.compute())


def test_sums_are_added_over_ranks():
    metric = FrechetDistance(network(), 6)
    assert {function.__name__ for function in metric._reductions.values()} == {"dim_zero_sum"}


def test_features_of_another_width_are_named():
    with pytest.raises(ValueError, match=r"features of \(2, 1, 4, 4\) have the shape \(2, 16\), not \(images, 6\)"):
        FrechetDistance(lambda rows: rows.flatten(1), 6).update(torch.rand(2, 1, 4, 4), real=True)

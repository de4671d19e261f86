"""Heads in closed form equal scikit-learn's; scales of features do not matter; validation rows choose the penalty."""

import math

import numpy as np
import pytest
import torch

from lightning_peft.probes import fit_linear
from lightning_peft.probes.linear_fit import score_of

pytest.importorskip("sklearn")  # an extra
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler


def data(rows=60, width=8, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, width) + 3
    z = (x - 3) / torch.logspace(-2, 2, width)
    noise = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    y = (z[:, :classes] + noise).argmax(1)
    return x, y


@pytest.mark.parametrize("rows", [60, 12], ids=["more rows than features", "fewer"])
@pytest.mark.parametrize("penalty", [10.0, 0.1, 1e-3])
def test_ridge_is_scikit_learn_s(rows, penalty):
    x, y = data(rows, width=20)
    fit = fit_linear(x, y, (x, y), solver="ridge", penalties=[penalty], outputs=3)
    z = StandardScaler().fit(x.numpy())
    peer = Ridge(alpha=penalty * rows).fit(z.transform(x.numpy()), np.eye(3)[y.numpy()])
    new, _ = data(50, width=20, seed=1)
    torch.testing.assert_close(fit(new), torch.from_numpy(peer.predict(z.transform(new.numpy()))), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("penalty", [1.0, 0.01])
@pytest.mark.parametrize("classes", [2, 3])
def test_lbfgs_is_scikit_learn_s_logistic_regression(penalty, classes):
    x, y = data(classes=classes)
    fit = fit_linear(x, y, (x, y), solver="lbfgs", penalties=[penalty])
    z = StandardScaler().fit(x.numpy())
    # Of two classes scikit-learn fits one vector w, which here is w/2 and -w/2: half the penalty.
    peer = LogisticRegression(C=(1 if classes > 2 else 2) / (penalty * len(x)), tol=1e-10, max_iter=10_000)
    peer.fit(z.transform(x.numpy()), y.numpy())
    new, _ = data(50, classes=classes, seed=1)
    wanted = torch.from_numpy(peer.predict_proba(z.transform(new.numpy())))
    torch.testing.assert_close(fit(new).softmax(1), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_features_of_another_scale_and_one_that_is_constant_change_nothing(solver):
    x, y = data()
    other = torch.cat([x * torch.logspace(3, -3, 8) - 100, torch.full((60, 1), 7.0, dtype=torch.float64)], 1)
    plain, scaled = (fit_linear(one, y, (one, y), solver=solver) for one in (x, other))
    torch.testing.assert_close(plain(x), scaled(other), atol=1e-5, rtol=1e-4)
    assert scaled.weight[:, -1].abs().max() == 0


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_validation_rows_choose_the_penalty_and_of_equal_ones_the_strongest(solver):
    x, y = data(40, width=60)
    held = data(200, width=60, seed=1)
    fit = fit_linear(x, y, held, solver=solver, penalties=[1e-4, 1.0, 30.0])
    assert [penalty for penalty, _ in fit.path] == [30.0, 1.0, 1e-4]
    scores = dict(fit.path)
    assert fit.score == max(scores.values()) == score_of(fit(held[0]), held[1])
    assert fit.penalty == max(penalty for penalty, score in scores.items() if score == fit.score)
    alone = fit_linear(x, y, held, solver=solver, penalties=[fit.penalty])
    torch.testing.assert_close(alone.weight, fit.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_where_all_are_equally_right_the_strongest_penalty_is_taken(solver):
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    y = torch.tensor([0, 0, 1, 1])
    fit = fit_linear(x, y, (x, y), solver=solver, penalties=[0.01, 1.0, 0.1])
    assert [score for _, score in fit.path] == [1.0, 1.0, 1.0]
    assert fit.penalty == 1.0


def test_numbers_are_fitted_by_ridge_and_judged_by_r_squared():
    x, _ = data(300)
    z = (x - x.mean(0)) / x.std(0)
    y = (2 * z[:, 0] - z[:, 3]).unsqueeze(1)
    fit = fit_linear(x, y, (x, y), solver="ridge", penalties=[1e-9])
    assert fit.score == pytest.approx(1, abs=1e-6)
    assert fit_linear(x, y[:, 0], (x, y[:, 0]), solver="ridge", penalties=[1e-9])(x).shape == (300, 1)
    assert score_of(y.mean(0).expand_as(y), y) == pytest.approx(0, abs=1e-9)
    assert math.isnan(score_of(torch.ones(2, 1), torch.ones(2)))


def test_the_same_data_gives_the_same_bits():
    x, y = data()
    first, second = (fit_linear(x, y, (x, y)) for _ in range(2))
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "sgd"}, "solver='sgd' must be 'lbfgs' or 'ridge'"),
        ({"penalties": []}, r"penalties=\[\] must be at least one"),
        ({"penalties": [0.0]}, "each above 0"),
        ({"features": torch.ones(4)}, r"training features of shape \(4,\)"),
        ({"targets": torch.ones(3, dtype=torch.long)}, r"with targets of shape \(3,\)"),
        ({"validation": (torch.ones(2, 9), torch.ones(2, dtype=torch.long))}, r"validation features of shape \(2, 9\)"),
        ({"features": torch.full((4, 2), torch.inf)}, "the training features are not finite"),
        ({"targets": torch.ones(4)}, "solver='lbfgs' is for classes"),
        ({"outputs": 1}, "a target is class 1, and there are 1 outputs"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message):
    y = torch.tensor([0, 1, 0, 1])
    usual = {"features": torch.ones(4, 2), "targets": y, "validation": (torch.ones(4, 2), y)}
    with pytest.raises(ValueError, match=message):
        fit_linear(**{**usual, **change})

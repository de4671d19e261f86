"""A linear head fitted to features without a training loop, with the penalty that does best on validation rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

Solver = Literal["ridge", "lbfgs"]
PENALTIES = tuple(10.0**power for power in range(1, -6, -1))
"""From the strongest to the weakest."""


@dataclass(frozen=True)
class LinearFit:
    """A fitted head, ``features @ weight.T + bias``.

    Args:
        weight: ``(outputs, features)``.
        bias: ``(outputs,)``.
        penalty: The one that was chosen.
        score: Of the validation rows: accuracy for classes, R² for numbers.
        train_score: Of the training rows.
        path: Each penalty and its validation score, in the order tried.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    score: float
    train_score: float
    path: tuple[tuple[float, float], ...]

    def __call__(self, features: Tensor) -> Tensor:
        """Return outputs, ``(rows, outputs)``."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit_linear(
    features: Tensor,
    targets: Tensor,
    validation: tuple[Tensor, Tensor],
    *,
    solver: Solver = "lbfgs",
    penalties: Sequence[float] = PENALTIES,
    outputs: int | None = None,
) -> LinearFit:
    r"""Fit a linear head for each penalty and return the one that does best on validation rows; of equal ones the most penalised.

    With standardised features ``z`` (mean 0, standard deviation 1 over the training rows; the head that is returned takes features
    as they are) and ``n`` rows:

    ``"ridge"``: ``min ||z W + b - Y||² / n + penalty ||W||²``, of classes ``Y`` is one-hot. In closed form, from one decomposition
    for all penalties: Hastie, Tibshirani & Friedman 2009, section 3.4.1.
    ``"lbfgs"``: ``min cross_entropy(z W + b, y) + penalty / 2 ||W||²``, multinomial logistic regression by L-BFGS (Liu & Nocedal
    1989) from the strongest penalty to the weakest, each from the last one's solution. What scikit-learn calls
    ``C`` is ``1 / (penalty n)``.

    Computed in ``float64``, with the same result every time.

    Args:
        features: ``(rows, features)`` of training rows.
        targets: ``(rows,)`` classes as whole numbers; for ridge, numbers too, ``(rows,)`` or ``(rows, outputs)``.
        validation: Features and targets of the rows that the penalty is chosen by.
        solver: ``"lbfgs"`` or ``"ridge"``.
        penalties: What to try.
        outputs: How many classes there are; unset, one more than the largest target.

    Raises:
        ValueError: For features that are no matrix or not finite, counts that differ, no rows, or penalties that are none.

    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]); y = torch.tensor([0, 0, 1, 1])
    >>> fit = fit_linear(x, y, (x, y), solver="ridge")
    >>> fit(torch.tensor([[-3.0], [3.0]])).argmax(1).tolist(), fit.score
    ([0, 1], 1.0)
    """
    _check(features, targets, validation, penalties, solver)
    x, held = features.double(), validation[0].double()
    mean, spread = x.mean(0), x.std(0, correction=0)
    scale = torch.where(
        spread > 1e-12 * x.abs().amax(0).clamp(min=1e-300), spread, torch.inf
    )  # a constant says nothing
    z, classes = (x - mean) / scale, not targets.is_floating_point()
    if classes:
        counted = int(torch.cat([targets, validation[1]]).max()) + 1
        outputs = counted if outputs is None else outputs
        if counted > outputs:
            raise ValueError(f"fit_linear: a target is class {counted - 1}, and there are {outputs} outputs.")
    solutions = _ridge if solver == "ridge" else _logistic
    found = None
    path = []
    for penalty, weight, bias in solutions(z, targets, sorted(penalties, reverse=True), outputs):
        plain = weight / scale
        here = LinearFit(plain, bias - plain @ mean, penalty, 0.0, 0.0, ())
        score = score_of(here(held), validation[1])
        path.append((penalty, score))
        if found is None or score > found.score:
            found = replace(here, score=score, train_score=score_of(here(x), targets))
    assert found is not None
    return replace(found, path=tuple(path))


def score_of(outputs: Tensor, targets: Tensor) -> float:
    """Return accuracy for classes, and for numbers R²: 1 less the share of variance that is left.

    >>> score_of(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    >>> score_of(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0]))
    1.0
    """
    if not targets.is_floating_point():
        return float((outputs.argmax(1) == targets).double().mean())
    wanted = targets.double().view(len(targets), -1)
    left, whole = (wanted - outputs.double()).square().sum(), (wanted - wanted.mean(0)).square().sum()
    return float(1 - left / whole) if whole > 0 else math.nan


Solution = tuple[float, Tensor, Tensor]


def _ridge(z: Tensor, targets: Tensor, penalties: Sequence[float], outputs: int | None) -> Iterator[Solution]:
    y = targets.double().view(len(z), -1) if outputs is None else F.one_hot(targets, outputs).double()
    bias, rows = y.mean(0), len(z)
    wide = z.shape[1] > rows  # of both products of z with itself the smaller one says enough
    squares, axes = torch.linalg.eigh(z @ z.T if wide else z.T @ z)
    seen = axes.T @ ((y - bias) if wide else z.T @ (y - bias))
    for penalty in penalties:
        found = axes @ (seen / (squares.clamp(min=0) + rows * penalty)[:, None])
        yield penalty, (z.T @ found if wide else found).T, bias


def _logistic(z: Tensor, targets: Tensor, penalties: Sequence[float], outputs: int | None) -> Iterator[Solution]:
    assert outputs is not None
    weight = z.new_zeros(outputs, z.shape[1], requires_grad=True)
    bias = z.new_zeros(outputs, requires_grad=True)
    for penalty in penalties:
        _descend(z, targets, weight, bias, penalty)
        yield penalty, weight.detach().clone(), bias.detach().clone()


def _descend(z: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
    """Move weight and bias to where the penalised loss is least."""
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = F.cross_entropy(z @ weight.T + bias, targets) + penalty / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def _check(
    features: Tensor, targets: Tensor, validation: tuple[Tensor, Tensor], penalties: Sequence[float], solver: str
) -> None:
    if solver not in ("lbfgs", "ridge"):
        raise ValueError(f"fit_linear: solver={solver!r} must be 'lbfgs' or 'ridge'.")
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"fit_linear: penalties={list(penalties)!r} must be at least one, each above 0.")
    if solver == "lbfgs" and targets.is_floating_point():
        raise ValueError("fit_linear: solver='lbfgs' is for classes, and the targets are numbers. Use solver='ridge'.")
    for name, rows, wanted in (("training", features, targets), ("validation", *validation)):
        if rows.dim() != 2 or len(rows) != len(wanted) or not len(rows) or rows.shape[1] != features.shape[1]:
            raise ValueError(
                f"fit_linear: {name} features of shape {tuple(rows.shape)} with targets of shape {tuple(wanted.shape)} must be "
                "(rows, features), with a target for each row."
            )
        if not torch.isfinite(rows).all():
            raise ValueError(f"fit_linear: the {name} features are not finite. Look for a network that overflows.")

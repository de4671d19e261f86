"""How generated samples lie to real ones: nearest neighbours, precision and recall, density and coverage, copying.

A set's manifold is taken to be the union of balls around its points, each as large as the distance to the point's
``k``-th nearest neighbour in the set. Distances are Euclidean, of flattened rows, in float64.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override

from lightning_peft.counts import check_counts

_ROWS = 512
"""Rows whose distances to a whole set, and pairs whose differences, are held in memory at once."""


def nearest_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the distance from each row to the nearest of others.

    Args:
        rows: ``(rows, ...)``.
        others: ``(others, ...)``.

    Returns:
        ``(rows,)``, float64.

    >>> nearest_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    tensor([5.], dtype=torch.float64)
    """
    others = _flat(others)
    return torch.cat([_distances(part, others).amin(1) for part in torch.split(_flat(rows), _ROWS)])


def neighbour_radii(rows: Tensor, k: int) -> Tensor:
    """Return the distance from each row to its ``k``-th nearest neighbour among the other rows.

    Args:
        rows: ``(rows, ...)``, more than ``k``.
        k: Which neighbour, counted from 1.

    Returns:
        ``(rows,)``, float64.

    Raises:
        ValueError: If there are not more rows than ``k``.

    >>> neighbour_radii(torch.tensor([[0.0], [1.0], [3.0]]), 1)
    tensor([1., 1., 2.], dtype=torch.float64)
    """
    if len(rows) <= k:
        raise ValueError(f"neighbour_radii: k={k!r} needs more than {k} rows; there are {len(rows)}.")
    rows = _flat(rows)
    # A row is the nearest to itself, hence one more.
    return torch.cat([_distances(part, rows).kthvalue(k + 1, dim=1).values for part in torch.split(rows, _ROWS)])


def covering_balls(points: Tensor, rows: Tensor, radii: Tensor) -> Tensor:
    """Return in how many balls around ``rows`` each point lies.

    >>> covering_balls(torch.tensor([[0.5], [9.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 1.0]))
    tensor([2, 0])
    """
    rows = _flat(rows)
    return torch.cat([(_distances(part, rows) <= radii).sum(1) for part in torch.split(_flat(points), _ROWS)])


def precision_recall(
    real: Tensor, generated: Tensor, *, k: int = 5, radii: Tensor | None = None
) -> tuple[float, float]:
    """Return the share of samples within the real manifold, and of real rows within that of the samples.

    Kynkäänniemi et al. 2019, arXiv:1904.06991, equation 2. ``radii`` are ``neighbour_radii(real, k)`` where they are at hand.

    >>> real = torch.tensor([[0.0], [1.0], [2.0]])
    >>> precision_recall(real, torch.tensor([[0.5], [0.6], [9.0]]), k=1)
    (0.6666666666666666, 0.6666666666666666)
    """
    inside = covering_balls(generated, real, neighbour_radii(real, k) if radii is None else radii) > 0
    reached = covering_balls(real, generated, neighbour_radii(generated, k)) > 0
    return float(inside.double().mean()), float(reached.double().mean())


def density_coverage(
    real: Tensor, generated: Tensor, *, k: int = 5, radii: Tensor | None = None
) -> tuple[float, float]:
    """Return how many real balls a sample lies in, over ``k``, and the share of real balls with a sample in them.

    Naeem et al. 2020, arXiv:2002.09797, section 3. Outliers among the samples, which inflate recall, cannot do so here.
    ``radii`` are ``neighbour_radii(real, k)`` where they are at hand.

    >>> real = torch.tensor([[0.0], [1.0], [3.0]])
    >>> density_coverage(real, torch.tensor([[0.5], [0.6]]), k=1)
    (2.0, 0.6666666666666666)
    """
    radii = neighbour_radii(real, k) if radii is None else radii
    density = covering_balls(generated, real, radii).double().mean() / k
    covered = nearest_distances(real, generated) <= radii
    return float(density), float(covered.double().mean())


def copying(generated: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Return how much nearer to training rows samples are than held-out rows: a share, and its Mann-Whitney z.

    The share is ``P(sample nearer than held-out row)``, ties half: 0.5 where a model neither copies nor strays, towards 1
    where it repeats its training rows. ``z`` is the share's distance from 0.5 in standard deviations; above 3 is copying beyond
    chance. The statistic of Meehan et al. 2020, arXiv:2004.05675 (section 3.1, over the whole space), with the opposite sign.

    Args:
        generated: Distances from samples to their nearest training rows, ``(samples,)``.
        held_out: The same of held-out rows, ``(rows,)``.

    >>> copying(torch.tensor([0.0, 0.1]), torch.tensor([1.0, 2.0]))[0]
    1.0
    """
    order = held_out.double().sort().values
    below, upto = (torch.searchsorted(order, generated.double(), right=right) for right in (False, True))
    nearer = float((len(order) - (below + upto) / 2).sum())
    count = len(generated) * len(order)
    deviation = math.sqrt(count * (len(generated) + len(order) + 1) / 12)
    return nearer / count, (nearer - count / 2) / deviation


class ManifoldMetric(Metric, ABC):
    """What metrics of two sets share: real rows and samples, collected over batches and ranks.

    Both sets are kept whole, and every rank computes the value on the sets of all.

    Args:
        k: Which neighbour gives a ball its radius.
        options: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: For ``k`` that is no whole number of at least 1; by ``compute``, for a set that is empty or too small.
    """

    is_differentiable = False
    full_state_update = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, k: int = 5, **options: Any) -> None:
        super().__init__(**options)
        self.k = k
        check_counts(self, "k")
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("generated", default=[], dist_reduce_fx="cat")

    @override
    def update(self, images: Tensor, *, real: bool) -> None:
        """Add rows to one of the sets.

        Args:
            images: ``(rows, ...)``; features serve as well as pixels.
            real: Whether they are real.
        """
        (self.real if real else self.generated).append(images.detach().flatten(1))

    def _sets(self, *names: str) -> list[Tensor]:
        found = []
        for name in names:
            updates = getattr(self, name)
            rows = dim_zero_cat(updates) if len(updates) else updates
            if not len(rows):  # nor do updates of no rows hold any
                raise ValueError(f"{type(self).__name__}: no {name} rows yet; update with both kinds before compute.")
            found.append(rows)
        return found


class NearestNeighbourDistance(ManifoldMetric):
    """Mean distance from a sample to its nearest real row. Compare with that of held-out rows: near 0 is copying.

    >>> metric = NearestNeighbourDistance()
    >>> metric.update(torch.zeros(2, 1, 2, 2), real=True)
    >>> metric.update(torch.ones(2, 1, 2, 2), real=False)
    >>> metric.compute()
    tensor(2., dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    @override
    def compute(self) -> Tensor:
        real, generated = self._sets("real", "generated")
        return nearest_distances(generated, real).mean()


class PrecisionRecall(ManifoldMetric):
    """Precision: samples that look real. Recall: real rows that could have been sampled. :func:`precision_recall`.

    **The trap:** both depend on the sizes of the sets and on ``k``: compare rows of one table only at the same sizes.

    >>> metric = PrecisionRecall(k=1)
    >>> metric.update(torch.tensor([[0.0], [1.0], [2.0]]), real=True)
    >>> metric.update(torch.tensor([[0.5], [0.6], [9.0]]), real=False)
    >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
    {'precision': 0.667, 'recall': 0.667}
    """

    higher_is_better = True

    @override
    def compute(self) -> dict[str, Tensor]:
        values = precision_recall(*self._sets("real", "generated"), k=self.k)
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in zip(("precision", "recall"), values, strict=True)
        }


class DensityCoverage(ManifoldMetric):
    """Density: how deep samples lie in the real manifold, above 1 in its midst. Coverage: real rows with a sample near.

    :func:`density_coverage`. Coverage grows with the number of samples: compare at the same sizes.

    >>> metric = DensityCoverage(k=1)
    >>> metric.update(torch.tensor([[0.0], [1.0], [3.0]]), real=True)
    >>> metric.update(torch.tensor([[0.5], [0.6]]), real=False)
    >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
    {'density': 2.0, 'coverage': 0.667}
    """

    higher_is_better = True

    @override
    def compute(self) -> dict[str, Tensor]:
        values = density_coverage(*self._sets("real", "generated"), k=self.k)
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in zip(("density", "coverage"), values, strict=True)
        }


class Memorisation(ManifoldMetric):
    """Whether samples are nearer to training rows (``real``) than held-out rows are: :func:`copying`.

    >>> metric = Memorisation()
    >>> metric.update(torch.zeros(1, 2), real=True)
    >>> metric.update(torch.zeros(8, 2), real=False)
    >>> metric.update(torch.ones(8, 2), real=True, held_out=True)
    >>> {name: round(float(value), 1) for name, value in metric.compute().items()}
    {'nearer': 1.0, 'z': 3.4}
    """

    higher_is_better = False
    held_out: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("held_out", default=[], dist_reduce_fx="cat")

    @override
    def update(self, images: Tensor, *, real: bool, held_out: bool = False) -> None:
        """Add rows to one of the sets.

        Args:
            images: ``(rows, ...)``.
            real: Whether they are real.
            held_out: Whether they are real rows that the model was not trained on.

        Raises:
            ValueError: For samples that are held out.
        """
        if held_out and not real:
            raise ValueError("Memorisation: held_out=True is of real rows; samples have real=False alone.")
        if held_out:
            self.held_out.append(images.detach().flatten(1))
        else:
            super().update(images, real=real)

    @override
    def compute(self) -> dict[str, Tensor]:
        real, generated, held_out = self._sets("real", "generated", "held_out")
        values = copying(nearest_distances(generated, real), nearest_distances(held_out, real))
        return {
            name: torch.tensor(value, dtype=torch.float64) for name, value in zip(("nearer", "z"), values, strict=True)
        }


def _flat(rows: Tensor) -> Tensor:
    return rows.detach().flatten(1).double()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # torch.cdist multiplies matrices: a distance that is small beside the rows' norms, as that of a copy, loses its digits. So take
    # norms from the centre, and the differences of such pairs themselves.
    if rows.shape[1] != others.shape[1]:
        raise ValueError(f"manifold: rows of {rows.shape[1]} values cannot be compared with rows of {others.shape[1]}.")
    centre = others.nanmean(0).nan_to_num(0.0, 0.0, 0.0)
    rows, others = rows - centre, others - centre
    found = torch.cdist(rows, others)
    near = found < 1e-3 * (rows.norm(dim=1)[:, None] + others.norm(dim=1))
    for pairs in near.nonzero().split(_ROWS):
        first, second = pairs.T
        found[first, second] = (rows[first] - others[second]).norm(dim=1)
    return found

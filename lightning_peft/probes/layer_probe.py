"""Which layer of a network says most about a task, to a linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.probes.linear_fit import LinearFit, Solver, fit_linear
from lightning_peft.probes.pooling import Pooling, hidden_states, pool

POOLINGS: tuple[Pooling, ...] = ("mean", "last")
"""What is tried of tokens."""


@dataclass(frozen=True)
class LayerProbe:
    """A head on the features of one layer.

    Args:
        fit: The head.
        layer: Number of the hidden state: 0 is the embedding.
        pooling: How tokens became one vector.
        by_layer: What ridge regression on each layer has right of the validation rows, with that pooling.
    """

    fit: LinearFit
    layer: int
    pooling: Pooling
    by_layer: tuple[float, ...]

    def __call__(self, features: Tensor) -> Tensor:
        """Return outputs of :func:`layer_features`, ``(rows, outputs)``."""
        return self.fit(features[:, POOLINGS.index(self.pooling), self.layer])


def layer_features(network: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return what every layer of a transformers model says of each row, ``(rows, poolings, layers, width)``.

    Args:
        network: The model; of one with a head only the body runs.
        inputs: A tokenised batch, with padding on the right or left.
    """
    states = torch.stack(hidden_states(network, inputs), 1)
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(len(states), states.shape[2], dtype=torch.long, device=states.device)
    return torch.stack([pool(states, mask, how) for how in POOLINGS], 1)


def fit_layers(
    features: Tensor,
    targets: Tensor,
    validation: tuple[Tensor, Tensor],
    *,
    solver: Solver = "lbfgs",
    outputs: int | None = None,
    poolings: Sequence[Pooling] = POOLINGS,
) -> LayerProbe:
    """Find the layer and pooling on which ridge regression does best on validation rows, and fit a head there.

    Of equal ones the later layer is taken. Choosing among many flatters the validation score: judge by other rows.

    Args:
        features: Of training rows, ``(rows, poolings, layers, width)``.
        targets: ``(rows,)``, as for :func:`fit_linear`.
        validation: Features and targets of the rows that choose.
        solver: Of the head.
        outputs: How many classes there are.
        poolings: The names of the second dimension.

    >>> x = torch.randn(40, 2, 3, 5, generator=torch.Generator().manual_seed(0)); y = (x[:, 1, 2, 0] > 0).long()
    >>> found = fit_layers(x, y, (x, y))
    >>> found.pooling, found.layer
    ('last', 2)
    """
    held, wanted = validation
    scores = {
        (place, layer): fit_linear(
            features[:, place, layer], targets, (held[:, place, layer], wanted), solver="ridge", outputs=outputs
        ).score
        for place in range(features.shape[1])
        for layer in range(features.shape[2])
    }
    place, layer = max(scores, key=lambda one: (scores[one], one[1], -one[0]))
    fit = fit_linear(
        features[:, place, layer], targets, (held[:, place, layer], wanted), solver=solver, outputs=outputs
    )
    by_layer = tuple(scores[place, number] for number in range(features.shape[2]))
    return LayerProbe(fit, layer, poolings[place], by_layer)

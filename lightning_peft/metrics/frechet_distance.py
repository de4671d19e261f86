"""Fréchet distance of features, with a feature network that stays out of checkpoints and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from typing_extensions import override

from lightning_peft.eval_mode import eval_mode


def frechet_distance(features: Callable[[Tensor], Tensor], real: Tensor, generated: Tensor) -> float:
    """Return the Fréchet distance of two sets of images that are at hand, in this process.

    >>> real = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    >>> round(frechet_distance(lambda images: images.flatten(1), real, real + torch.tensor([1.0, 0.0])), 4)
    1.0
    """
    metric = FrechetDistance(features, FrechetDistance(features, 1).features(real[:2]).shape[1], sync_on_compute=False)
    for images, kind in ((real, True), (generated, False)):
        for part in torch.split(images, 1000):
            metric.update(part, real=kind)
    return float(metric.compute())


class FrechetDistance(FrechetInceptionDistance):
    """FID with any feature network: ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` of the features' means and covariances.

    Heusel et al. 2017, arXiv:1706.08500, section 2. In torchmetrics' own class a network is a submodule, whose weights enter
    the checkpoint and, where the metric is an attribute of a LightningModule, ``parameters()``. Here they do not.

    **The trap:** values are comparable only for one feature network and one number of samples; few samples bias them upward.

    Args:
        features: Takes images as they are given to ``update`` and returns ``(images, num_features)``. A module is run in eval
            mode and without gradients, on the images' device.
        num_features: Width of the features.
        options: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: By ``update``, for features of another shape.

    >>> metric = FrechetDistance(lambda images: images.flatten(1), 2)
    >>> metric.update(torch.tensor([[0.0, 0.0], [2.0, 2.0]]), real=True)
    >>> metric.update(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), real=False)
    >>> round(float(metric.compute()), 4)
    1.0
    """

    def __init__(self, features: Callable[[Tensor], Tensor], num_features: int, **options: Any) -> None:
        super().__init__(feature=_Given(num_features), **options)
        self.num_features = num_features
        # In a tuple, since an attribute that is a module would be registered as one.
        self._network = (features,)

    @override
    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images.

        Args:
            imgs: What the feature network takes, ``(images, ...)``.
            real: Whether they are real.
        """
        found = self.features(imgs)
        if found.ndim != 2 or found.shape[1] != self.num_features:
            raise ValueError(
                f"FrechetDistance: features of {tuple(imgs.shape)} have the shape {tuple(found.shape)}, not (images, "
                f"{self.num_features}); num_features must be their width."
            )
        super().update(found.double(), real)

    @override
    def compute(self) -> Tensor:
        """Return the distance; NaN where a feature was no finite number."""
        sums = self.real_features_cov_sum, self.fake_features_cov_sum
        # The routine that finds eigenvalues ends the whole process where it is given NaN.
        if not all(bool(one.isfinite().all()) for one in sums):
            return torch.full((), float("nan"), dtype=sums[0].dtype, device=sums[0].device)
        return super().compute()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features of images, ``(images, num_features)``."""
        (network,) = self._network
        if not isinstance(network, nn.Module):
            return network(images)
        with eval_mode(network.to(images.device)):
            found: Tensor = network(images)
        return found


class _Given(nn.Module):
    """Stands where torchmetrics has its network: the features come ready."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    @override
    def forward(self, features: Tensor) -> Tensor:
        # Older releases of torchmetrics ask for the width with an image of noise.
        return features if features.ndim == 2 else features.new_zeros(len(features), self.num_features)

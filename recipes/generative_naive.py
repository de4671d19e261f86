"""The naive ways to make an image: draw at random until a classifier is sure, or climb the classifier's own gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from lightning_peft.metrics.manifold import nearest_distances
from lightning_peft.recipes.generative_data import Images

STEPS = 120
LOOK_EVERY = 20


def pixel_gaussian(train: Tensor, count: int) -> Tensor:
    """Return images whose pixels are drawn one by one from a normal of the training images' mean and deviation."""
    noise = torch.randn(count, *train.shape[1:])
    return (train.mean(0) + train.std(0) * noise).clamp(0, 1)


@torch.no_grad()
def search(
    draw: Callable[[int], Tensor], classifier: Any, threshold: float, count: int, *, most: int
) -> tuple[Tensor, int]:
    """Draw until a classifier has been surer than a threshold ``count`` times.

    Returns:
        What was accepted, and how many were drawn; after ``most`` draws there may be fewer than ``count``.
    """
    accepted: list[Tensor] = []
    drawn = 0
    while sum(len(part) for part in accepted) < count and drawn < most:
        images = draw(4000)
        drawn += len(images)
        accepted.append(images[classifier(images).softmax(1).amax(1) > threshold])
    return torch.cat(accepted), drawn


def ascend(
    classifier: Any, start: Tensor, targets: Tensor, *, steps: int = STEPS, smooth: float = 0.0, near: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Train the input as if it were a soft prompt: Adam on the logits of its pixels, until the classifier sees a class.

    The loss of an image is ``cross-entropy + smooth * total variation + near * |image - start|^2``.

    Args:
        classifier: Frozen, from images to logits.
        start: Images to begin with.
        targets: A class for each.
        steps: Of Adam, rate 0.05.
        smooth: Weight of the sum of absolute differences of neighbouring pixels.
        near: Weight of the squared distance from the start.

    Returns:
        The images, and those on the way, every 20 steps from the start on.
    """
    pixels = torch.logit(start.clamp(0.02, 0.98)).requires_grad_()
    optimizer = torch.optim.Adam([pixels], 0.05)
    path = [start]
    with torch.enable_grad():
        for step in range(1, steps + 1):
            images = pixels.sigmoid()
            loss = F.cross_entropy(classifier(images), targets, reduction="sum")
            if smooth:
                loss = loss + smooth * (images.diff(dim=2).abs().sum() + images.diff(dim=3).abs().sum())
            if near:
                loss = loss + near * (images - start).square().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % LOOK_EVERY == 0:
                path.append(pixels.detach().sigmoid())
    return pixels.detach().sigmoid(), path


def random_search(images: Images, classifier: Any, *, draws: int) -> dict[str, float]:
    """Count what uniform noise must be drawn until something is accepted, by a classifier and by nearness to real images.

    Near is an image that lies no further from a training image than 95 % of held-out images do.

    Returns:
        Draws, how many the classifier was more than 0.99 sure of, how many were near, the radius, and the base-10 logarithm of a
        lower bound on the draws expected until one is near.
    """
    radius = float(nearest_distances(images.test, images.train).quantile(0.95))
    sure = near = 0
    with torch.no_grad():
        for count in [2000] * (draws // 2000):
            noise = torch.rand(count, *images.train.shape[1:])
            sure += int((classifier(noise).softmax(1).amax(1) > 0.99).sum())
            near += int((nearest_distances(noise, images.train) <= radius).sum())
    return {
        "draws": draws, "sure": sure, "near": near, "radius": radius,
        "least_draws": least_draws(images.train, radius), "side": images.side,
    }  # fmt: skip


def least_draws(train: Tensor, radius: float) -> float:
    """Return log10 of a lower bound on the uniform images to draw until one lies within a radius of a training image.

    Chernoff's bound for each training image ``a`` and the union bound over them: with ``U`` uniform on ``[0, 1]^d``,
    ``P(|U - a|^2 <= r^2) <= min_t exp(t r^2) prod_j E exp(-t (U_j - a_j)^2)``, and the expectation is
    ``sqrt(pi / t) / 2 (erf(sqrt(t) (1 - a_j)) + erf(sqrt(t) a_j))``.

    >>> round(10 ** least_draws(torch.full((1, 1, 1, 1), 0.5), 0.05))  # the bound; exact are 10
    5
    """
    points = train.flatten(1).double()
    best = torch.full((len(points),), math.inf).double()
    for t in torch.logspace(-2, 4, 61).double():
        root = t.sqrt()
        factors = math.sqrt(math.pi) / (2 * root) * (torch.erf(root * (1 - points)) + torch.erf(root * points))
        best = torch.minimum(best, t * radius**2 + factors.log().sum(1))
    return float(-torch.logsumexp(best, 0).clamp(max=0) / math.log(10))

"""The arms of the recipe ``generative``: every way of making images, from noise to a conditional VAE."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_peft.recipes.generative_data import Images
from lightning_peft.recipes.generative_models import WORDS, divergence, spell
from lightning_peft.recipes.generative_naive import ascend, pixel_gaussian, search
from lightning_peft.recipes.generative_train import blur, hide_half

COMPONENTS = 10
SMOOTH, NEAR = 0.1, 0.3
"""Weights of the regularisers of gradient ascent."""


@dataclass(frozen=True)
class Made:
    """What an arm has made.

    Args:
        images: ``(count, 1, side, side)`` in [0, 1].
        wanted: The class that was asked for, where one was.
        facts: Numbers of this arm alone.
    """

    images: Tensor
    wanted: Tensor | None = None
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What every arm has at hand: a seed's images and trained networks, how many images to make, and the most draws of a search."""

    images: Images
    nets: dict[str, Any]
    count: int
    seed: int
    most: int


Arm = Callable[[Bench], Made]


def arms(images: Images) -> dict[str, Arm]:
    """Return the arms by name, in the order of the table."""
    found: dict[str, Arm] = {
        "real test images": lambda bench: Made(
            bench.images.test[: bench.count], bench.images.test_labels[: bench.count]
        ),
        "uniform noise": lambda bench: Made(uniform(bench)(bench.count)),
        "noise, C > 0.9": lambda bench: filtered(bench, uniform(bench), 0.9),
        "pixel Gaussian": lambda bench: Made(gaussian(bench)(bench.count)),
        "pixel Gaussian, C > 0.99": lambda bench: filtered(bench, gaussian(bench), 0.99),
        "ascent from noise": lambda bench: climbed(bench, uniform(bench)(bench.count)),
        "ascent from noise, smooth": lambda bench: climbed(bench, uniform(bench)(bench.count), smooth=SMOOTH),
        "ascent from grey": lambda bench: climbed(bench, torch.full_like(uniform(bench)(bench.count), 0.5)),
        "ascent from an image": lambda bench: climbed(bench, bench.images.test[: bench.count], other=True, steps=60),
        "ascent from an image, near": lambda bench: climbed(
            bench, bench.images.test[: bench.count], other=True, steps=60, near=NEAR, smooth=SMOOTH / 3
        ),
    }
    for latents in (8, 2):
        for title, net in (("AE", f"autoencoder{latents}"), ("VAE", f"vae{latents}")):
            for kind, draw in LATENTS.items():
                found[f"{title}{latents}, {kind}"] = lambda bench, net=net, draw=draw: decoded(bench, net, draw)  # type: ignore[misc]
            found[f"{title}{latents}, reconstructions"] = lambda bench, net=net: reconstructed(bench, net)  # type: ignore[misc]
        found[f"CVAE{latents}, class"] = lambda bench, net=f"cvae{latents}": on_class(bench, net)  # type: ignore[misc]
    found["CVAE8, half image"] = lambda bench: on_image(bench, "completion", hide_half)
    found["CVAE8, blurred image"] = lambda bench: on_image(bench, "deblurring", blur)
    if images.classes == len(WORDS):
        found["CVAE8, word"] = on_word
    found["GMM on pixels"] = lambda bench: Made(
        mixture(bench.images.train.flatten(1), bench.count, bench.seed)
        .reshape(-1, *bench.images.train.shape[1:])
        .clamp(0, 1)
    )
    return found


def make(name: str, bench: Bench) -> Made:
    """Run an arm from a seed of its own, so that a resumed run makes what a whole one makes."""
    torch.manual_seed(zlib.crc32(name.encode()) + bench.seed)
    with torch.no_grad():
        return arms(bench.images)[name](bench)


# --- naive ------------------------------------------------------------------------------------------------------------


def uniform(bench: Bench) -> Callable[[int], Tensor]:
    """Return a source of uniform noise."""
    return lambda count: torch.rand(count, *bench.images.train.shape[1:])


def gaussian(bench: Bench) -> Callable[[int], Tensor]:
    """Return a source of pixels that are drawn one by one as in the training images."""
    return lambda count: pixel_gaussian(bench.images.train, count)


def filtered(bench: Bench, draw: Callable[[int], Tensor], threshold: float) -> Made:
    """Draw until the classifier is sure often enough; the first accepted ones count."""
    accepted, drawn = search(draw, bench.nets["classifier"], threshold, bench.count, most=bench.most)
    return Made(accepted[: bench.count], facts={"acceptance": len(accepted) / drawn, "drawn": drawn})


def climbed(bench: Bench, start: Tensor, *, other: bool = False, **options: Any) -> Made:
    """Climb to classes in turn; with ``other``, from held-out images, each to another class than its own, drawn at random."""
    classes = bench.images.classes
    wanted = torch.arange(len(start)) % classes
    if other:
        wanted = (bench.images.test_labels[: len(start)] + torch.randint(1, classes, wanted.shape)) % classes
    made, _ = ascend(bench.nets["classifier"], start, wanted, **options)
    return Made(made, wanted, {"moved": float((made - start).flatten(1).norm(dim=1).mean())})


# --- latents ----------------------------------------------------------------------------------------------------------


def training_latents(bench: Bench, net: str) -> Tensor:
    """Return latents of the training images; of a VAE draws from their posteriors, for a density of means is too narrow."""
    module = bench.nets[net]
    found: Tensor = getattr(module, "draw", module.encode)(bench.images.train)
    return found


def mixture(rows: Tensor, count: int, seed: int) -> Tensor:
    """Fit a Gaussian mixture to rows and draw from it. In float64, or scikit-learn's covariances may come out indefinite."""
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415 - an extra

    components = min(COMPONENTS, len(rows) // 20)
    model = GaussianMixture(components, random_state=seed, reg_covar=1e-5).fit(rows.double().numpy())
    return torch.from_numpy(model.sample(count)[0][torch.randperm(count)]).float()


def standard(latents: Tensor, count: int, seed: int) -> Tensor:  # noqa: ARG001 - all have the same arguments
    """Draw from a standard normal, whatever the latents are."""
    return torch.randn(count, latents.shape[1])


def scaled(latents: Tensor, count: int, seed: int) -> Tensor:
    """Draw from a normal of the latents' mean and deviations."""
    return latents.mean(0) + latents.std(0) * standard(latents, count, seed)


def box(latents: Tensor, count: int, seed: int) -> Tensor:  # noqa: ARG001
    """Draw uniformly from the latents' range."""
    return torch.lerp(latents.amin(0), latents.amax(0), torch.rand(count, latents.shape[1]))


LATENTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "N(0, I)": standard, "scaled": scaled, "box": box, "GMM": mixture,
}  # fmt: skip
"""Where latents are drawn from: the prior, a normal of the training latents' scale, their range, a density of them."""


def decoded(bench: Bench, net: str, draw: Callable[[Tensor, int, int], Tensor]) -> Made:
    """Decode random latents."""
    latents = training_latents(bench, net)
    images = bench.nets[net].decode(draw(latents, bench.count, bench.seed))
    return Made(images, facts={"latent_std": float(latents.std(0).mean())})


def reconstructed(bench: Bench, net: str) -> Made:
    """Encode and decode held-out images: the limit of the decoder."""
    module, real = bench.nets[net], bench.images.test[: bench.count]
    images = module.decode(module.encode(real))
    facts = {"squared_error": float((images - real).square().mean())}
    if hasattr(module, "posterior"):
        mean, log_variance = module.posterior(real)
        facts |= {
            "kl": float(divergence(mean, log_variance).sum(1).mean()),
            "active": float((mean.var(0) > 0.01).sum()),
        }
    return Made(images, bench.images.test_labels[: bench.count], facts)


# --- conditions -------------------------------------------------------------------------------------------------------


def on_class(bench: Bench, net: str) -> Made:
    """Sample classes in turn."""
    wanted = torch.arange(bench.count) % bench.images.classes
    return Made(bench.nets[net].sample(wanted), wanted)


def on_image(bench: Bench, net: str, spoil: Callable[[Tensor], Tensor]) -> Made:
    """Sample a whole image for each spoilt held-out one; the nearest spoilt training image stands beside it."""
    real, labels = bench.images.test[: bench.count], bench.images.test_labels[: bench.count]
    images = bench.nets[net].sample(spoil(real))
    spoilt = spoil(bench.images.train)
    nearest = bench.images.train[torch.cdist(spoil(real).flatten(1), spoilt.flatten(1)).argmin(1)]
    facts = {
        "squared_error": float((images - real).square().mean()),
        "neighbour_error": float((nearest - real).square().mean()),
        "two_draws": float((bench.nets[net].sample(spoil(real)) - images).flatten(1).norm(dim=1).mean()),
    }
    return Made(images, labels, facts)


def on_word(bench: Bench) -> Made:
    """Sample for the words of the classes in turn; a second round misspells them by leaving out their second letter."""
    wanted = torch.arange(bench.count) % len(WORDS)
    net, evaluator = bench.nets["word"], bench.nets["evaluator"]
    misspelled = net.sample(spell([word[0] + word[2:] for word in WORDS])[wanted])
    seen = float((evaluator(misspelled).argmax(1) == wanted).float().mean())
    return Made(net.sample(spell(WORDS)[wanted]), wanted, {"misspelled": seen})

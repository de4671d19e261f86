"""The networks of the recipe ``generative``: autoencoder, VAE, conditional VAE, and what judges their images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from typing_extensions import override

WIDTH = 256
SIGMA = 0.15
"""Standard deviation of a pixel around what the decoder says: the weight of the reconstruction against the KL."""


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Return two hidden layers between inputs and outputs."""
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs)
    )


class Cosine(pl.LightningModule):
    """AdamW whose rate falls to 0 along a cosine over the whole run."""

    rate = 1e-3

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Autoencoder(Cosine):
    """Squeeze an image through a few numbers and back: ``sum (x - decode(encode(x)))^2 / (2 sigma^2)``.

    Nothing says where latents shall lie, so that ``sample``, which decodes a standard normal, is a guess.

    Args:
        side: Pixels along an edge.
        latents: Numbers that an image is squeezed into.
    """

    def __init__(self, side: int = 8, latents: int = 8) -> None:
        super().__init__()
        self.side, self.latents = side, latents
        self.encoder, self.decoder = mlp(side * side, latents), mlp(latents, side * side)

    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``(images, latents)`` of images ``(images, 1, side, side)``."""
        found: Tensor = self.encoder(images.flatten(1))
        return found

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``(rows, 1, side, side)`` in [0, 1] of latents ``(rows, latents)``."""
        pixels: Tensor = self.decoder(latents).sigmoid()
        return pixels.reshape(-1, 1, self.side, self.side)

    def sample(self, count: int) -> Tensor:
        """Return images of latents drawn from a standard normal."""
        return self.decode(torch.randn(count, self.latents, device=self.device))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0]
        loss = misfit(self.decode(self.encode(images)), images)
        self.log("learn/loss", loss)
        return loss


class VAE(Autoencoder):
    """A variational autoencoder: the latents of all images together are held to a standard normal.

    The loss is the negative ELBO, ``sum (x - decode(z))^2 / (2 sigma^2) + KL(q(z|x) || N(0, I))``, summed over pixels and
    latents, with ``z`` drawn from ``q(z|x) = N(mean, diag(exp(log variance)))``. Kingma & Welling 2014, arXiv:1312.6114, section 3
    and appendix B. **The trap:** a mean over pixels in place of the sum makes the KL outweigh the image.
    """

    def __init__(self, side: int = 8, latents: int = 8) -> None:
        super().__init__(side, latents)
        self.encoder = mlp(side * side, 2 * latents)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the latents."""
        mean, log_variance = self.encoder(images.flatten(1)).chunk(2, 1)
        return mean, log_variance

    @override
    def encode(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]

    def draw(self, images: Tensor) -> Tensor:
        """Return a draw from the posterior of each image."""
        return drawn(*self.posterior(images))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0]
        mean, log_variance = self.posterior(images)
        kl = divergence(mean, log_variance).sum(1).mean()
        loss = misfit(self.decode(drawn(mean, log_variance)), images) + kl
        self.log_dict({"learn/loss": loss, "learn/kl": kl})
        return loss


class ConditionalVAE(Cosine):
    """A VAE whose encoder and decoder are told a condition, and which samples under it.

    Sohn et al. 2015, "Learning structured output representation using deep conditional generative models", section 4, with a
    prior that does not depend on the condition.

    Args:
        condition: From raw conditions (classes, images, words) to vectors ``(rows, condition_width)``; trained along.
        condition_width: Width of these vectors.
        side: Pixels along an edge.
        latents: Numbers for what the condition leaves open.
    """

    def __init__(self, condition: nn.Module, condition_width: int, *, side: int = 8, latents: int = 8) -> None:
        super().__init__()
        self.side, self.latents, self.condition = side, latents, condition
        self.encoder = mlp(side * side + condition_width, 2 * latents)
        self.decoder = mlp(latents + condition_width, side * side)

    def posterior(self, images: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the latents of images under conditions."""
        mean, log_variance = self.encoder(torch.cat([images.flatten(1), self.condition(told)], 1)).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: Tensor, told: Tensor) -> Tensor:
        """Return images in [0, 1] of latents under conditions."""
        pixels: Tensor = self.decoder(torch.cat([latents, self.condition(told)], 1)).sigmoid()
        return pixels.reshape(-1, 1, self.side, self.side)

    def sample(self, told: Tensor) -> Tensor:
        """Return an image for each condition."""
        return self.decode(torch.randn(len(told), self.latents, device=self.device), told)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, told = batch
        mean, log_variance = self.posterior(images, told)
        kl = divergence(mean, log_variance).sum(1).mean()
        loss = misfit(self.decode(drawn(mean, log_variance), told), images) + kl
        self.log_dict({"learn/loss": loss, "learn/kl": kl})
        return loss


def drawn(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return a draw from a diagonal normal, through which gradients reach its mean and variance."""
    return mean + (log_variance / 2).exp() * torch.randn_like(mean)


def misfit(found: Tensor, images: Tensor) -> Tensor:
    """Return the negative log-likelihood of images, summed over pixels and averaged over rows, but for a constant."""
    return (found - images).square().flatten(1).sum(1).mean() / (2 * SIGMA**2)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return ``KL(N(mean, variance) || N(0, 1))`` of each latent, in nats.

    >>> divergence(torch.tensor([1.0]), torch.tensor([0.0]))
    tensor([0.5000])
    """
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


# --- conditions -------------------------------------------------------------------------------------------------------

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = 12
"""Longest word; shorter ones are filled up with 0."""


class OneHot(nn.Module):
    """A class as a vector of zeros and a one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    @override
    def forward(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self.classes).float()


class LetterPairs(nn.Module):
    """A word as the mean of trained vectors of its pairs of neighbouring letters, so that a misspelled one lies near.

    Args:
        width: Of a vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(27 * 27, width)

    @override
    def forward(self, letters: Tensor) -> Tensor:
        framed = F.pad(letters, (1, 1))  # the first and the last letter make a pair with nothing
        pairs = framed[:, :-1] * 27 + framed[:, 1:]
        there = (pairs > 0).unsqueeze(-1)
        found: Tensor = (self.vectors(pairs) * there).sum(1) / there.sum(1).clamp_min(1)
        return found


def spell(words: Sequence[str]) -> Tensor:
    """Return letters as numbers from 1, ``(words, LETTERS)``; what is no letter of the alphabet is left out.

    >>> spell(["Ab!"])[0, :3].tolist()
    [1, 2, 0]
    """
    numbers = [[ord(letter) - 96 for letter in word.lower() if "a" <= letter <= "z"][:LETTERS] for word in words]
    return torch.tensor([found + [0] * (LETTERS - len(found)) for found in numbers])


# --- judges -----------------------------------------------------------------------------------------------------------


class Classifier(Cosine):
    """A small convolutional network; its 64 features before the last layer carry the Fréchet distance.

    Args:
        classes: Number of classes.
        side: Pixels along an edge.
    """

    num_features = 64

    def __init__(self, classes: int = 10, side: int = 8) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2, ceil_mode=True) if side > 8 else nn.Identity()
        left = math.ceil(side / (4 if side > 8 else 2))
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), pool,
            nn.Flatten(), nn.Linear(64 * left * left, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("learn/loss", loss)
        return loss

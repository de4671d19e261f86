"""Training of all networks of a seed of the recipe ``generative``; each is kept as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_peft.callbacks import GenerationMetrics, LatentPlane, SampleGrid
from lightning_peft.files import write_atomic
from lightning_peft.recipes.generative_data import Images
from lightning_peft.recipes.generative_models import (
    VAE,
    WORDS,
    Autoencoder,
    Classifier,
    ConditionalVAE,
    LetterPairs,
    OneHot,
    spell,
)

BATCH = 128
JUDGE_EPOCHS = 0.25
"""A judge trains for this share of the epochs of a generator."""


@dataclass(frozen=True)
class Plan:
    """How a network of a seed is made.

    Args:
        build: Makes it.
        data: Makes its training tensors.
        judge: Whether it judges images, and trains for fewer epochs.
        watched: Makes callbacks that watch it, in the first seed.
    """

    build: Callable[[], pl.LightningModule]
    data: Callable[[], tuple[Tensor, ...]]
    judge: bool = False
    watched: Callable[[], list[pl.Callback]] = list


def plans(images: Images, evaluator: Callable[[], Classifier]) -> dict[str, Plan]:
    """Return the networks of a seed in the order of their training; the evaluator is asked for once it is trained."""
    side, classes, rows = images.side, images.classes, (images.train, images.labels)

    def conditional(told: Tensor, condition: Callable[[], nn.Module], width: int, latents: int = 8) -> Plan:
        return Plan(
            lambda: ConditionalVAE(condition(), width, side=side, latents=latents), lambda: (images.train, told)
        )

    def watched() -> list[pl.Callback]:
        measured = GenerationMetrics(
            images.train, features=evaluator().features, held_out=images.test, count=len(images.test), every_n_steps=400
        )
        plane = LatentPlane(TensorDataset(images.train, images.labels), every_n_steps=400)
        return [SampleGrid(every_n_steps=400), plane, measured]

    found = {
        "classifier": Plan(lambda: Classifier(classes, side), lambda: rows, judge=True),
        "evaluator": Plan(lambda: Classifier(classes, side), lambda: rows, judge=True),
        "detector": Plan(lambda: Classifier(2, side), lambda: digits_and_others(images), judge=True),
    }
    for latents in (8, 2):
        size = {"side": side, "latents": latents}
        for name, kind in (("autoencoder", Autoencoder), ("vae", VAE)):
            found[f"{name}{latents}"] = Plan(partial(kind, **size), lambda: rows, watched=watched)
        found[f"cvae{latents}"] = conditional(images.labels, lambda: OneHot(classes), classes, latents)
    found["completion"] = conditional(hide_half(images.train), nn.Flatten, side * side)
    found["deblurring"] = conditional(blur(images.train), nn.Flatten, side * side)
    if classes == len(WORDS):
        found["word"] = conditional(
            spell([WORDS[label] for label in images.labels.tolist()]), lambda: LetterPairs(32), 32
        )
    return found


def hide_half(images: Tensor) -> Tensor:
    """Return images whose right half is 0."""
    hidden = images.clone()
    hidden[..., images.shape[-1] // 2 :] = 0
    return hidden


def blur(images: Tensor) -> Tensor:
    """Return images whose pixels are means over squares of a quarter of an edge."""
    square = max(2, images.shape[-1] // 4)
    coarse = F.avg_pool2d(images, square, ceil_mode=True)
    return F.interpolate(coarse, images.shape[-2:], mode="nearest")


def digits_and_others(images: Images) -> tuple[Tensor, Tensor]:
    """Return real images (class 1) and as many others (class 0): noise, blurred noise, shuffled pixels, two images mixed."""
    real = images.train
    noise, smooth, shuffled, mixed = torch.tensor_split(real, 4)
    noise, smooth = torch.rand_like(noise), F.avg_pool2d(torch.rand_like(smooth), 3, 1, 1)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    order = torch.rand(len(shuffled), real[0].numel()).argsort(1)
    shuffled = shuffled.flatten(1).gather(1, order).reshape(shuffled.shape)
    mixed = (mixed + real[torch.randint(len(real), (len(mixed),))]) / 2
    others = torch.cat([noise, (smooth - low) / (high - low), shuffled, mixed])
    return torch.cat([real, others]), torch.cat([torch.ones(len(real)), torch.zeros(len(others))]).long()


def fit(
    net: Any, tensors: Sequence[Tensor], epochs: int, *, out: Path, logger: Any = False, callbacks: Sequence[Any] = ()
) -> Any:
    """Train a network on the CPU and return it, frozen and in eval mode."""
    rows = TensorDataset(*tensors)
    loader: DataLoader[Any] = DataLoader(rows, sampler=BatchSampler(RandomSampler(rows), BATCH, False), batch_size=None)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=logger,
        log_every_n_steps=20,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    ).fit(net, loader)
    return net.eval().requires_grad_(False)


def train(images: Images, seed: int, epochs: int, out: Path, *, tick: Callable[[str], None]) -> dict[str, Any]:
    """Train the networks of a seed; those whose file is there are read.

    Args:
        images: What they learn.
        seed: Of the run; each network has its own.
        epochs: Of a generator.
        out: Folder of the run.
        tick: Is told the name of each network that is ready.
    """
    nets: dict[str, Any] = {}
    for number, (name, plan) in enumerate(plans(images, lambda: nets["evaluator"]).items()):
        file = out / "nets" / f"seed-{seed}" / f"{name}.pt"
        pl.seed_everything(1000 * seed + number, verbose=False)
        net: Any = plan.build()
        if file.is_file():
            net.load_state_dict(torch.load(file, weights_only=True))
            nets[name] = net.eval().requires_grad_(False)
        else:
            logger = TensorBoardLogger(out / "logs", name="", version=name) if seed == 0 else False
            callbacks = plan.watched() if seed == 0 else []
            length = max(1, round(epochs * JUDGE_EPOCHS)) if plan.judge else epochs
            nets[name] = fit(net, plan.data(), length, out=out, logger=logger, callbacks=callbacks)
            write_atomic(file, partial(torch.save, nets[name].state_dict()))
        tick(f"seed {seed}: {name}")
    return nets

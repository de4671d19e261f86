"""Measure how near a generative model's samples come to real data, while it learns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_peft.callbacks.looks import Looks, Sampler
from lightning_peft.counts import check_counts
from lightning_peft.distributed import gather_objects
from lightning_peft.logging import log_values, register_chart
from lightning_peft.metrics.frechet_distance import frechet_distance
from lightning_peft.metrics.manifold import (
    copying,
    density_coverage,
    nearest_distances,
    neighbour_radii,
    precision_recall,
)

_CHARTS = {
    "nearest neighbour": ("nearest",),
    "manifold": ("precision", "recall", "density", "coverage"),
    "Fréchet distance": ("fid",),
    "copying": ("nearer",),
}


class GenerationMetrics(Looks):
    """Log nearest-neighbour distance, precision, recall, density, coverage, FID and copying of a module's samples.

    ``generation/nearest``, ``/precision``, ``/recall``, ``/density``, ``/coverage``: :mod:`lightning_peft.metrics.manifold`;
    ``/fid`` where a feature network is given; ``/nearer`` where held-out rows are: the share by which samples are nearer to
    training rows than held-out ones are, 0.5 where nothing is copied. Training is bit-identical with and without it, and the
    feature network is in no checkpoint.

    **The trap:** no single one of them ranks models (a smooth sampler has high precision and low recall; FID takes adversarial
    noise for progress). All depend on the number of samples, so keep ``count``.

    Args:
        real: Training images ``(rows, ...)``. Distances between all pairs are taken: some thousand rows are enough.
        sample: ``sample(module, count)`` returns images of the same shape; unset, the module's own ``sample(count)``.
        features: Network of FID, from images to ``(images, width)``.
        held_out: Real rows that the model is not trained on.
        count: Samples of a look.
        k: Which neighbour gives a ball its radius.
        every_n_steps: Optimizer steps between looks; it looks after the last one too.
        seed: Of the draws.
        name: A part of the keys, ``generation/<name>/fid``, where several stand side by side; they share their charts.

    Raises:
        ValueError: For numbers out of range, or held-out rows that are none or of another shape; before the first step, for a
            module that cannot sample; at a look, for samples of another shape.

    >>> import torch
    >>> GenerationMetrics(torch.rand(20, 1, 8, 8), k=3).count
    500
    """

    def __init__(
        self,
        real: Tensor,
        sample: Sampler | None = None,
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        held_out: Tensor | None = None,
        count: int = 500,
        k: int = 5,
        every_n_steps: int = 500,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, seed, name)
        self.count, self.k = count, k
        check_counts(self, "count", "k")
        if min(count, len(real)) <= k:
            raise ValueError(f"GenerationMetrics: k={k!r} must be below count={count!r} and {len(real)} rows.")
        if held_out is not None and (not len(held_out) or held_out.shape[1:] != real.shape[1:]):
            raise ValueError(
                f"GenerationMetrics: held_out of {tuple(held_out.shape)} must hold rows of {tuple(real.shape[1:])}, as real does."
            )
        self.real, self.sample, self.features, self.held_out = real.cpu(), sample, features, held_out
        self.values: dict[str, float] = {}
        """What the last look measured."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._method(self.sample, "sample", pl_module)
            given = {"fid": self.features, "nearer": self.held_out}
            for chart, names in _CHARTS.items():
                shown = [self._key(name) for name in names if given.get(name, True) is not None]
                if shown:
                    register_chart(trainer, "Generation", chart, shown)

    @override
    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        samples = self._samples(self.sample, pl_module, self.count)
        if samples.shape[1:] != self.real.shape[1:]:
            raise ValueError(
                f"GenerationMetrics: samples of shape {tuple(samples.shape[1:])} cannot be compared with real rows of "
                f"{tuple(self.real.shape[1:])}."
            )
        # One process says what was found: sums may differ in their last digit.
        self.values = gather_objects(self._measure(samples) if trainer.is_global_zero else {})[0]
        log_values(trainer, {self._key(name): value for name, value in self.values.items()})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "values": {**self.values}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.values = {**state_dict["values"]}

    def _measure(self, samples: Tensor) -> dict[str, float]:
        nearest = nearest_distances(samples, self.real)
        found = {"nearest": float(nearest.mean())}
        found |= zip(
            ("precision", "recall"), precision_recall(self.real, samples, k=self.k, radii=self._radii), strict=True
        )
        found |= zip(
            ("density", "coverage"), density_coverage(self.real, samples, k=self.k, radii=self._radii), strict=True
        )
        if self.features is not None:
            found["fid"] = frechet_distance(self.features, self.real, samples)
        if self.held_out is not None:
            found["nearer"], _ = copying(nearest, self._held_out_distances)
        return found

    # What no look changes; taken at the first one, and by the process that measures.
    @cached_property
    def _radii(self) -> Tensor:
        return neighbour_radii(self.real, self.k)

    @cached_property
    def _held_out_distances(self) -> Tensor:
        assert self.held_out is not None
        return nearest_distances(self.held_out.cpu(), self.real)

"""See what a generative model makes, while it learns."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_peft.callbacks.looks import Looks, Sampler
from lightning_peft.counts import check_counts
from lightning_peft.image_grid import image_grid, save_image
from lightning_peft.logging import log_image


class SampleGrid(Looks):
    """Draw samples from a module during training and show them as one image.

    Every look draws from the same seed, so that the same latents are seen to change. Training is bit-identical with and without
    it. The image goes to every TensorBoard logger as ``generation/samples``; other loggers get none, for them there are files.

    Args:
        sample: ``sample(module, count)`` returns images ``(count, channels, height, width)`` in [0, 1]; unset, the module's own
            ``sample(count)``.
        count: Images of a look.
        every_n_steps: Optimizer steps between looks; it looks after the last one too.
        seed: Of the draws.
        folder: Where each look is written as ``samples-STEP.png``; unset, nowhere.
        name: A part of the keys, ``generation/<name>/samples``, and a folder within ``folder``, where several stand side by side.

    Raises:
        ValueError: For a count or an interval that is no whole number of at least 1; before the first step, for a module that
            cannot sample.

    >>> SampleGrid(count=16).every_n_steps
    200
    """

    def __init__(
        self,
        sample: Sampler | None = None,
        *,
        count: int = 64,
        every_n_steps: int = 200,
        seed: int = 0,
        folder: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, seed, name)
        self.sample, self.count = sample, count
        check_counts(self, "count")
        self.folder = None if folder is None else Path(folder)
        self.samples: Tensor | None = None
        """What the last look drew."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._method(self.sample, "sample", pl_module)

    @override
    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.samples = self._samples(self.sample, pl_module, self.count)
        if trainer.is_global_zero:
            grid = image_grid(self.samples)
            log_image(trainer, self._key("samples"), grid)
            if self.folder is not None:
                save_image(self._file(self.folder, "samples", trainer), grid)

"""See where a model puts each class in its latent space, while it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_peft.callbacks.looks import Looks
from lightning_peft.counts import check_counts
from lightning_peft.data.mix_loader import Rows, carried_options, row_count
from lightning_peft.files import write_atomic
from lightning_peft.latent_plane import draw_latents
from lightning_peft.logging import log_figure


class LatentPlane(Looks):
    """Draw the latents of a validation set by class, and what the decoder makes of the plane they lie on.

    Two latents are drawn as they are, more by their first two principal components; beside them stands a decoded grid over the
    same extent. Training is bit-identical with and without it. The picture goes to every TensorBoard logger as
    ``generation/latents``; latents that are no finite numbers are left out.

    **The trap:** of many latents a plane shows the part of the variance that its title says, and the grid decodes the plane
    alone: overlap there is no overlap in the whole space.

    Args:
        rows: Rows ``(x, label)`` or ``x``, as a loader or (in batches of 256) a map-style dataset. Training rows show what the
            decoder was made for, held-out rows whether others land there too; for both give each plane a ``name``.
        encode: ``encode(module, x)`` returns latents ``(rows, latents)``; unset, the module's ``encode(x)``. Of a distribution
            take the mean.
        decode: ``decode(module, latents)`` returns images; unset, the module's ``decode(latents)`` if there is one, else the
            grid is left out.
        every_n_steps: Optimizer steps between looks; it looks after the last one too.
        most: Rows that are drawn, the first ones.
        side: Decoded images along an edge.
        folder: Where each look is written as ``latents-STEP.png``; unset, nowhere.
        name: A part of the keys, ``generation/<name>/latents``, and a folder within ``folder``, where several stand side by side.

    Raises:
        ValueError: For a number that is no whole one of at least 1, or rows without a length; before the first step, for a module
            that cannot encode; at a look, for latents that are no table.

    >>> LatentPlane([(torch.zeros(4), 0)]).most
    2000
    """

    def __init__(
        self,
        rows: Rows,
        *,
        encode: Callable[[Any, Any], Tensor] | None = None,
        decode: Callable[[Any, Tensor], Tensor] | None = None,
        every_n_steps: int = 200,
        most: int = 2000,
        side: int = 16,
        folder: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, 0, name)
        self.most, self.side = most, side
        check_counts(self, "most", "side")
        row_count(rows.dataset if isinstance(rows, DataLoader) else rows, "LatentPlane: rows")
        self.rows, self.encode, self.decode = rows, encode, decode
        self.folder = None if folder is None else Path(folder)
        self.latents: Tensor | None = None
        """What the last look found, ``(rows, latents)``."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._method(self.encode, "encode", pl_module)

    @override
    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        encode, found, labels = self._method(self.encode, "encode", pl_module), [], []
        for batch in self._loader():
            x, *rest = batch if isinstance(batch, list | tuple) else (batch,)
            plugin: Any = trainer.precision_plugin
            found.append(encode(pl_module, trainer.strategy.batch_to_device(plugin.convert_input(x))).float().cpu())
            labels += rest[:1]
        self.latents = torch.cat(found)
        # A model that diverges ends no training by being looked at.
        drawn = self.latents.isfinite().reshape(len(self.latents), -1).all(1)
        if int(drawn.sum()) < min(2, len(drawn)):
            return
        figure = draw_latents(
            self.latents[drawn], torch.cat(labels)[drawn] if labels else None, self._decoder(pl_module), side=self.side,
            title=f"latents at step {trainer.global_step:,}",
        )  # fmt: skip
        log_figure(trainer, self._key("latents"), figure)
        if self.folder is not None and trainer.is_global_zero:
            path = self._file(self.folder, "latents", trainer)
            write_atomic(path, lambda draft: figure.savefig(draft, dpi=100, format="png"))

    def _loader(self) -> DataLoader[Any]:
        given = self.rows
        loader = given if isinstance(given, DataLoader) else DataLoader(given, batch_size=256)
        count = min(self.most, row_count(loader.dataset, "LatentPlane: rows"))
        first: Subset[Any] = Subset(loader.dataset, range(count))
        return DataLoader(first, loader.batch_size or 256, generator=torch.Generator(), **carried_options(loader))

    def _decoder(self, module: pl.LightningModule) -> Callable[[Tensor], Tensor] | None:
        if self.decode is None and not callable(getattr(module, "decode", None)):
            return None
        decode = self._method(self.decode, "decode", module)
        kind = next(module.parameters()).dtype
        return lambda latents: decode(module, latents.to(module.device, kind)).float().cpu()

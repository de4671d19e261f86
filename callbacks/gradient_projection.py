"""Keep training steps from undoing an old skill: a gradient that works against it loses the part that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, default_collate
from typing_extensions import override

from lightning_peft.data.mix_loader import Rows, row_count
from lightning_peft.data.streams import Stream, rank_slice
from lightning_peft.distributed import refuse_unsupported
from lightning_peft.logging import log_values, register_chart
from lightning_peft.one_lightning import refuse_pytorch_lightning
from lightning_peft.randomness import random_state_kept

_OWNER = "GradientProjection"


def project_gradients(gradients: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[bool, float]:
    """Take out of a gradient, in place, the part that points against another one: ``g - (g . r / r . r) r`` if ``g . r < 0``.

    A gradient that does not point against it, or is not finite, stays bit for bit what it is. Chaudhry et al. 2019,
    arXiv:1812.00420 (A-GEM), equation 11.

    Args:
        gradients: ``g``, parameter by parameter; changed.
        references: ``r``, of the same shapes.

    Returns:
        Whether it was projected, and the cosine of both before: 0 where one of them is 0.

    >>> gradient = torch.tensor([1.0, -2.0])
    >>> project_gradients([gradient], [torch.tensor([0.0, 1.0])])[0], gradient
    (True, tensor([1., 0.]))
    """
    dot, own, other = (
        _product(first, second)
        for first, second in ((gradients, references), (gradients, gradients), (references, references))
    )
    projected = dot < 0 and 0 < other < float("inf")
    if projected:
        for gradient, reference in zip(gradients, references, strict=True):
            gradient.add_(reference.to(gradient.dtype), alpha=-dot / other)
    return projected, dot / (own**0.5 * other**0.5) if own > 0 and other > 0 else 0.0


class GradientProjection(pl.Callback):
    """Project each step's gradient so that, to first order, the loss on old rows does not rise (A-GEM).

    Before every optimizer step: ``g_ref`` is the gradient of ``step`` on ``batch_size`` old rows. Where ``g . g_ref < 0``,
    ``g <- g - (g . g_ref / g_ref . g_ref) g_ref``, over the parameters that this step moves (those of one optimizer, if there
    are several). Where it is not, nothing changes, bit for bit. ``g`` is the whole gradient of the step: accumulated, averaged
    over processes, and not clipped yet. Clipping by norm comes after and keeps the angle; clipping by value may bend the
    gradient back.

    Which rows come depends on the seed and the step alone: they resume exactly on any number of processes, each of which
    takes its share. The pass over old rows runs in the mode that training is in, and leaves dropout's generators, gradients
    and running statistics as they were.

    ``replay/alignment`` is the cosine of ``g`` and ``g_ref`` before it is projected, ``replay/projected`` the share of the
    run's steps that were.

    Chaudhry et al. 2019, arXiv:1812.00420.

    **The trap:** the gradient is projected, not the step: momentum, Adam's divisor and weight decay act afterwards.

    Args:
        memory: Old rows: a map-style dataset, or a loader, whose dataset and collate function are then used.
        step: ``step(module, batch)`` returns the mean loss of old rows; the batch is on the module's device.
        batch_size: Old rows of a step, over all processes.
        seed: Seed of their order.
        update_statistics: Let batch normalisation count old rows in its running statistics.

    Raises:
        ValueError: For an empty memory, a step that is no function, fewer rows than processes; before training, for a strategy
            other than a single device and DDP, or rows that do not collate; in training, for a step that returns no loss.
    """

    def __init__(
        self,
        memory: Rows,
        step: Callable[[Any, Any], Tensor],
        *,
        batch_size: int = 64,
        seed: int = 0,
        update_statistics: bool = False,
    ) -> None:
        if not callable(step):
            raise ValueError(f"{_OWNER}: step={step!r} must be a function of (module, batch) that returns a loss.")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"{_OWNER}: batch_size={batch_size!r} must be a whole number of at least 1.")
        self.loader = memory if isinstance(memory, DataLoader) else None
        self.rows = cast("Dataset[Any]", memory.dataset if isinstance(memory, DataLoader) else memory)
        self.memory = Stream(row_count(self.rows, f"{_OWNER}: memory"), seed)
        self.step, self.batch_size, self.seed = step, batch_size, seed
        self.update_statistics = update_statistics
        self.steps, self.projected = 0, 0
        self.alignment = 0.0

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return self._generate_state_key(seed=self.seed)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage != "fit":
            return
        refuse_unsupported(trainer, _OWNER)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"{_OWNER}: strategy ModelParallelStrategy (FSDP2) is not supported: a gradient beside the training's cannot be "
                "taken there. Use a single device or strategy='ddp'."
            )
        if self.batch_size < trainer.world_size:
            raise ValueError(
                f"{_OWNER}: batch_size={self.batch_size} is fewer than one row for each of {trainer.world_size} processes."
            )
        register_chart(trainer, "Replay", "gradient and old gradient", ["replay/alignment"])
        register_chart(trainer, "Replay", "share of projected steps", ["replay/projected"])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:  # a resumed run goes on counting
            self.steps, self.projected, self.alignment = 0, 0, 0.0
        with random_state_kept(pl_module.device):
            try:
                self._batch(trainer, [0])
            except Exception as error:
                raise ValueError(
                    f"{_OWNER}: the first row of the memory cannot be put into a batch ({error}). Old rows must look like the "
                    "training rows, or come as a loader with a collate_fn of its own."
                ) from error

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not moving:
            return
        with random_state_kept(pl_module.device), _statistics_kept(pl_module, keep=not self.update_statistics):
            references = self._reference(trainer, pl_module, moving)
        gradients = [cast("Tensor", parameter.grad) for parameter in moving]
        with torch.no_grad():
            projected, self.alignment = project_gradients(gradients, references)
        self.steps, self.projected = self.steps + 1, self.projected + projected

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.steps:
            pl_module.log_dict(self._values(), on_step=True, on_epoch=False)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.steps:  # past log_every_n_steps, so that a short run has a curve too
            log_values(trainer, self._values())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "projected": self.projected, "alignment": self.alignment}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.projected = state_dict["steps"], state_dict["projected"]
        self.alignment = state_dict["alignment"]

    def indices(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """Return the old rows that one process takes before an optimizer step, counted from 0."""
        own = rank_slice(self.batch_size, rank, world, turn=0)
        return [int(index) for index in self.memory.draws(step * self.batch_size, self.batch_size)[own]]

    def _values(self) -> dict[str, float]:
        return {"replay/projected": self.projected / self.steps, "replay/alignment": self.alignment}

    def _batch(self, trainer: pl.Trainer, indices: list[int]) -> Any:
        loader = self.loader if self.loader is not None else trainer.train_dataloader
        collate = loader.collate_fn if isinstance(loader, DataLoader) and loader.batch_size else default_collate
        batch = collate([self.rows[index] for index in indices])
        return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))

    def _reference(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, moving: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """Return the gradient of the loss on this step's old rows, averaged over processes, each by its rows."""
        indices = self.indices(trainer.global_step, trainer.global_rank, trainer.world_size)
        batch = self._batch(trainer, indices)
        with torch.enable_grad(), trainer.precision_plugin.forward_context():
            loss = self.step(pl_module, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r:.80}"
            raise ValueError(
                f"{_OWNER}: step returned {found}; it must return the loss of old rows, with its gradient."
            )
        scaler = trainer.scaler  # half precision: its factor cancels out, and keeps small gradients from vanishing
        loss = (loss if scaler is None else scaler.scale(loss)) * (len(indices) * trainer.world_size / self.batch_size)
        # Past .grad, and past the hooks with which DDP averages: that gradient is finished.
        taken = torch.autograd.grad(loss.reshape(()), moving, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(moving, taken, strict=True)]
        return gradients if trainer.world_size == 1 else _averaged(trainer, gradients)


def _averaged(trainer: pl.Trainer, gradients: Sequence[Tensor]) -> list[Tensor]:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    mean = cast("Tensor", trainer.strategy.reduce(flat, reduce_op="mean"))
    parts = torch.split(mean, [gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def _product(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return float(sum((_wide(a) * _wide(b)).sum() for a, b in zip(first, second, strict=True)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
@torch.no_grad()
def _statistics_kept(module: nn.Module, *, keep: bool) -> Iterator[None]:
    buffers = list(module.buffers()) if keep else []
    kept = [(buffer, buffer.clone()) for buffer in buffers if buffer.is_floating_point() or buffer.numel() == 1]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)

"""Callbacks that look at a module every so many steps, and leave training as it would be without them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.callbacks.measuring import averaged, forward_context
from lightning_peft.counts import check_counts
from lightning_peft.logging import check_key
from lightning_peft.old_task import untouched
from lightning_peft.one_lightning import refuse_pytorch_lightning

Sampler = Callable[[Any, int], Tensor]
"""From a module and a number to so many images."""


class Looks(pl.Callback):
    """Looks every so many optimizer steps and after the last, in eval mode, without gradient, always from the same seed.

    Random numbers, modes and weights are as before afterwards. Every process looks, for sharded modules communicate in each
    forward; all see the same. Where a ``WeightAveraging`` callback averages the weights, the averaged ones are looked at.

    Args:
        every_n_steps: Optimizer steps between looks.
        seed: Of the random numbers of each look: pictures of successive steps show the same draws.
        name: A part of the keys and of the folder, where several of a kind stand side by side.

    Raises:
        ValueError: For an interval that is no whole number of at least 1.
    """

    def __init__(self, every_n_steps: int, seed: int, name: str | None = None) -> None:
        self.every_n_steps, self.seed, self.name = every_n_steps, seed, name
        check_counts(self, "every_n_steps")
        self._looked_at = 0

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; callbacks of different names may stand side by side."""
        return self._generate_state_key(name=self.name) if self.name else super().state_key

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _key(self, value: str) -> str:
        return check_key(f"generation/{self.name}/{value}" if self.name else f"generation/{value}")

    def _file(self, folder: Path, stem: str, trainer: pl.Trainer) -> Path:
        return folder / (self.name or "") / f"{stem}-{trainer.global_step:06}.png"

    @abstractmethod
    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the module, on every process."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), self._owner)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._looked_at = min(self._looked_at, trainer.global_step)  # it may be of an earlier fit

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step // self.every_n_steps > self._looked_at // self.every_n_steps:
            self._looked_at = trainer.global_step
            self._undisturbed(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._looked_at:  # nothing is noted: a longer run may go on from here
            self._undisturbed(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"looked_at": self._looked_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._looked_at = state_dict["looked_at"]

    @torch.no_grad()
    def _undisturbed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with averaged(trainer, pl_module), forward_context(trainer), untouched(pl_module, pl_module.device):
            torch.manual_seed(self.seed)
            self._look(trainer, pl_module)

    def _method(self, given: Callable[..., Any] | None, name: str, module: pl.LightningModule) -> Callable[..., Any]:
        """Return a function of the module and more: the given one, or the module's method of that name."""
        if given is not None:
            return given
        method = getattr(module, name, None)
        if not callable(method):
            raise ValueError(
                f"{self._owner}: {type(module).__name__} has no method {name!r}; write one, or pass {name}= a function of the "
                "module and what the method would take."
            )
        return lambda _, *arguments: method(*arguments)

    def _samples(self, given: Sampler | None, module: pl.LightningModule, count: int) -> Tensor:
        found = self._method(given, "sample", module)(module, count)
        if not isinstance(found, Tensor) or len(found) != count:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{self._owner}: sample of {count} returned {shape}; it must return a tensor ({count}, ...)."
            )
        return found.detach().float().cpu()

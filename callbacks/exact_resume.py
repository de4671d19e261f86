"""Go on after a kill as if nothing had happened: random numbers, the place in the data, half-accumulated gradients."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.data.resumable_loader import LoaderPosition, can_go_on, goes_on_by_itself, resumable
from lightning_peft.distributed import as_part_of, gather_objects, local_part, own_buffers, rank
from lightning_peft.fit_progress import Left, go_on, loads_anew, settle, where
from lightning_peft.logged_metrics import logged_metrics, set_logged_metrics
from lightning_peft.one_lightning import refuse_pytorch_lightning
from lightning_peft.randomness import RandomState, random_state, set_random_state
from lightning_peft.train_loader import change_train_loader, leave_loaders

_OWNER = "ExactResume"
_GLOBAL_SEED = "PL_GLOBAL_SEED"  # where Lightning's seed_everything leaves the seed that the samplers it adds take


class ExactResume(pl.Callback):
    """Resume exactly: a run that was killed and resumed ends with the weights of one that was not.

    Lightning's checkpoints hold weights, optimizers, schedulers and counters. This adds, for every process, the state of all
    random generators (Python, numpy, torch, CUDA), the position in map-style loaders, the gradients of a batch that is
    accumulated by halves, and what was logged. What was left of a batch or an epoch when the checkpoint was written follows
    first: the validation that was due, the hooks of the epoch's end, and the look at its metric that a ``ReduceLROnPlateau``
    takes; Lightning leaves them out. Loaders that keep their own position (``state_dict`` and ``load_state_dict``) are left to
    do so; one that can do neither is named in a warning.

    **The trap:** what validation draws is taken back, so that the random numbers of training do not depend on how often it is
    validated. A run with this callback and random validation loaders thus differs from one without.

    Args:
        reload: Load the rows that the epoch has used already once more when it resumes, instead of passing over them. Needed
            only where worker processes transform rows at random; takes the time of loading them.

    Raises:
        ValueError: On resume, if the checkpoint was written by another number of processes.

    >>> ExactResume().reload
    False
    """

    def __init__(self, *, reload: bool = False) -> None:
        self.reload = reload
        self._device: torch.device | None = None
        self._positions: list[LoaderPosition] = []
        self._step = 0
        self._random: RandomState | None = None
        self._resume: dict[str, Any] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            self._device, self._positions = trainer.strategy.root_device, []
            self._random = self._resume = None
            change_train_loader(trainer, _OWNER, self._follow, rows=False)
            if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
                rank_zero_warn(
                    f"{_OWNER}: training_step takes dataloader_iter, so which rows were used is not known: a run resumed in "
                    "mid-epoch gets its first rows again, unless the loader has state_dict and load_state_dict."
                )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own: dict[str, Any] = {
            "random": self._random if trainer.validating else random_state(self._device),
            "buffers": own_buffers(pl_module),
            "logged": logged_metrics(trainer),
        }
        ended = trainer.is_last_batch  # of the epoch: what loaders have left is not asked for
        if not (ended and loads_anew(trainer)):  # new ones come with generators of their own
            own["positions"] = {number: one.state_dict(at_the_end=ended) for number, one in enumerate(self._positions)}
        # Of optimizers that are stepped by hand, one may accumulate while another steps.
        if trainer.global_step == self._step or not pl_module.automatic_optimization:
            own["gradients"] = _gradients(pl_module)
        seed = os.environ.get(_GLOBAL_SEED)
        checkpoint["callbacks"][self.state_key] = {
            "processes": gather_objects(own),
            "seed": seed,
            "place": where(trainer),
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        saved = checkpoint["callbacks"].get(self.state_key)
        if saved is None:
            rank_zero_warn(
                f"{_OWNER}: the checkpoint was written without {_OWNER}, so random numbers and the place in the data are lost: "
                "an epoch that was begun starts again from its first rows."
            )
            return
        processes = saved["processes"]
        if len(processes) != trainer.world_size:
            raise ValueError(
                f"{_OWNER}: the checkpoint was written by {len(processes)} processes, this run has {trainer.world_size}; it "
                "cannot go on exactly. Use as many as before, or leave the callback out."
            )
        if saved["seed"] is not None:
            os.environ[_GLOBAL_SEED] = saved["seed"]
        self._resume = {**processes[rank()], "place": saved["place"], "left": settle(checkpoint, saved["place"])}
        self._random = self._resume["random"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = -1
        if self._resume is not None:
            left = self._resume["left"]
            set_logged_metrics(trainer, self._resume["logged"], in_epoch=left not in {Left.EPOCH, Left.NOTHING})
            go_on(trainer, left, self._resume["place"])
            for name, buffer in self._resume["buffers"].items():
                pl_module.get_buffer(name).copy_(buffer)
        if self._random is not None:
            set_random_state(self._random, self._device)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._resume is not None:
            _give_gradients(pl_module, self._resume.get("gradients", {}))
            self._resume = None
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._random = random_state(self._device)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._random is not None:
            set_random_state(self._random, self._device)
            if self._resume is not None and not pl_module.automatic_optimization:
                self._resume["gradients"] = {}  # Lightning takes those of manual steps back before it validates

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        leave_loaders(trainer, _OWNER)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        leave_loaders(trainer, _OWNER)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return {**vars(self), "_positions": [], "_resume": None, "_random": None}

    def _follow(self, loaders: Any) -> CombinedLoader:
        """Let each loader of a collection go on, as far as it can."""
        given = isinstance(loaders, CombinedLoader)
        combined = copy.copy(loaders) if given else CombinedLoader(loaders, "max_size_cycle")
        while len(self._positions) < len(combined.flattened):
            self._positions.append(LoaderPosition(self._device, reload=self.reload))
        combined.flattened = [
            resumable(loader, self._positions[number], functools.partial(self._resumes, number))
            if can_go_on(loader) and not goes_on_by_itself(loader)
            else _own_way(loader)
            for number, loader in enumerate(combined.flattened)
        ]
        return combined

    def _resumes(self, number: int) -> bool:
        """Whether the pass that a loader begins is the rest of the one that a checkpoint was taken in."""
        if self._resume is None:
            return False
        if (state := self._resume.pop("random", None)) is not None:  # again: an iterator or a hook may have drawn since
            set_random_state(state, self._device)
        position = self._resume.get("positions", {}).pop(number, None)
        if position is not None:
            self._positions[number].load_state_dict(position)
        return position is not None


def _own_way(loader: Any) -> Any:
    """Name a loader that can be followed by nobody."""
    if not goes_on_by_itself(loader):
        rank_zero_warn(
            f"{_OWNER}: a training loader ({type(loader).__name__}) cannot go on where it stopped: it is no DataLoader over a "
            "map-style dataset with a length, torch's own __iter__ and generators, and batches in order, and has no state_dict "
            "and load_state_dict. A run resumed in mid-epoch gets its first rows again."
        )
    return loader


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return this process's share of every gradient."""
    return {name: local_part(p.grad).cpu() for name, p in module.named_parameters() if p.grad is not None}


def _give_gradients(module: nn.Module, gradients: dict[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, gradient in gradients.items():
        parameter = parameters[name]
        parameter.grad = as_part_of(parameter, gradient.to(parameter.device))

"""The arms of ``schedules.py``: one training by every way of unfreezing, the head first and all from the second epoch on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BackboneFinetuning, Checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_peft.callbacks import FreezeSchedule
from lightning_peft.distributed import rank, world_size

SEED, LR, MOMENTUM, WEIGHT_DECAY = 0, 0.1, 0.9, 0.01
THAW_EPOCH = 1
PEER = "finetuning-scheduler"


@dataclass(frozen=True)
class Task:
    """A network and its rows."""

    width: int
    depth: int
    batch: int
    """Rows of a step over all processes."""
    steps: int
    """Steps of an epoch."""
    epochs: int
    dtype: torch.dtype

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return what all processes train on, ``(steps, batch, width)`` and its labels."""
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(self.steps, self.batch, self.width, generator=generator, dtype=torch.float64).to(self.dtype)
        return x, (x.sum(-1) > 0).long()


EXACT = Task(width=16, depth=3, batch=12, steps=4, epochs=3, dtype=torch.float64)


class InOrder:
    """This process's share of every batch, as ``DistributedSampler(shuffle=False)`` deals it; goes on after a checkpoint."""

    def __init__(self, task: Task) -> None:
        self.x, self.y = (rows[:, rank() :: world_size()] for rows in task.rows())
        self.given = self.first = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self.first = self.first, 0
        for number in range(first, len(self)):
            self.given = number + 1
            yield self.x[number], self.y[number]

    def __len__(self) -> int:
        return len(self.x)

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch were given."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass after those batches."""
        self.first = state["given"] % len(self)


class Net(pl.LightningModule):
    """A backbone and a head.

    Args:
        task: Its size and rows.
        filtered: Whether the optimizer gets only what trains at first.
        scheduler: Makes the LR scheduler, which steps with the optimizer.
    """

    def __init__(self, task: Task, *, filtered: bool = False, scheduler: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        layers = [layer for _ in range(task.depth) for layer in (nn.Linear(task.width, task.width), nn.Tanh())]
        self.backbone, self.head = nn.Sequential(*layers), nn.Linear(task.width, 2)
        self.task, self.filtered, self.scheduler = task, filtered, scheduler
        self.to(task.dtype)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; what ``ReduceLROnPlateau`` watches does not depend on the training."""
        if self.scheduler is not None:
            self.log("flat", 1.0)
        return cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        """Return SGD and the scheduler."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad or not self.filtered]
        optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer, self.task.steps * self.task.epochs)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "monitor": "flat"}]

    def train_dataloader(self) -> InOrder:
        """Return this process's rows."""
        return InOrder(self.task)


class ThawByEpoch(pl.Callback):
    """The flag alone: an epoch decides whether the backbone requires a gradient.

    It is right under DDP only if the reducer was built for the whole network, and then asked every step what was unused.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the flags, also in a run that resumes in mid-epoch."""
        pl_module.backbone.requires_grad_(trainer.current_epoch >= THAW_EPOCH)


class OwnAllReduce(ThawByEpoch):
    """Freeze before DDP wraps, and average what its reducer does not know just before the optimizer's step."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Keep the backbone out of the reducer."""
        pl_module.backbone.requires_grad_(False)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Average the backbone's gradients in one message."""
        grads = [parameter.grad for parameter in pl_module.backbone.parameters() if parameter.grad is not None]
        if not grads or world_size() == 1:
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= world_size()
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def finetuning_scheduler(task: Task, folder: Path) -> list[pl.Callback]:
    """Return the peer with the same two phases: by epochs alone, from the last weights, with one learning rate."""
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint  # noqa: PLC0415 - may be missing

    schedule = {
        0: {"params": ["head.*"], "max_transition_epoch": THAW_EPOCH, "lr": LR},
        1: {"params": ["backbone.*"], "max_transition_epoch": task.epochs, "lr": LR},
    }
    scheduler = FinetuningScheduler(
        schedule, epoch_transitions_only=True, restore_best=False, apply_lambdas_new_pgs=True, base_max_lr=LR,
        log_dir=folder, logging_level=40,
    )  # fmt: skip
    return [scheduler, FTSCheckpoint(dirpath=folder, save_top_k=0)]


@dataclass(frozen=True)
class Arm:
    """One way of unfreezing."""

    callbacks: Callable[[Task, Path], list[pl.Callback]]
    """Makes them; the folder is for what they write."""
    strategy: str = "ddp"
    filtered: bool = False
    """Whether the optimizer gets only what trains at first, as the callback's documentation asks."""


ARMS = {
    "ours": Arm(lambda *_: [FreezeSchedule.head_first("head", epochs=THAW_EPOCH)]),
    "BackboneFinetuning": Arm(
        # The head's learning rate for the backbone, from its first step to its last.
        lambda *_: [BackboneFinetuning(THAW_EPOCH, lambda_func=lambda _: 1.0, backbone_initial_lr=LR)],
        filtered=True,
    ),
    PEER: Arm(finetuning_scheduler, filtered=True),
    "flags, find_unused_parameters": Arm(lambda *_: [ThawByEpoch()], "ddp_find_unused_parameters_true"),
    "flags, own all-reduce": Arm(lambda *_: [OwnAllReduce()]),
}
WITHOUT = Arm(lambda *_: [])
"""No callback: all trains from the start."""


def installed() -> dict[str, Arm]:
    """Return the arms that can run here."""
    there = importlib.util.find_spec("finetuning_scheduler") is not None
    return {name: arm for name, arm in ARMS.items() if there or name != PEER}


def fit(
    arm: Arm, task: Task, folder: Path, *callbacks: pl.Callback, scheduler: Any = None, ckpt_path: Path | None = None
) -> Net:
    """Train on every process of the group, or in this one, and return the network."""
    every = [*arm.callbacks(task, folder), *callbacks]
    trainer = pl.Trainer(
        accelerator="cpu", devices=world_size(), strategy=arm.strategy if dist.is_initialized() else "auto",
        callbacks=every, max_epochs=task.epochs, use_distributed_sampler=False, default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in every),
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    net = Net(task, filtered=arm.filtered, scheduler=scheduler)
    trainer.fit(net, ckpt_path=ckpt_path, weights_only=False)
    return net

"""Kill a run after a batch and resume it: every kind of boundary, strategy and LR scheduler.

``torchrun --nproc-per-node 2 -m tests.resume_matrix FOLDER`` writes ``FOLDER/rank-K.pt``: what became of each combination.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, Dataset

from lightning_peft.callbacks import ExactResume, FreezeSchedule, Phase
from lightning_peft.distributed import rank, world_size
from tests.toy import Toy, rows

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "find_unused_parameters": lambda: DDPStrategy(find_unused_parameters=True),
    "static_graph": lambda: DDPStrategy(static_graph=True),
    "gradient_as_bucket_view": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "fsdp2": lambda: ModelParallelStrategy(world_size(), 1),
    "fsdp2, one file": lambda: ModelParallelStrategy(world_size(), 1, save_distributed_checkpoint=False),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, 2, 0.5),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=30),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 10),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "ReduceLROnPlateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.1),
    "ReduceLROnPlateau, of epochs": lambda optimizer: schedulers.ReduceLROnPlateau(
        optimizer, factor=0.8, patience=0, threshold=0.1
    ),
}
# Batches after which a run of three epochs of four batches is killed. Phases begin after the optimizer steps 2 and 5.
STOPS = {
    "in the first phase": 1,
    "on a boundary": 2,
    "in a warm-up": 3,
    "at the end of an epoch": 4,
    "on a boundary in mid-epoch": 5,
    "in the last phase": 7,
    "near the end": 11,
}
Weights = dict[str, torch.Tensor]


class RandomRows(Dataset):
    """Rows that are transformed at random as they are read."""

    def __init__(self) -> None:
        self.rows = rows(48, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.rows[index]
        return x + 0.1 * torch.randn(4, dtype=torch.float64), y


class RandomToy(Toy):
    """Dropout, batch normalisation, random rows, shuffling by Lightning's own sampler: every process draws for itself."""

    def __init__(self, scheduler: str) -> None:
        torch.manual_seed(5)
        super().__init__(dropout=0.3)
        self.backbone.append(torch.nn.BatchNorm1d(8))
        self.scheduler = scheduler

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomRows(), 12 // world_size(), shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(RandomRows(), 12 // world_size())

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        made = SCHEDULERS[self.scheduler](optimizer)
        if made is None:
            return optimizer
        unit = "epoch" if self.scheduler.endswith("epochs") else "step"
        how = {"interval": unit, "monitor": f"loss_{unit}"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, **how}}


class Keep(pl.Callback):
    """Write a checkpoint after each of these batches, counted over the run."""

    def __init__(self, folder: Path, stops: Sequence[int]) -> None:
        self.folder, self.stops, self.batches = folder, stops, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches += 1
        if self.batches in self.stops:
            trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")


def shared_folder() -> Path:
    """Make a folder that every process sees."""
    made = [tempfile.mkdtemp() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made, 0)
    return Path(str(made[0]))


def remove(folder: Path) -> None:
    """Remove a folder once every process is done with it."""
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        shutil.rmtree(folder)


def train(
    strategy: str, scheduler: str, *more: pl.Callback, ckpt_path: Path | None = None, seed: int = 5, accumulate: int = 1
) -> Weights:
    """Train three epochs through three phases; return whole weights."""
    pl.seed_everything(seed, verbose=False)
    net = RandomToy(scheduler).double()
    phases = [
        Phase(["head.*"], steps=2),
        Phase(["*"], steps=3, lr_scale={"backbone.*": 0.5}, warmup_steps=2),
        Phase(["head.*", "backbone.3.*"], frozen_state="reset"),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy=STRATEGIES[strategy]() if dist.is_initialized() else "auto",
        max_epochs=3,
        num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate,
        callbacks=[FreezeSchedule(phases), ExactResume(), *more],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(net, ckpt_path=ckpt_path)
    whole = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in net.state_dict().items()}
    return {name: value.detach().clone() for name, value in whole.items()}


def differences(strategy: str, scheduler: str, stops: Sequence[int], accumulate: int = 1) -> dict[int, float]:
    """Return, for each stop, the largest difference of any weight between the resumed run and the one in one piece."""
    folder = shared_folder()
    whole = train(strategy, scheduler, Keep(folder, stops), accumulate=accumulate)
    found = {}
    for stop in stops:
        path = folder / f"{stop}.ckpt"
        again = train(strategy, scheduler, ckpt_path=path, seed=99 + rank(), accumulate=accumulate)
        found[stop] = max(float((again[name] - whole[name]).abs().max()) for name in whole)
    remove(folder)
    return found


def combinations() -> list[tuple[str, str, int]]:
    """List strategy, scheduler and accumulated batches of each cell."""
    cells = [(strategy, scheduler, 1) for strategy in STRATEGIES for scheduler in SCHEDULERS]
    # torch itself stops at a static graph under accumulation: an internal assertion of its reducer.
    return cells + [(strategy, "OneCycleLR", 2) for strategy in STRATEGIES if strategy != "static_graph"]


def all_cells() -> dict[tuple[str, str, int], dict[int, float] | str]:
    """Return what became of every combination; an error is told, not raised."""
    found: dict[tuple[str, str, int], dict[int, float] | str] = {}
    for strategy, scheduler, accumulate in combinations():
        # Lightning cannot restore an optimizer of FSDP2 that has taken no step, if it is in one file.
        stops = [stop for stop in STOPS.values() if stop >= accumulate or strategy != "fsdp2, one file"]
        try:
            found[strategy, scheduler, accumulate] = differences(strategy, scheduler, stops, accumulate)
        except Exception:
            found[strategy, scheduler, accumulate] = traceback.format_exc()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(all_cells(), Path(sys.argv[1]) / f"rank-{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

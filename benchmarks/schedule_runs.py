"""What ``schedules.py`` runs in one process and, launched by torchrun, in two: ``schedule_runs.py FOLDER ROUNDS``."""

from __future__ import annotations

import datetime
import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from schedule_arms import EXACT, LR, MOMENTUM, THAW_EPOCH, WEIGHT_DECAY, WITHOUT, Arm, Net, Task, fit, installed
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from lightning_peft.distributed import rank

Weights = dict[str, Tensor]
TIMED = Task(width=512, depth=12, batch=128, steps=20, epochs=2, dtype=torch.float32)
WARM_UP = 4
"""Steps of a phase that are not timed, beside the one in which it begins."""
AGAIN = "ours, once more"
"""The same arm under another name: its ratio shows what is noise."""


def killed() -> dict[str, str]:
    """Return after which checkpoints a run is killed, and where that is: after every step but the last, and every epoch."""
    found = {}
    for step in range(1, EXACT.steps * EXACT.epochs):
        epoch, within = divmod(step, EXACT.steps)
        change = THAW_EPOCH * EXACT.steps
        when = "before" if step < change else "at the change" if step == change else "after"
        found[f"step {step}"] = f"{when}, {'mid-epoch' if within else 'last batch'}"
        if not within:
            found[f"end of epoch {epoch - 1}"] = f"{when}, end of epoch"
    return found


class KeepAll(Checkpoint):
    """Write a checkpoint after every step and every epoch; Lightning lets checkpoints come after all other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save the step's."""
        trainer.save_checkpoint(self.folder / f"step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save the epoch's."""
        trainer.save_checkpoint(self.folder / f"end of epoch {trainer.current_epoch}")


class Clock(pl.Callback):
    """Note when every step begins, and at which learning rate of the first group."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the time and the rate."""
        self.starts.append(time.perf_counter())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def by_hand(task: Task = EXACT) -> Weights:
    """Return the weights after the same training without Lightning, in one process on the joint batches."""
    net = Net(task)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    for epoch in range(task.epochs):
        net.backbone.requires_grad_(epoch >= THAW_EPOCH)
        for x, y in zip(*task.rows(), strict=True):
            optimizer.zero_grad()
            cross_entropy(net.head(net.backbone(x)), y).backward()
            optimizer.step()
    return weights(net)


def weights(net: torch.nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def train_and_resume(arm: Arm, folder: Path) -> dict[str, Weights | str]:
    """Return the weights at the end of a run (``whole``) and of runs that resume it by checkpoint; or why there are none."""
    found: dict[str, Weights | str] = {"whole": weights(fit(arm, EXACT, folder, KeepAll(folder)))}
    for name in killed():
        try:
            found[name] = weights(fit(arm, EXACT, folder, ckpt_path=folder / name))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def sequential(optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.SequentialLR:
    """Return a scheduler that changes from one to the next in the epoch after the backbone was freed."""
    change = (THAW_EPOCH + 1) * EXACT.steps - 2
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.25, total_iters=change),
        lr_scheduler.CosineAnnealingLR(optimizer, steps - change),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[change])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer, int], Any]] = {
    "LambdaLR": lambda optimizer, _: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "StepLR": lambda optimizer, _: lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
    "LinearLR": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 0.25, total_iters=steps),
    "CosineAnnealingLR": lr_scheduler.CosineAnnealingLR,
    "CosineAnnealingWarmRestarts": lambda optimizer, _: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5),
    "OneCycleLR": lambda optimizer, steps: lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps),
    "SequentialLR": sequential,
    "ReduceLROnPlateau": lambda optimizer, _: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
}


def rates(arm: Arm, scheduler: str, folder: Path) -> list[float] | str:
    """Return the first group's learning rate at every step, or why the run stopped."""
    clock = Clock()
    try:
        fit(arm, EXACT, folder, clock, scheduler=SCHEDULERS[scheduler])
    except MisconfigurationException:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return clock.rates


def try_schedulers(folder: Path) -> dict[str, dict[str, list[float] | str]]:
    """Return the rates by arm and scheduler, those of a run without callback among them."""
    arms = {"": WITHOUT, **installed()}
    return {name: {scheduler: rates(arm, scheduler, folder) for scheduler in SCHEDULERS} for name, arm in arms.items()}


def time_arms(rounds: int, folder: Path, task: Task = TIMED) -> dict[str, list[dict[str, float]]]:
    """Return seconds by arm and round: of a step frozen and unfrozen, and what the change takes beside two such steps."""
    arms = {**installed(), AGAIN: installed()["ours"]}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            clock = Clock()
            if dist.is_initialized():
                dist.barrier()
            fit(arms[name], task, folder, clock)
            times[name].append(phases(clock.starts, task.steps))
    return times


def phases(starts: list[float], steps: int) -> dict[str, float]:
    """Return the median step of both epochs, and what passes between them beyond one step of each."""
    taken = [after - before for before, after in itertools.pairwise(starts)]
    frozen = statistics.median(taken[WARM_UP : steps - 1])
    unfrozen = statistics.median(taken[steps + WARM_UP :])
    # taken[steps - 1] is the last frozen step with the end of its epoch, taken[steps] the first unfrozen one.
    return {"frozen": frozen, "unfrozen": unfrozen, "change": taken[steps - 1] + taken[steps] - frozen - unfrozen}


def be_quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def train_all(folder: Path) -> dict[str, dict[str, Weights | str]]:
    """Return what :func:`train_and_resume` does, by arm."""
    return {name: train_and_resume(arm, folder / str(number)) for number, (name, arm) in enumerate(installed().items())}


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    be_quiet()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    found = {"trained": train_all(folder), "times": time_arms(rounds, folder)}
    torch.save(found, folder / f"rank-{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

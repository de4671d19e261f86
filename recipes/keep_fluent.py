"""A small language model learns the style of film critics and stays fluent: its perplexity on general text has a budget."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_peft.callbacks import OldTask, perplexity_task
from lightning_peft.data import SelfGenerated
from lightning_peft.data.causal_batch import TokenRow, causal_batch
from lightning_peft.data.packaged import language_model, manual_paragraphs, movie_reviews
from lightning_peft.old_task import evaluate
from lightning_peft.recipes.keep_language import (
    ARMS,
    Arm,
    Keep,
    LanguageNet,
    Row,
    Study,
    logits_of,
    run_arms,
)
from lightning_peft.recipes.keep_language_page import report

__all__ = ["KeepFluent", "main", "run"]

SPLIT_SEED = 2024  # the split is fixed: a seed changes training, never which rows are test rows
OPENINGS = (
    "The weather this week", "When I was a child,", "Most people think that", "The history of the town",
    "A good meal begins with", "In the middle of the night", "My favourite book is", "The new museum",
    "Scientists have found that", "Last summer we went", "It is often said that", "The train was late, so",
    "Music has always been", "Every morning she", "The price of bread", "There are three reasons why",
    "An old friend of mine", "The garden behind the house", "What I like about winter", "The company was founded",
)  # fmt: skip


@dataclass
class KeepFluent(Keep):
    """Tune SmolLM2 with LoRA on sentences of film critics while its perplexity on general text is held to a budget.

    Args:
        model: Folder or hub id of a causal language model; unset, the packaged SmolLM2-135M-Instruct.
        arms: What protects its fluency: none; replay; distill; budget.
        seeds: Runs of each arm, from seed 0 on.
        steps: Optimizer steps.
        batch_size: Rows of a step.
        lr: Rate of LoRA.
        rank: Rank of LoRA.
        ratio: Share of old rows; of the arm budget it is steered instead.
        max_drop: What the perplexity on general text may rise by, as a part of what it was.
        look_every: Steps between the budget's looks.
        accelerator: Any Lightning accelerator.
        out: Folder for results, logs, and the text that the model writes.
        page: The page; its picture has the same name. Unset, keep_fluent.md in the folder.
        resume: Go on with the killed run in this folder.
        new: A text file with the kind of text to learn, paragraphs with an empty line between; unset, packaged sentences of
            film critics.
        general: A text file of general text; unset, paragraphs of the reference that Python brings along.
        memory: Rows that the model writes before it is tuned, for replay.
        tokens: Length of a row.
        guard_rows: General rows that the budget looks at.
        report_rows: Other general rows, and most new rows, that are reported.
    """

    model: str | None = None
    arms: list[Arm] = field(default_factory=lambda: ["none", "replay", "distill", "budget"])
    seeds: int = 1
    steps: int = 30
    batch_size: int = 8
    lr: float = 2e-3
    rank: int = 8
    ratio: float = 0.3
    max_drop: float = 0.05
    look_every: int = 5
    accelerator: str = "auto"
    out: str = "runs/keep_fluent"
    page: str | None = None
    resume: bool = False
    new: str | None = None
    general: str | None = None
    memory: int = 40
    tokens: int = 64
    guard_rows: int = 12
    report_rows: int = 32


def run(options: KeepFluent) -> list[Row]:
    """Run all arms, print the table, write results, page and picture; return the rows."""
    model, tokenizer = language_model(options.model)
    study = study_of(options, model, tokenizer)
    rows = run_arms(options, study, lambda: copy.deepcopy(model))
    panels = {
        "general": "rise of perplexity on general text",
        "new": "rise of perplexity on new text (below 0: learned)",
    }
    report(options, rows, PAGE, title="Perplexity", panels=panels, limits=study.limits)
    return rows


def study_of(options: KeepFluent, model: Any, tokenizer: Any) -> Study:
    """Return what is learned, replayed, guarded and reported; the budget's limit is a part of the pretrained perplexity."""

    def rows(texts: list[str]) -> list[TokenRow]:
        found = [tokenizer(text, truncation=True, max_length=options.tokens)["input_ids"] for text in texts]
        return [{"ids": ids, "labels": ids} for ids in found if len(ids) > 1]

    def task(texts: list[str]) -> OldTask:
        loader: Any = DataLoader(rows(texts), 8, collate_fn=causal_batch)  # type: ignore[arg-type]
        return perplexity_task(loader, logits=logits_of)

    new, general = new_texts(options), general_texts(options)
    guarded, reported = options.guard_rows, options.report_rows
    if len(new) < 2 * reported or len(general) < guarded + reported:
        raise ValueError(
            f"keep_fluent: {len(new)} new and {len(general)} general texts are too few for report_rows={reported} and "
            f"guard_rows={guarded}. Give longer files, or ask for fewer rows."
        )
    written = SelfGenerated(
        model, OPENINGS, tokenizer, count=options.memory, max_new_tokens=options.tokens - 8,
        cache_dir=Path(options.out, "self_generated"),
    )  # fmt: skip
    guard = task(general[:guarded])
    before = evaluate(LanguageNet(model, 0.0), guard, name="general")
    return Study(
        train=rows(new[reported:]),
        memory=[{"ids": row["ids"], "labels": row["ids"]} for row in written.rows],
        guards={"general": guard},
        limits={"general": options.max_drop * before},
        reports={"general": task(general[guarded : guarded + reported]), "new": task(new[:reported])},
    )


def new_texts(options: KeepFluent) -> list[str]:
    """Return what is to be learned, shuffled."""
    if options.new is not None:
        return paragraphs(Path(options.new))
    texts = [review.text for review in movie_reviews() if review.source == "rotten_tomatoes"]
    random.Random(SPLIT_SEED).shuffle(texts)
    return texts[:2000]


def general_texts(options: KeepFluent) -> list[str]:
    """Return general text, shuffled."""
    if options.general is not None:
        return paragraphs(Path(options.general))
    texts = manual_paragraphs()
    random.Random(SPLIT_SEED).shuffle(texts)
    return texts


def paragraphs(file: Path) -> list[str]:
    """Return the paragraphs of a text file, shuffled.

    Raises:
        FileNotFoundError: If it is not there.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"keep_fluent: {file} is not there. Give a text file, or leave it out for packaged text."
        )
    found = [part.strip() for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    random.Random(SPLIT_SEED).shuffle(found)
    return found


PAGE = """# Keep fluent

SmolLM2-135M-Instruct (packaged; its weights were unpacked from four bits and are not bit-equal to the original) learns one kind of
text with LoRA; general text is what it should not lose. Unless files are given, it learns packaged sentences of film critics
(Rotten Tomatoes: lower case, spaced out), and general text is prose of the reference manual that comes with Python, whose wording
depends a little on Python's version. Perplexities are over all tokens of rows that no arm trains on.

![What each arm loses](PICTURE)

ARMS

Old rows the model has written itself, before it was tuned (`SelfGenerated`, from twenty openings of ours at temperature 1):
nobody needs its training data, and none of them is general text of the kind that is measured. The budget looks at guard rows of
general text; other rows are reported. The limit is a part of the pretrained perplexity of the guard rows: a rise of LIMITS. `lost`
is the rise; below 0 something was learned. A budget keeps guard rows inside the limit; rows that it has not seen may lie a little
beyond.

TABLE

Made by `COMMAND`.
"""


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft keep_fluent", description=(KeepFluent.__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=KeepFluent().arms, help="what protects")
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(KeepFluent, skip={"arms", "resume"})
    warnings.filterwarnings("ignore", ".*(does not have many workers|exists and is not empty|LeafSpec|eval mode).*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(
        logging.WARNING
    )  # a trainer greets for each arm
    run(KeepFluent(**parser.parse_args(args).as_dict()))


if __name__ == "__main__":
    main()

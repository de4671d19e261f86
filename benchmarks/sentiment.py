"""The main job over several seeds: the README's table, the ablation, and the choice of learning rates.

Every run is a process of its own with one thread, ``--jobs`` of them at a time; finished runs are kept while the code
stays as it is, so that a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lightning_peft.recipes.sentiment import COMPONENTS, verdicts

GRID = {"probe": (5e-3, 1e-2, 2e-2), "full": (5e-5, 1e-4, 2e-4), "suite": (5e-4, 1e-3, 2e-3)}
ABLATED = ("suite", *(f"suite without {component}" for component in COMPONENTS))
COLUMNS = ("accuracy", "recall_before", "recall_after", "unreplayed_before", "unreplayed_after")
TUNING_SEEDS = (100, 101)


def code_digest() -> str:
    """Return a digest of the code that a run depends on: figures of other code must not stand in a table."""
    folders = ("lightning_peft", "callbacks", "recipes")
    files = sorted({file.resolve() for folder in folders for file in Path(folder).rglob("*.py")})
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Job:
    """One process of the recipe."""

    arms: tuple[str, ...]
    seed: int
    options: tuple[str, ...] = ()

    def folder(self, root: Path) -> Path:
        """Return where the run writes."""
        arms = [arm.replace(" ", "_") for arm in self.arms]
        return root / "-".join((*arms, str(self.seed), *(option.lstrip("-") for option in self.options)))

    def run(self, root: Path) -> dict[str, dict[str, float]]:
        """Return the rows by arm, from an earlier run of the same code if there is one."""
        out, digest = self.folder(root), code_digest()
        done = out / "done"
        if not done.exists() or done.read_text() != digest:
            arms = ("--arms", *self.arms) if self.arms else ()
            command = ["-m", "lightning_peft.recipes.sentiment", *arms, f"--seed={self.seed}", f"--out={out}"]
            out.mkdir(parents=True, exist_ok=True)
            with (out / "log.txt").open("w") as log:
                env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
                subprocess.run([sys.executable, *command, *self.options], check=True, stdout=log, stderr=log, env=env)
            done.write_text(digest)
        return json.loads((out / "results.json").read_text())["arms"]


def run_all(jobs: list[Job], root: Path, parallel: int) -> list[dict[str, dict[str, float]]]:
    with ThreadPoolExecutor(parallel) as pool:
        return list(tqdm(pool.map(lambda job: job.run(root), jobs), total=len(jobs), desc="runs"))


def tune(root: Path, parallel: int) -> None:
    """Print what every learning rate does on validation rows and mark the one with the lowest mean loss.

    Loss, not accuracy: over 1,000 rows it tells two rates apart with several times less noise.
    """
    pairs = [(arm, lr) for arm in reversed(GRID) for lr in GRID[arm]]
    jobs = [Job((arm,), seed, (f"--lr={lr}", "--rows=validation")) for arm, lr in pairs for seed in TUNING_SEEDS]
    found: dict[tuple[str, float], list[dict[str, float]]] = {pair: [] for pair in pairs}
    for job, result in zip(jobs, run_all(jobs, root, parallel), strict=True):
        (row,) = result.values()
        found[job.arms[0], row["lr"]].append(row)
    write("sentiment_rates", rate_lines(found))


def rate_lines(found: dict[tuple[str, float], list[dict[str, float]]]) -> list[str]:
    """Return the table of rates, from the rows by arm and rate."""
    lines = [
        f"Validation rows (1,000), mean ± standard deviation over seeds {list(TUNING_SEEDS)}; the chosen rate has the "
        "lowest mean loss. Old skills on pairs of validation: other half reviews, docstrings of Python's library.\n",
        "| arm | learning rate | loss | accuracy | half review: change | docstrings: change | chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, rates in GRID.items():
        best = min(rates, key=lambda lr, arm=arm: statistics.mean(row["loss"] for row in found[arm, lr]))
        for lr in rates:
            rows = found[arm, lr]
            cells = [spread(rows, "loss"), spread(rows, "accuracy")]
            cells += [spread(rows, key, sign=-1) for key in ("forgetting", "unreplayed_forgetting")]
            lines.append(f"| {arm} | {lr:g} | {' | '.join(cells)} | {'yes' if lr == best else ''} |")
    return lines


def spread(rows: list[dict[str, float]], key: str, *, sign: int = 1) -> str:
    """Return the mean of a measure over runs, and its standard deviation where there are several."""
    values = [sign * row[key] for row in rows]
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def table(root: Path, parallel: int, seeds: Iterable[int], *, ablate: bool) -> None:
    """Print means and standard deviations over seeds."""
    seeds = list(seeds)
    arms = ABLATED if ablate else tuple(GRID)
    jobs = [Job((arm,), seed) for arm in reversed(arms) for seed in seeds]
    rows: dict[str, list[dict[str, float]]] = {}
    for job, result in zip(jobs, run_all(jobs, root, parallel), strict=True):
        rows.setdefault(job.arms[0], []).append(result[job.arms[0]])
    rows = {arm: rows[arm] for arm in arms}
    name = "sentiment_ablation" if ablate else "sentiment"
    with Path("benchmarks/results", f"{name}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["arm", "seed", *rows[next(iter(rows))][0]])
        writer.writeheader()
        for arm, found in rows.items():
            writer.writerows({"arm": arm, "seed": seed, **row} for seed, row in zip(seeds, found, strict=True))
    lines = table_lines(rows, seeds)
    if ablate:
        means = {
            arm: {key: statistics.mean(row[key] for row in found) for key in COLUMNS} for arm, found in rows.items()
        }
        lines += ["", *(f"- {line}" for line in verdicts(means))]
    write(name, lines)


def table_lines(rows: dict[str, list[dict[str, float]]], seeds: list[int]) -> list[str]:
    heading = "| arm | accuracy | replayed skill: before | after | never replayed: before | after | "
    runs = f"Mean ± standard deviation over seeds {seeds}" if len(seeds) > 1 else f"One run each, seed {seeds[0]}"
    lines = [
        f"{runs}; accuracy on 2,000 test rows, recall@1 among 500 pairs (replayed skill) and among 164 (never "
        "replayed).\n",
        heading + "trainable parameters | checkpoint bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in rows.items():
        cells = [spread(found, key) for key in COLUMNS]
        counts = [f"{found[0][key]:,}" for key in ("trainable_parameters", "checkpoint_bytes")]
        lines.append(f"| {arm} | {' | '.join((*cells, *counts))} |")
    return lines


def write(name: str, lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    Path("benchmarks/results", f"{name}.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="choose learning rates on validation rows")
    parser.add_argument("--ablate", action="store_true", help="drop one component of the suite at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    Path("benchmarks/results").mkdir(exist_ok=True)
    if options.tune:
        tune(options.out, options.jobs)
    else:
        table(options.out, options.jobs, options.seeds, ablate=options.ablate)


if __name__ == "__main__":
    main()

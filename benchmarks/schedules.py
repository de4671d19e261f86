"""Freeze now, train later: Lightning's BackboneFinetuning, finetuning-scheduler, two remedies by hand and ours, side by side.

The same training in each arm, the head first and all from the second epoch on, in one process and on two (CPU, gloo). In
float64: how far the processes' weights end apart, how far from those of one process, and how far a run that was killed after
any step and resumed ends from one that was not. Which LR schedulers outlive the change. In float32: the time of a step, frozen
and unfrozen, of arms that take turns; and of a head-only phase beside a loop without Lightning.

Takes about eight minutes on two quiet cores. ``schedule_arms.py`` has the arms.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from schedule_arms import ARMS, PEER, SEED
from schedule_head import HAND, Encoder, time_head_only
from schedule_runs import (
    AGAIN,
    SCHEDULERS,
    TIMED,
    Weights,
    be_quiet,
    by_hand,
    killed,
    train_all,
    try_schedulers,
)
from schedule_tables import Row, page, tables, targets, worst

from lightning_peft.files import write_text

MISSING = "not installed"
PROCESSES = 2
Found = dict[str, Weights | str]


def launch(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Run ``schedule_runs.py`` on two processes, and return what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}", f"--master-port={port}"]
    script = Path(__file__).with_name("schedule_runs.py")
    run = subprocess.run(
        [*command, script, folder, str(rounds)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"The launch on {PROCESSES} processes failed:\n{run.stderr[-4000:]}")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def distance(first: Weights | str, second: Weights | str) -> float | str:
    """Return the largest difference of two copies of the weights, or why there is none."""
    for one in (first, second):
        if isinstance(one, str):
            return one
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def arm_rows(alone: dict[str, Found], ranks: list[dict[str, Found]], hand: Weights) -> list[Row]:
    """Return by arm how far apart the weights end.

    Args:
        alone: What each arm found in one process.
        ranks: The same of every process of the launch.
        hand: The weights of the loop without Lightning.
    """
    rows: list[Row] = []
    for name in ARMS:
        row: Row = {"arm": name, "missing": None if name in alone else MISSING}
        if name in alone:
            one, (first, second) = alone[name], (found[name] for found in ranks)
            row["between_ranks"] = distance(first["whole"], second["whole"])
            row["from_single"] = worst(distance(found["whole"], one["whole"]) for found in (first, second))
            row["single_from_loop"] = distance(one["whole"], hand)
            row["resume"] = {
                kill: {
                    "where": where,
                    "one": distance(one[kill], one["whole"]),
                    "two": worst(distance(found[kill], found["whole"]) for found in (first, second)),
                }
                for kill, where in killed().items()
            }
            row["right"] = row["between_ranks"] == 0 and row["from_single"] <= 1e-12
        rows.append(row)
    return rows


def scheduler_rows(rates: dict[str, dict[str, list[float] | str]]) -> list[Row]:
    """Return by arm what became of every scheduler: ``same``, how far its rates were off, or why the run stopped."""
    return [
        {
            "arm": name,
            "missing": None if name in rates else MISSING,
            "outcome": {key: outcome(rates[name][key], rates[""][key]) for key in SCHEDULERS} if name in rates else {},
        }
        for name in ARMS
    ]


def outcome(found: list[float] | str, wanted: list[float] | str) -> str:
    if isinstance(found, str):
        return found
    off = max(abs(one - other) for one, other in zip(found, wanted, strict=True))
    return "same" if off <= 1e-12 else f"off by {off:.1e}"


def step_rows(times: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Return by arm the milliseconds of a step and of the change, and ratios to ours, round by round."""
    rows: list[Row] = []
    for name in (*ARMS, AGAIN):
        row: Row = {"arm": name, "missing": None if name in times else MISSING}
        if name in times:
            for phase in ("frozen", "unfrozen", "change"):
                row[f"{phase}_ms"] = 1e3 * statistics.median(one[phase] for one in times[name])
            for phase in ("frozen", "unfrozen"):
                row[f"{phase}_ratio"] = ratio(*([one[phase] for one in times[arm]] for arm in (name, "ours")))
            row["rounds"] = len(times[name])
        rows.append(row)
    return rows


def ratio(times: list[float], others: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratio, taken round by round."""
    found = [one / other for one, other in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"low": low, "median": middle, "high": high}


def head_rows(times: dict[str, list[float]]) -> list[Row]:
    """Return by arm the milliseconds of a head-only step, and its ratio to the hand-written one."""
    return [
        {"arm": name, "ms": 1e3 * statistics.median(found), "ratio": ratio(found, times[HAND]), "rounds": len(found)}
        for name, found in times.items()
    ]


def versions() -> dict[str, str]:
    """Return the releases that were measured."""
    names = ("torch", "lightning", PEER, "transformers", "lightning-peft")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = MISSING
    return found


def measure(rounds: int) -> dict[str, Any]:
    """Return all results, ready for JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = launch(folder, rounds)
        alone = train_all(folder / "alone")
        rates = try_schedulers(folder)
    size = Encoder()
    head = time_head_only(rounds, size)
    results: dict[str, Any] = {
        "machine": {
            **versions(), "seed": SEED, "processes": PROCESSES, "threads of each": 1, "cores": os.cpu_count(),
            "device": f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        },
        "timed": {
            "layers": TIMED.depth, "width": TIMED.width, "rows of a process": TIMED.batch // PROCESSES,
            "encoder": f"{size.layers} layers of {size.hidden}", "encoder rows": size.rows, "tokens": size.tokens,
        },
        "arms": arm_rows(alone, [found["trained"] for found in ranks], by_hand()),
        "schedulers": scheduler_rows(rates),
        "steps": step_rows(ranks[0]["times"]),
        "head_only": head_rows(head),
    }  # fmt: skip
    results["targets"] = targets(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="turns of every timed arm (default: 11)")
    parser.add_argument("--quick", action="store_true", help="two rounds, and nothing written: only to try it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/schedules.json"), help="the JSON file")
    parser.add_argument("--page", type=Path, default=Path("docs/schedules.md"), help="the page with the tables")
    options = parser.parse_args()
    be_quiet()
    results = measure(2 if options.quick else options.rounds)
    if not options.quick:
        write_text(options.out, json.dumps(results, indent=1) + "\n")
        write_text(options.page, page(results))
    console = Console()
    for table in tables(results):
        table.show(console)


if __name__ == "__main__":
    main()

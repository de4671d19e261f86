"""A meta-step, forward and backward, of every way to compute it, beside the explicit loop over tasks and packages that do it so.

The loop adapts task by task with ``torch.autograd.grad(..., create_graph=True)``; ``higher`` and ``learn2learn`` join where they
are installed. ``plain vmap`` is what a user can write in ten lines: vmap over ``functional_call``, autograd outside; ``by hand``
writes the formula of the MLP out for all tasks, without modules or vmap. ``joint`` is a forward and a backward on the same rows
without adaptation: the floor. All arms of a setting take turns in one process; a ratio is the median over rounds of the loop's
time divided by the arm's. Peak memory is the growth of a process of its own over one step (Linux).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from maml_arms import Net, arms, loop, rows
from rich.console import Console
from tqdm import tqdm

from lightning_peft.files import write_text
from lightning_peft.recipes.maml_page import write_section
from lightning_peft.reporting import TextTable

TARGETS = {("mlp", 25, 1, "stacked"): 12.0, ("mlp", 25, 1, "compiled"): 30.0}
TARGETS |= {("conv4", 32, 1, way): 1.5 for way in ("stacked", "16 at a time")}
SETTINGS = [("mlp", tasks, steps) for tasks in (4, 25, 32) for steps in (1, 5)]
SETTINGS += [("conv4", 4, 1), ("conv4", 4, 5), ("conv4", 32, 1)]


def timed(kind: str, tasks: int, steps: int, rounds: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Return milliseconds of every arm, and how often as fast as the loop it is."""
    runs = arms(kind, tasks, steps, compiled=compiled)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(2):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            repeats = max(1, round(seconds["loop"][0] / seconds[name][0])) if seconds[name] else 1
            start = time.perf_counter()
            for _ in range(min(repeats, 20)):  # short ones are timed over several calls
                run()
            seconds[name].append((time.perf_counter() - start) / min(repeats, 20))
    later = {name: found[1:] for name, found in seconds.items()}
    result = {}
    for name, found in later.items():
        ratios = sorted(a / b for a, b in zip(later["loop"], found, strict=True))
        result[name] = {
            "ms": 1e3 * statistics.median(found),
            "ratio": statistics.median(ratios),
            "low": ratios[len(ratios) // 10],
            "high": ratios[-1 - len(ratios) // 10],
            "floor": statistics.median(found) / statistics.median(later["joint"]),
        }
    return result


def peak(arm: str, kind: str, tasks: int, steps: int) -> float:
    """Return how many MiB a process of its own grows by in one step; the loop over one task warms it up."""
    command = [sys.executable, __file__, "--one", arm, kind, str(tasks), str(steps)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def one(arm: str, kind: str, tasks: int, steps: int) -> None:
    loop(Net(kind), rows(kind, 1), 1)()
    run = arms(kind, tasks, steps, compiled=False)[arm]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that the imports had
    before = _status("VmRSS")
    run()
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def tables(results: dict[str, Any]) -> list[TextTable]:
    """Return what was measured, as tables."""
    names = list(dict.fromkeys(name for found in results["time"].values() for name in found if name != "loop"))
    lines = []
    for setting, found in results["time"].items():
        cells = [f"{found[n]['ratio']:.2f} ({found[n]['floor']:.1f})" if n in found else "-" for n in names]
        lines.append([setting, f"{found['loop']['ms']:.1f}", *cells])
    speed = TextTable(
        "Times as fast as the loop (and as slow as the joint floor), median over rounds",
        ["network, tasks, steps", "loop ms", *names],
        lines,
    )
    memory = [[setting, *(f"{value:.0f}" for value in found.values())] for setting, found in results["memory"].items()]
    columns = ["network, tasks, steps", *next(iter(results["memory"].values()), {})]
    return [speed, TextTable("Peak memory of one step, MiB above the start", columns, memory)]


def verdicts(results: dict[str, Any]) -> list[str]:
    """Return what each target came to."""
    said = []
    for (kind, tasks, steps, arm), target in TARGETS.items():
        found = results["time"].get(f"{kind}, {tasks}, {steps}", {}).get(arm)
        if found:
            told = "reached" if found["ratio"] >= target else "not reached"
            span = f"{found['low']:.2f} to {found['high']:.2f}"
            said.append(f"{kind}, {tasks} tasks, {arm}: {found['ratio']:.2f} ({span}) of {target:g}: {told}.")
    for setting, found in results["memory"].items():
        if setting.endswith(", 5"):
            share = found["recompute"] / found["stacked"]
            told = "reached" if share <= 0.5 else "not reached"
            said.append(f"{setting}: recompute needs {share:.2f} of stacked's memory, at most 0.5: {told}.")
    return said


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="rounds on the MLP; a third of them on Conv4 (31)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled arm (a minute each)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/maml.json"))
    parser.add_argument("--page", type=Path, help="a page to write the tables into")
    parser.add_argument("--one", nargs=4, metavar=("ARM", "NET", "TASKS", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        one(options.one[0], options.one[1], int(options.one[2]), int(options.one[3]))
        return
    results: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "time": {}, "memory": {}}
    for kind, tasks, steps in tqdm(SETTINGS, desc="settings"):
        rounds = options.rounds if kind == "mlp" else max(options.rounds // 3, 4)
        compiled = not options.no_compile and kind == "mlp" and (tasks, steps) == (25, 1)
        results["time"][f"{kind}, {tasks}, {steps}"] = timed(kind, tasks, steps, rounds, compiled)
    for tasks, steps in ((8, 1), (8, 5)):
        ways = ("loop", "joint", "stacked", "recompute", "one by one")
        results["memory"][f"conv4, {tasks}, {steps}"] = {way: peak(way, "conv4", tasks, steps) for way in ways}
    for table in tables(results):
        table.show(Console())
    for line in verdicts(results):
        print(line)
    results["verdicts"] = verdicts(results)
    write_text(options.results, json.dumps(results, indent=1) + "\n")
    if options.page:
        about = (
            f"## What a meta-step costs\n\nCPU, {options.threads} thread, torch {torch.__version__}; {options.rounds} rounds "
            "on the MLP, a third of them on Conv4-64, all arms in turns in one process."
        )
        made = "Made by `python benchmarks/maml.py --page docs/meta-learning.md`."
        said = "\n".join(f"- {line}" for line in verdicts(results))
        write_section(
            options.page, "bench", "\n\n".join([about, *(table.markdown() for table in tables(results)), said, made])
        )


if __name__ == "__main__":
    main()

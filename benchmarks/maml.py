"""A meta-step, forward and backward, of every way to compute it, beside the explicit loop over tasks and packages that do it so.

The loop adapts task by task with ``torch.autograd.grad(..., create_graph=True)``; ``higher`` and ``learn2learn`` join where they
are installed. ``plain vmap`` is what a user can write in ten lines: vmap over ``functional_call``, autograd outside; ``by hand``
writes the formula of the MLP out for all tasks, without modules or vmap. ``joint`` is a forward and a backward on the same rows
without adaptation: the floor. All arms of a setting take turns in one process; a ratio is the median over rounds of the loop's
time divided by the arm's. Memory is that of tensors, counted at every allocation; what kernels use inside is not in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from maml_arms import arms
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from lightning_peft.files import write_text
from lightning_peft.reporting import TextTable, write_section

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


def peak(kind: str, tasks: int, steps: int) -> dict[str, float]:
    """Return how many MiB of tensors each way holds at once, counted at every allocation."""
    found = {}
    runs = arms(kind, tasks, steps, compiled=False)
    for name in ("loop", "joint", "plain vmap", "stacked", "recompute", "one by one"):
        runs[name]()  # gradients are there from now on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            runs[name]()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        found[name] = max(held) / 2**20
    return found


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
    return [speed, TextTable("Tensors held at once in one step, MiB", columns, memory)]


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "time": {}, "memory": {}}
    for kind, tasks, steps in tqdm(SETTINGS, desc="settings"):
        rounds = options.rounds if kind == "mlp" else max(options.rounds // 3, 4)
        compiled = not options.no_compile and kind == "mlp" and (tasks, steps) == (25, 1)
        results["time"][f"{kind}, {tasks}, {steps}"] = timed(kind, tasks, steps, rounds, compiled)
    results["memory"] = {f"conv4, 8, {steps}": peak("conv4", 8, steps) for steps in (1, 5, 10)}
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
            options.page,
            "bench",
            "\n\n".join([about, *(table.markdown() for table in tables(results)), said, made]),
            heading="Meta-learning",
        )


if __name__ == "__main__":
    main()

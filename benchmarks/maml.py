"""A meta-step, forward and backward, of every way to compute it, beside the explicit loop over tasks and packages that do it so.

The loop adapts task by task with ``torch.autograd.grad(..., create_graph=True)``; ``higher`` and ``learn2learn`` join where they
are installed. ``joint`` is a forward and a backward on the same rows without adaptation: the floor. All arms of a setting take
turns in one process; a ratio is the median over rounds of the loop's time divided by the arm's. Peak memory is the growth of a
process of its own over one step (Linux).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from lightning_peft import MAMLMixin, MetaConfig
from lightning_peft.files import write_text
from lightning_peft.meta import Episode
from lightning_peft.recipes.maml_page import write_section
from lightning_peft.reporting import TextTable

RATE = 0.01
WAYS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "first order": {"second_order": False},
    "recompute": {"memory": "recompute"},
    "compiled": {"memory": "recompute", "compile": True},
    "one by one": {"task_batching": "loop"},
}
TARGETS = {("mlp", 25, 1, "stacked"): 12.0, ("conv4", 32, 1, "stacked"): 1.5, ("mlp", 25, 1, "compiled"): 30.0}
SETTINGS = [("mlp", tasks, steps) for tasks in (4, 25, 32) for steps in (1, 5)]
SETTINGS += [("conv4", 4, 1), ("conv4", 4, 5), ("conv4", 32, 1)]


class Net(pl.LightningModule):
    """The two networks of the paper: 1-40-40-1 for sines, and four convolutions of 64 channels for characters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        if kind == "mlp":
            self.net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        else:
            blocks = [(1, 64), (64, 64), (64, 64), (64, 64)]
            layers = [
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b, track_running_stats=False), nn.ReLU()
                )
                for a, b in blocks
            ]
            self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) if self.kind == "mlp" else F.cross_entropy(outputs, targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


class Meta(MAMLMixin, Net):
    """Ours."""


def rows(kind: str, tasks: int) -> Episode:
    torch.manual_seed(1)

    def side() -> tuple[Tensor, Tensor]:
        if kind == "mlp":
            return torch.randn(tasks, 10, 1), torch.randn(tasks, 10, 1)
        return torch.randn(tasks, 5, 1, 28, 28), torch.arange(5).repeat(tasks, 1)

    return Episode(side(), side())


def loop(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    named = dict(net.named_parameters())
    (sx, sy), (qx, qy) = batch[:2]

    def run() -> None:
        total: Any = 0.0
        for i in range(len(sx)):
            fast = named
            for _ in range(steps):
                lost = net.loss(functional_call(net.net, _inside(fast), (sx[i],)), sy[i])
                grads = torch.autograd.grad(lost, list(fast.values()), create_graph=True)
                fast = {name: p - RATE * g for (name, p), g in zip(fast.items(), grads, strict=True)}
            total = total + net.loss(functional_call(net.net, _inside(fast), (qx[i],)), qy[i])
        (total / len(sx)).backward()

    return run


def _inside(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): value for name, value in values.items()}


def with_higher(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    import higher  # noqa: PLC0415

    inner = torch.optim.SGD(net.parameters(), RATE)
    (sx, sy), (qx, qy) = batch[:2]

    def run() -> None:
        for i in range(len(sx)):
            with higher.innerloop_ctx(net.net, inner, copy_initial_weights=False) as (fast, optimizer):
                for _ in range(steps):
                    optimizer.step(net.loss(fast(sx[i]), sy[i]))
                (net.loss(fast(qx[i]), qy[i]) / len(sx)).backward()

    return run


def with_learn2learn(net: Net, batch: Episode, steps: int) -> Callable[[], None]:
    import learn2learn  # noqa: PLC0415

    maml = learn2learn.algorithms.MAML(net.net, lr=RATE, first_order=False)
    (sx, sy), (qx, qy) = batch[:2]

    def run() -> None:
        total: Any = 0.0
        for i in range(len(sx)):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(net.loss(learner(sx[i]), sy[i]))
            total = total + net.loss(learner(qx[i]), qy[i])
        (total / len(sx)).backward()

    return run


def joint(net: Net, batch: Episode) -> Callable[[], None]:
    (sx, sy), (qx, qy) = batch[:2]
    x, y = (torch.cat(parts).flatten(0, 1) for parts in ((sx, qx), (sy, qy)))

    def run() -> None:
        net.loss(net.net(x), y).backward()

    return run


def ours(kind: str, batch: Episode, steps: int, config: dict[str, Any]) -> Callable[[], None]:
    module = Meta(kind, meta=MetaConfig(inner_lr=RATE, adaptation_steps=steps, **config))

    def run() -> None:
        loss, _ = module.learner.meta_loss(batch, 0)
        loss.backward()

    return run


def arms(kind: str, tasks: int, steps: int, *, compiled: bool) -> dict[str, Callable[[], None]]:
    batch = rows(kind, tasks)
    found = {"loop": loop(Net(kind), batch, steps), "joint": joint(Net(kind), batch)}
    for name, peer in (("higher", with_higher), ("learn2learn", with_learn2learn)):
        if importlib.util.find_spec(name):
            found[name] = peer(Net(kind), batch, steps)
    for name, config in WAYS.items():
        if name != "compiled" or compiled:
            found[name] = ours(kind, batch, steps, config)
    return found


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

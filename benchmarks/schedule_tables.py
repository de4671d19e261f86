"""The tables and the page of ``schedules.py``, and what was promised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_peft.reporting import TextTable

Row = dict[str, Any]
LIMITS = {"between_ranks": 0.0, "from_single": 1e-12, "resume": 0.0, "schedulers": 0, "step": 1.03, "head": 1.1}
"""What ours may reach; of a step time three percent are noise."""

PAGE = """# Freeze now, train later: who does it right

One training, the head first and all from the second of three epochs on, by Lightning's `BackboneFinetuning`, by
[finetuning-scheduler](https://github.com/speediedan/finetuning-scheduler), by ours (`FreezeSchedule.head_first`), and by two
remedies that a user could write. SGD with momentum and weight decay, one learning rate for head and backbone, rows in order, so
that two processes' batches add up to the batch of the one process. Each callback is set up as its documentation asks:
`BackboneFinetuning` with the head's learning rate for the backbone and an optimizer of what trains; finetuning-scheduler with an
explicit schedule of the same two phases, transitions by epochs alone, and no return to earlier weights. "One process, from a plain
loop" says whether an arm trains what was asked: the loop is written without Lightning.

*flags, find_unused_parameters*: DDP wraps the whole network, an epoch sets `requires_grad`, and DDP looks for unused parameters in
every step. *flags, own all-reduce*: the backbone is frozen before the wrap, and its gradients are averaged by hand before the
optimizer's step.

{tables}

## How to read it

**Weights.** In float64; the largest difference over all weights at the end of the run. DDP averages what required a gradient
when it wrapped the module. What is freed later trains on each process by itself, without an error: that is the difference between
ranks.

**Resume.** A run writes {kills} checkpoints: one after every step but the last, and one at the end of every epoch but the last. A
fresh network and trainer go on from each, as after a kill, and end with weights that are compared with those of the whole run. The
loader goes on where the checkpoint was taken, in every arm. "Last batch" is a checkpoint that a step wrote at the last batch of its
epoch. In two processes the worse of both counts; a checkpoint holds the weights of the first, so replicas that had drifted apart do
not both come back.

**LR schedulers.** One process; each steps with the optimizer. One outlives the change if the run ends and the first group's
learning rate is that of a run without callback at every step. The rate of a group that is added later is not compared. The
`SequentialLR` goes to its second part after the change.

**Times.** In float32, an MLP of {layers} layers of {width} with {rows} rows on each process. Arms take turns, and each round begins
with another; a ratio is taken within its round, its quartiles are over rounds. "{again}" is a second turn of ours: what its ratio
is off from 1 is noise. Arms that are wrong average fewer gradients: what they save when all trains is no merit. "Change" is what
passes at the change beyond one step of each kind, once. It includes the end of the epoch, in every arm; there ours wraps the module
anew, and compares all weights and the first gradients over the ranks.

**Head only.** One process, a BERT of {encoder} with random weights and dropout, {encoder_rows} rows of {tokens} tokens, AdamW. The
hand-written loop is a forward pass without gradients and the step of a head. The Trainer with the user's own `no_grad` shows
Lightning's part.

**Not measured:** GPUs and NCCL, more than two processes, FSDP, mixed precision.

Made by `python benchmarks/schedules.py`, with {machine}.
"""


def tables(results: dict[str, Any]) -> list[TextTable]:
    """Return all tables."""
    return [
        arm_table(results["arms"], results["schedulers"]),
        resume_table(results["arms"]),
        scheduler_table(results["schedulers"]),
        step_table(results["steps"], results["arms"]),
        head_table(results["head_only"]),
        target_table(results["targets"]),
    ]


def page(results: dict[str, Any]) -> str:
    """Return the page of the docs, from what the JSON file holds."""
    timed = results["timed"]
    return PAGE.format(
        tables="\n\n".join(table.markdown() for table in tables(results)),
        kills=len(next(row["resume"] for row in results["arms"] if not row["missing"])),
        layers=timed["layers"], width=timed["width"], rows=timed["rows of a process"], again=results["steps"][-1]["arm"],
        encoder=timed["encoder"], encoder_rows=timed["encoder rows"], tokens=timed["tokens"],
        machine=", ".join(f"{key} {value}" for key, value in results["machine"].items()),
    )  # fmt: skip


def number(value: float | str) -> str:
    """Return a distance as text: an exact zero as such, of an error its kind."""
    if isinstance(value, str):
        return value.split(":")[0]
    return f"{value:.1e}" if value else "0"


def worst(distances: Iterable[float | str]) -> float | str:
    """Return an error if there is one, else the largest distance."""
    found = list(distances)
    return next((one for one in found if isinstance(one, str)), None) or max(found)


def arm_table(rows: list[Row], schedulers: list[Row]) -> TextTable:
    lines = []
    for row, tried in zip(rows, schedulers, strict=True):
        if row["missing"]:
            lines.append((row["arm"], row["missing"], *["-"] * 5))
            continue
        lines.append(
            (
                row["arm"],
                number(row["between_ranks"]),
                number(row["from_single"]),
                number(row["single_from_loop"]),
                " / ".join(resumed(row, count) for count in ("one", "two")),
                f"{survivors(tried)} of {len(tried['outcome'])}",
                "yes" if row["right"] else "**no**",
            )
        )
    columns = ("arm", "between ranks", "ranks, from one process", "one process, from a plain loop", "resume, one / two processes",
               "LR schedulers", "right on two ranks")  # fmt: skip
    return TextTable("Largest difference of a weight", columns, lines)


def resumed(row: Row, count: str) -> str:
    """Return the largest distance of a resumed run, and what errors there were."""
    found = [kill[count] for kill in row["resume"].values()]
    distances = [one for one in found if not isinstance(one, str)]
    errors = [one for one in found if isinstance(one, str)]
    return ", ".join(dict.fromkeys(number(one) for one in [*([max(distances)] if distances else []), *errors]))


def survivors(row: Row) -> int:
    return sum(found == "same" for found in row["outcome"].values())


def resume_table(rows: list[Row]) -> TextTable:
    there = [row for row in rows if not row["missing"]]
    places = list(dict.fromkeys(kill["where"] for kill in there[0]["resume"].values()))
    lines = []
    for row in there:
        kills = {place: [kill for kill in row["resume"].values() if kill["where"] == place] for place in places}
        cells = [
            " / ".join(number(worst(kill[count] for kill in found)) for count in ("one", "two"))
            for found in kills.values()
        ]
        lines.append((row["arm"], *cells))
    return TextTable(
        "Resumed, from a run that was not killed, by where it was killed: one / two processes", ("arm", *places), lines
    )


def scheduler_table(rows: list[Row]) -> TextTable:
    lines = []
    for row in rows:
        lost = [f"{name} ({found})" for name, found in row["outcome"].items() if found != "same"]
        count = row["missing"] or f"{survivors(row)} of {len(row['outcome'])}"
        lines.append((row["arm"], count, ", ".join(lost) or "-"))
    return TextTable("LR schedulers that outlive the change", ("arm", "go on", "do not"), lines)


def spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def step_table(rows: list[Row], arms: list[Row]) -> TextTable:
    right = {row["arm"]: "yes" if row.get("right") else "**no**" for row in arms}
    lines = []
    for row in rows:
        if row["missing"]:
            lines.append((row["arm"], row["missing"], *["-"] * 5))
            continue
        times = [f"{row[f'{phase}_ms']:.1f}" for phase in ("frozen", "unfrozen")]
        ratios = [spread(row[f"{phase}_ratio"]) for phase in ("frozen", "unfrozen")]
        lines.append((row["arm"], right.get(row["arm"], "yes"), *times, *ratios, f"{row['change_ms']:.0f}"))
    columns = ("arm", "right", "frozen", "unfrozen", "frozen / ours (quartiles)", "unfrozen / ours", "change")
    rounds = next(row["rounds"] for row in rows if not row["missing"])
    return TextTable(f"A step on two processes, milliseconds (median of {rounds} rounds)", columns, lines)


def head_table(rows: list[Row]) -> TextTable:
    lines = [(row["arm"], f"{row['ms']:.0f}", spread(row["ratio"])) for row in rows]
    title = f"A step in which the head alone trains, milliseconds (median of {rows[0]['rounds']} rounds)"
    return TextTable(title, ("arm", "step", "of the hand-written loop (quartiles)"), lines)


def target_table(rows: list[Row]) -> TextTable:
    lines = [(row["target"], f"{row['limit']:g}", row["shown"], "ok" if row["met"] else "missed") for row in rows]
    return TextTable("Targets of ours", ("target", "limit", "ours", ""), lines)


def targets(results: dict[str, Any]) -> list[Row]:
    """Return what was promised of ours, and whether it holds."""
    ours = results["arms"][0]
    resumed_at_worst = worst(kill[count] for kill in ours["resume"].values() for count in ("one", "two"))
    tried = results["schedulers"][0]
    found = [
        target("weights between ranks", LIMITS["between_ranks"], ours["between_ranks"]),
        target("weights of the ranks, from one process", LIMITS["from_single"], ours["from_single"]),
        target("weights of a resumed run", LIMITS["resume"], resumed_at_worst),
        target("LR schedulers lost", LIMITS["schedulers"], float(len(tried["outcome"]) - survivors(tried))),
    ]
    found.extend(step_target(phase, results["steps"], results["arms"]) for phase in ("frozen", "unfrozen"))
    head = next(row["ratio"] for row in results["head_only"] if row["arm"] == "ours")
    found.append(target("head-only step, of the hand-written loop", LIMITS["head"], head["median"], spread(head)))
    return found


def step_target(phase: str, rows: list[Row], arms: list[Row]) -> Row:
    """Return our step time as a part of that of the fastest other arm that is right."""
    right = {row["arm"] for row in arms[1:] if row.get("right")}
    fastest = min((row for row in rows if row["arm"] in right), key=lambda row: row[f"{phase}_ms"])
    ratio = {
        key: 1 / fastest[f"{phase}_ratio"][other]
        for key, other in (("low", "high"), ("median", "median"), ("high", "low"))
    }
    name = f"{phase} step, of the fastest right one ({fastest['arm']})"
    return target(name, LIMITS["step"], ratio["median"], spread(ratio))


def target(name: str, limit: float, value: float | str, shown: str | None = None) -> Row:
    met = not isinstance(value, str) and value <= limit
    return {"target": name, "limit": limit, "ours": value, "shown": shown or number(value), "met": met}

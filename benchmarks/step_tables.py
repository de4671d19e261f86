"""The tables of ``adapter_step.py``, for the terminal and for the docs, and what was promised."""

from __future__ import annotations

from typing import Any

from lightning_peft.reporting import TextTable

MIB = 2**20
ARMS = ("frozen", "ours", "PEFT", "full")
LIMITS = {"bytes": 36.0, "LoRA": 12.0, "LoRA, dropout 0.1": 15.0, "DoRA": 18.0, "overhead": 0.7, "ratio": 1.03}

Row = dict[str, Any]


def tables(results: dict[str, Any]) -> list[TextTable]:
    """Return the tables of the parts that were run."""
    makers = {
        "bytes": bytes_table, "saved": saved_table, "host": host_table, "step": step_table, "tried": tried_table,
        "targets": target_table,
    }  # fmt: skip
    return [make(results[part]) for part, make in makers.items() if results.get(part)]


def markdown(results: dict[str, Any]) -> str:
    """Return all tables as markdown, from what the JSON file holds."""
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return "\n\n".join([*(table.markdown() for table in tables(results)), f"Measured with {facts}."]) + "\n"


PAGE = """# What an adapter costs

Ours beside PEFT, with the frozen network (forward and the gradient of its input) for the limit and full fine-tuning. Operations,
bytes and kept activations are exact counts, the same on every machine; their rule is in `benchmarks/traffic.py`. Times are of arms
that take turns in one process. The overhead is what a step takes beyond the frozen limit, as a fraction of PEFT's. PEFT has no
prompts for networks that read images: a dash.

Each row is of three builds of its network, because where in memory a network lies moves its overhead by several percent. What is
left of LoRA's overhead is mostly arithmetic that both libraries do: at a width of 256 and rank 16 the four narrow products of a
layer take about as long as all else that an adapter adds, and the optimizer's step is the same. On an older CPU (AVX2) the worst
ratio of overheads was 0.73, with an earlier version; it was not measured there again. One stacked `A` for
projections that read one input would save the part in the table of what was tried; layers are called one by one, so it would have
to hold an input from one call to the next, and is not done. A network input without gradient needs no code: autograd leaves out the
products below the first adapted layer by itself. Where ours and PEFT's times both lie near the frozen one, an overhead is a small
difference of large times.

{device} Made by `python benchmarks/adapter_step.py --page`.

"""
NO_GPU = "**No GPU was measured**; the same file runs on one where there is one, and adds peak memory."


def page(results: dict[str, Any]) -> str:
    """Return all tables as a page of the docs."""
    device = NO_GPU if results["machine"]["device"] == "cpu" else "Measured on a GPU."
    return PAGE.format(device=device) + markdown(results)


def grouped(rows: list[Row], *keys: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """Return the rows by arm, for every combination of ``keys``."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["arm"]] = row
    return found


def bytes_table(rows: list[Row]) -> TextTable:
    lines = []
    for names, arms in grouped(rows, "base", "method").items():
        cells = [
            f"{row['forward_ops']} + {row['backward_ops']} / {(row['forward_bytes'] + row['backward_bytes']) / MIB:.1f}"
            for row in (arms[arm] for arm in ARMS[1:])
        ]
        lines.append((*names, *cells))
    title = "One adapted linear: operations (forward + backward) / MiB moved beyond the frozen layer"
    return TextTable(title, ("base", "method", *ARMS[1:]), lines)


def saved_table(rows: list[Row]) -> TextTable:
    lines = [
        (*names, *(f"{arms[arm]['bytes'] / MIB:.1f}" for arm in ARMS))
        for names, arms in grouped(rows, "method").items()
    ]
    return TextTable("Kept for the backward pass, MiB, Llama of two layers in bfloat16", ("method", *ARMS), lines)


def host_table(rows: list[Row]) -> TextTable:
    lines = [
        (*names, *(f"{arms[arm]['forward_us']:.0f} / {arms[arm]['both_us']:.0f}" for arm in ARMS))
        for names, arms in grouped(rows, "base", "method").items()
    ]
    title = f"One call of a small linear, microseconds: forward / forward and backward (median of {rows[0]['calls']})"
    return TextTable(title, ("base", "method", *ARMS), lines)


def step_table(rows: list[Row]) -> TextTable:
    lines = []
    for row in rows:
        times = [f"{row['milliseconds'][arm]:.1f}" if arm in row["milliseconds"] else "-" for arm in ARMS]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})"
        overhead = "-" if row["overhead"] is None else f"{row['overhead']:.2f}"
        peaks = [" / ".join(f"{size / MIB:.0f}" for size in row["peak_bytes"].values())] if "peak_bytes" in row else []
        name = f"{row['shape']} {'x'.join(map(str, row['input']))}"
        lines.append((name, row["dtype"], row["method"], *times, ratio, overhead, *peaks))
    columns = ("shape", "dtype", "method", *ARMS, "ours / PEFT (quartiles)", "overhead")
    memory = ("peak MiB, by arm",) if "peak_bytes" in rows[0] else ()
    return TextTable(f"Training step, milliseconds (median of {rows[0]['rounds']} rounds)", (*columns, *memory), lines)


def tried_table(rows: list[Row]) -> TextTable:
    lines = [
        (
            row["idea"],
            *(f"{row[key]:.2f}" for key in ("old", "new", "whole")),
            f"{(row['old'] - row['new']) / row['whole']:.1%}",
        )
        for row in rows
    ]
    return TextTable(
        "Tried, milliseconds", ("idea, and what it is part of", "without", "with", "whole", "saved of the whole"), lines
    )


def target_table(rows: list[Row]) -> TextTable:
    lines = [
        (
            row["target"],
            f"{row['limit']:g}",
            f"{row['ours']:.3g}",
            f"{row['PEFT']:.3g}",
            "ok" if row["met"] else "missed",
        )
        for row in rows
    ]
    return TextTable("Targets", ("target", "limit", "ours", "PEFT", ""), lines)


def targets(results: dict[str, Any]) -> list[Row]:
    """Return what was promised, by the parts that were run, and whether it holds."""
    found = []
    if "bytes" in results:
        arms = grouped(results["bytes"], "base", "method")["bf16", "LoRA"]
        mine, other = ((arms[arm]["forward_bytes"] + arms[arm]["backward_bytes"]) / MIB for arm in ("ours", "PEFT"))
        found.append(target("extra MiB per linear, bf16 base", LIMITS["bytes"], mine, other))
    if "saved" in results:
        for (method,), arms in grouped(results["saved"], "method").items():
            sizes = [arms[arm]["bytes"] / MIB for arm in ("ours", "PEFT")]
            found.append(target(f"MiB kept, {method}", LIMITS[method], *sizes))
    return found + step_targets(results.get("step", []), results["machine"]["device"])


def step_targets(rows: list[Row], device: str) -> list[Row]:
    """Return the targets of step time, each with the worst case."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] in LIMITS):
        of_method = [row for row in rows if row["method"] == method and row["dtype"] == "float32" and row["overhead"]]
        if of_method and device == "cpu":
            worst = max(of_method, key=lambda row: row["overhead"])
            name = f"overhead of PEFT's, fp32, {method} (worst: {worst['shape']})"
            found.append(target(name, LIMITS["overhead"], worst["overhead"], 1.0))
    compared = [row for row in rows if row["ratio"] is not None]
    if compared:
        worst = max(compared, key=lambda row: row["ratio"])
        name = f"step time of PEFT's (worst: {worst['shape']}, {worst['dtype']}, {worst['method']})"
        found.append(target(name, LIMITS["ratio"], worst["ratio"], 1.0))
    return found


def target(name: str, limit: float, mine: float, other: float) -> Row:
    return {"target": name, "limit": limit, "ours": mine, "PEFT": other, "met": mine <= limit}

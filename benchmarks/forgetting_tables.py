"""The tables of forgetting_digits.py, from its results."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

Row = dict[str, Any]
# Old accuracy, new accuracy, forgetting, each with its standard error: an implementation of the same protocol in plain
# PyTorch, ten seeds.
Cell = tuple[float, float]
EXPECTED: dict[str, dict[str, tuple[Cell, Cell, Cell]]] = {
    "nothing": {
        "classes": ((0.1, 0.1), (96.9, 0.4), (99.6, 0.1)),
        "turned": ((56.7, 1.7), (93.9, 0.4), (40.1, 1.7)),
    },
    "replay 1 %": {
        "classes": ((37.0, 2.6), (96.6, 0.4), (62.7, 2.6)),
        "turned": ((79.8, 1.2), (93.6, 0.4), (17.0, 1.1)),
    },
    "replay 5 %": {
        "classes": ((78.2, 1.3), (96.7, 0.3), (21.5, 1.3)),
        "turned": ((88.7, 0.8), (93.9, 0.3), (8.1, 0.7)),
    },
    "replay 10 %": {
        "classes": ((86.8, 0.5), (96.1, 0.3), (12.9, 0.5)),
        "turned": ((92.3, 0.6), (93.6, 0.3), (4.5, 0.5)),
    },
    "replay 25 %": {
        "classes": ((93.9, 0.5), (95.1, 0.3), (5.8, 0.5)),
        "turned": ((94.7, 0.5), (92.9, 0.5), (2.1, 0.5)),
    },
    "weight decay 1 (to zero)": {
        "classes": ((0.0, 0.0), (96.7, 0.4), (99.7, 0.1)),
        "turned": ((48.8, 1.2), (93.9, 0.3), (48.0, 1.1)),
    },
    "weight decay 10 (to zero)": {
        "classes": ((0.0, 0.0), (59.4, 2.8), (99.7, 0.1)),
        "turned": ((15.6, 0.8), (68.6, 1.2), (81.2, 0.7)),
    },
    "EWC 1e4": {
        "classes": ((21.2, 2.2), (91.0, 1.4), (78.5, 2.2)),
        "turned": ((93.3, 1.0), (80.1, 1.6), (3.5, 0.9)),
    },
    "LoRA r4": {
        "classes": ((1.7, 0.6), (85.0, 1.4), (98.0, 0.6)),
        "turned": ((61.7, 3.7), (79.9, 1.0), (35.1, 3.7)),
    },
    "LoRA r4 + replay 5 %": {
        "classes": ((62.4, 0.8), (83.8, 1.4), (37.3, 0.8)),
        "turned": ((89.8, 1.1), (79.6, 0.8), (7.0, 1.1)),
    },
    "LwF 1 (KL on new rows)": {
        "classes": ((5.5, 1.4), (96.6, 0.4), (94.2, 1.4)),
        "turned": ((46.6, 1.4), (17.8, 0.8), (50.2, 1.4)),
    },
    "DER++ 5 %, 10 per class": {
        "classes": ((98.3, 0.2), (75.5, 1.9), (1.4, 0.2)),
        "turned": ((96.7, 0.2), (89.0, 0.6), (0.1, 0.1)),
    },
    "A-GEM, 10 per class": {
        "classes": ((69.9, 1.4), (96.9, 0.2), (29.8, 1.5)),
        "turned": ((89.5, 0.9), (93.3, 0.3), (7.4, 0.9)),
    },
}
LIMIT, ABOVE, BEHIND = 5.0, 2.0, 1.0
"""Points: the budget, what the worst seed may be over it, what new accuracy may be behind the best fixed ratio."""


def of(results: list[Row], arm: str, scenario: str) -> list[Row]:
    """Return the runs of an arm."""
    return [row for row in results if row["arm"] == arm and row["scenario"] == scenario]


def drops(rows: list[Row], what: str) -> list[float]:
    """Return the forgetting of each seed, in points."""
    return [row["before"][what] - row["after"][what] for row in rows]


def spread(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def methods(results: list[Row]) -> list[str]:
    """Return the table of methods beside what is expected, and whether each cell is within 2 standard errors + 2 points.

    Both sides are means over seeds: the error is that of their difference.
    """
    lines = [
        "| method | classes: old | new | forgotten | turned: old | new | forgotten | as expected |",
        "|---|---|---|---|---|---|---|---|",
    ]
    budgets = ("fixed", "Forgetting")
    for arm in dict.fromkeys(row["arm"] for row in results if not row["arm"].startswith(budgets)):
        cells, off = [], []
        for scenario in ("classes", "turned"):
            rows = of(results, arm, scenario)
            found = [[row["after"]["old"] for row in rows], [row["after"]["new"] for row in rows], drops(rows, "old")]
            expected = EXPECTED[arm][scenario] if arm in EXPECTED else (None,) * 3
            for cell, (mean, error) in zip(expected, map(spread, found), strict=True):
                cells.append(f"{mean:.1f} ± {error:.1f}" + (f" ({cell[0]:.1f})" if cell else ""))
                if cell:
                    off.append(abs(mean - cell[0]) - 2 * math.hypot(error, cell[1]))
        worst = max(off, default=math.nan)
        verdict = "yes" if worst <= 2 else f"off by {worst:.1f} beyond 2 standard errors" if off else "no reference"
        lines.append(f"| {arm} | {' | '.join(cells)} | {verdict} |")
    return lines


def frontier(results: list[Row]) -> tuple[list[str], list[str]]:
    """Return the table of the budget beside fixed ratios, and the lines of its targets."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in results) if arm.startswith(("fixed", "Forgetting"))]
    head = "| | " + " | ".join(f"{s}: forgotten | worst seed | new | old rows" for s in ("classes", "turned")) + " |"
    lines, targets = [head, "|---" * 9 + "|"], ["| target | limit | classes | turned |  |", "|---|---|---|---|---|"]
    told: dict[str, dict[str, tuple[float, float, float]]] = {}
    for arm in arms:
        cells = []
        for scenario in ("classes", "turned"):
            rows = of(results, arm, scenario)
            lost = drops(rows, "report")
            (mean, error), (new, new_error) = spread(lost), spread([row["after"]["new"] for row in rows])
            told.setdefault(arm, {})[scenario] = mean, max(lost), new
            share = statistics.mean(row["ratio"] for row in rows)
            cells.append(f"{mean:.1f} ± {error:.1f} | {max(lost):.1f} | {new:.1f} ± {new_error:.1f} | {share:.0%}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    own = told[arms[-1]]
    others = [found for arm, found in told.items() if arm != arms[-1]]
    best = {
        s: max((f[s][2] for f in others if f[s][0] <= LIMIT and f[s][1] <= LIMIT + ABOVE), default=math.nan)
        for s in own
    }
    for name, limit, found in (
        ("mean forgetting", LIMIT, {s: own[s][0] for s in own}),
        ("worst seed", LIMIT + ABOVE, {s: own[s][1] for s in own}),
        (
            "new accuracy behind the best fixed ratio that keeps the budget",
            BEHIND,
            {s: best[s] - own[s][2] for s in own},
        ),
    ):
        kept = "ok" if all(value <= limit for value in found.values()) else "missed"
        targets.append(f"| {name} | ≤ {limit} | {found['classes']:.2f} | {found['turned']:.2f} | {kept} |")
    return lines, targets


def page(results: list[Row]) -> str:
    """Return all tables as Markdown."""
    seeds = len({row["seed"] for row in results})
    table, targets = frontier(results)
    order = [spread(drops(of(results, arm, s), "old"))[0] for s in ("classes", "turned") for arm in list(EXPECTED)[:5]]
    falls = all(a > b for part in (order[:5], order[5:]) for a, b in itertools.pairwise(part))
    return "\n".join(
        [
            f"Accuracy in percent and forgetting in points, mean ± standard error over {seeds} seeds, all old test rows; in "
            "brackets what a plain PyTorch implementation of the protocol gave.",
            "",
            *methods(results),
            "",
            f"Forgetting falls strictly from nothing over 1, 5, 10 to 25 % of replay, in both: {'yes' if falls else 'no'}.",
            "",
            "The budget: 5 points, one setting for both scenarios. Half of the old test rows is guarded, the other half "
            "reported; new accuracy is of all new test rows.",
            "",
            *table,
            "",
            *targets,
            "",
        ]
    )

"""Table, checks, picture and page of the recipe ``leaky_balloon``."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.files import write_atomic, write_text
from lightning_peft.reporting import TextTable

Row = dict[str, Any]
HELD = 0.05
"""Both arms hold if neither ends further below what was best for it than this."""
COLORS = ("C0", "C1", "C3", "C4", "C5")


def where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def kinds(rows: Sequence[Row], key: str) -> list[Any]:
    """Return the different values of a column, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; that of a single value is not known.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def points(values: Sequence[float]) -> str:
    """Return shares as points: mean and standard error.

    >>> points([0.5, 0.7])
    '60.0 ± 10.0'
    """
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:.1f} ± {error:.1f}"


def table(rows: Sequence[Row]) -> TextTable:
    """Return a line for each cell: what is left of both arms, and of the weights."""
    lines = []
    for feed in kinds(rows, "feed"):
        for decay in kinds(rows, "decay"):
            found = where(rows, feed=feed, decay=decay)
            shares = [
                points([row[key] for row in found]) for key in ("upright_before", "upright_after", "turned_after")
            ]
            norms = [
                f"{mean_and_error([row['norms'][block][-1] for row in found])[0]:.2f}" for block in rows[0]["norms"]
            ]
            forgotten = points([row["forgetting"] for row in found])
            lines.append([feed, f"{decay:g}", *shares, forgotten, *norms])
    columns = ("fed", "decay", "upright before", "upright after", "turned after", "forgotten")
    blocks = [f"‖{block}‖" for block in rows[0]["norms"]]
    title = f"Accuracy in points, mean ± standard error over {len(kinds(rows, 'seed'))} seeds; weight norms at the end"
    return TextTable(title, (*columns, *blocks), lines)


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Something that should come out, and whether it did; of a note nothing is expected."""

    what: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        said = {True: "ok    ", False: "NOT ok", None: "note  "}[self.holds]
        return f"{said} {self.what}: {self.found}"


def checks(rows: Sequence[Row]) -> list[Check]:
    """Return what the picture of the balloon says, checked.

    The unfed arm falls faster with decay: it ends lower, paired by seed, beyond two standard errors. Both arms hold when both are
    fed, without decay and with the first one above 0: each ends within :data:`HELD` of what is best for it, the upright arm of
    what it was, the turned one of what it becomes if it alone is fed, with the same decay. Noted only: the mean over all looks,
    and how stronger decays end, which leave too little weight for two skills.
    """
    found = []
    decays = kinds(rows, "decay")
    for less, more in itertools.pairwise(decays):
        for what, value in (("at the end", end_of), ("in the mean of all looks", mean_of)):
            pairs = zip(where(rows, feed="one arm", decay=less), where(rows, feed="one arm", decay=more), strict=True)
            mean, error = mean_and_error([value(one) - value(other) for one, other in pairs])
            text = f"{100 * mean:.1f} ± {100 * error:.1f} points lower"
            holds = mean > 2 * error if value is end_of else None
            found.append(Check(f"unfed arm, decay {more:g} against {less:g}, {what}", text, holds))
    for decay in decays:
        fed, alone = (where(rows, feed=feed, decay=decay) for feed in ("both arms", "one arm"))
        lost = {
            "upright": mean_and_error([row["forgetting"] for row in fed])[0],
            "turned": mean_and_error([b["turned_after"] - a["turned_after"] for a, b in zip(fed, alone, strict=True)])[
                0
            ],
        }
        text = ", ".join(f"{arm} {-100 * value:+.1f} points" for arm, value in lost.items())
        expected = decay in decays[:2]
        found.append(
            Check(
                f"both fed, decay {decay:g}{': both hold' if expected else ''}",
                text,
                max(lost.values()) <= HELD if expected else None,
            )
        )
    return found


def end_of(row: Row) -> float:
    """Return what is left of the upright arm."""
    return float(row["upright_after"])


def mean_of(row: Row) -> float:
    """Return what was left of the upright arm, in the mean of all looks."""
    return statistics.fmean(row["upright"])


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Draw both arms and the weights over the steps, what one arm is fed above and what both are below.

    Args:
        file: The PNG to write.
        rows: Of all cells.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    feeds = kinds(rows, "feed")
    figure = Figure(figsize=(12, 3.4 * len(feeds) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(feeds), 3, squeeze=False)
    titles = {"one arm": "only turned digits are fed", "both arms": "both are fed"}
    for line, feed in zip(grid, feeds, strict=True):
        for panel, arm in zip(line, ("upright", "turned"), strict=False):
            for color, decay in zip(COLORS, kinds(rows, "decay"), strict=False):
                _band(panel, [(row["steps"], row[arm]) for row in where(rows, feed=feed, decay=decay)], color, decay)
            panel.set_ylim(0, 1.02)
            panel.set_ylabel(f"accuracy on {arm} digits")
            unfed = " (gets no air)" if arm == "upright" and feed == "one arm" else ""
            panel.set_title(f"{titles[feed]}: {arm} arm{unfed}", fontsize=10)
        for color, decay in zip(COLORS, kinds(rows, "decay"), strict=False):
            for style, block in zip(("-", "--", ":"), rows[0]["norms"], strict=False):
                curves = [(row["steps"], row["norms"][block]) for row in where(rows, feed=feed, decay=decay)]
                _band(line[2], curves, color, None, style=style)
        line[2].set_ylabel("norm of the weights")
        line[2].set_ylim(bottom=0)
        blocks = ", ".join(f"{block} {style}" for style, block in zip(("-", "--", ":"), rows[0]["norms"], strict=False))
        line[2].set_title(f"air in the balloon: {blocks}", fontsize=10)
    for panel in grid.flat:
        panel.grid(alpha=0.3)
    for panel in grid[-1]:
        panel.set_xlabel("step")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    write_atomic(file, lambda draft: figure.savefig(draft, dpi=110))


def _band(panel: Any, curves: Sequence[tuple[Any, Any]], color: str, decay: float | None, *, style: str = "-") -> None:
    """Draw the mean of curves and the band of its standard error."""
    steps = curves[0][0]
    found = [mean_and_error(values) for values in zip(*(curve for _, curve in curves), strict=True)]
    label = None if decay is None else "no leak (decay 0)" if decay == 0 else f"leak: decay {decay:g}"
    panel.plot(steps, [mean for mean, _ in found], style, color=color, label=label)
    if len(curves) > 1:
        panel.fill_between(steps, [m - e for m, e in found], [m + e for m, e in found], color=color, alpha=0.2, lw=0)


# --- page -------------------------------------------------------------------------------------------------------------

PAGE = """# The leaky balloon

Air is data, the leak is weight decay. A network knows two skills as a balloon has two arms: whoever pumps one arm alone lets
the other deflate, and the faster, the larger the leak.

![Both arms and the weights, over the steps](PICTURE)

An MLP 64-128-128-10 learns upright digits (scikit-learn's) for BEFORE steps of Adam. Then it gets STEPS steps of BATCH rows:
digits turned by 90 degrees alone ("one arm"), or with SHARE of upright ones among them ("both arms", `ReplayMixing`). AdamW,
rate 1e-3; weight decay acts on all parameters, decoupled: each step takes the part `rate * decay` of every weight. Accuracy
is that on test rows of both kinds (30 % of all), every LOOK steps (`ForgettingEvaluation`).

TABLE

Checked:

CHECKS

The same protocol without this library forgot 40.1 ± 1.7, 48.0 ± 1.1 and 81.2 ± 0.7 points at decays of 0, 1 and 10, one arm
fed, 10 seeds.

What the unfed arm loses without a leak is interference: the other arm's data moves the weights, most of all at first. The leak
takes more as time goes by, and needs no data for it. Where both arms are fed the pump makes up for a leak of 1, at smaller
weights. A leak of 10 leaves too little weight for either skill, pumped or not.

For a pretrained network there is seldom old data. Then leave decay out, let it point to the pretrained weights
([`DecayToPretrained`](methods/decay_to_pretrained.md)), or let it act on an adapter, where it is just that.

Made by `COMMAND`.
"""


def page(file: Path, rows: Sequence[Row], verdicts: Sequence[Check], options: Mapping[str, Any], command: str) -> None:
    """Write the page; its figures are of this run.

    Args:
        file: Where it goes; the picture of the same name lies beside it.
        rows: Of all cells.
        verdicts: Of the checks.
        options: The recipe's.
        command: That makes it again.
    """
    text = PAGE
    for word, value in {
        "PICTURE": file.with_suffix(".png").name,
        "TABLE": table(rows).markdown(),
        "CHECKS": "\n".join(f"- {verdict}" for verdict in verdicts),
        "COMMAND": command,
        "BEFORE": str(options["before"]),
        "STEPS": str(options["steps"]),
        "BATCH": str(options["batch_size"]),
        "SHARE": f"{100 * options['ratio']:g} %",
        "LOOK": str(options["look_every"]),
    }.items():
        text = text.replace(word, value)
    write_text(file, text)

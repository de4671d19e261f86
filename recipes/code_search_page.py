"""Table, pictures and section of code_search."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from lightning_peft.decoding.compute_curve import bootstrap_band, pass_at_k
from lightning_peft.files import write_atomic
from lightning_peft.recipes.code_search_arms import CodeRow
from lightning_peft.reporting import TextTable, save_results, write_section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = (
    "beam",
    "beam + viability",
    "likeliest sample",
    "sample that parses",
    "agreed sample",
    "MBR sample",
    "sample by the first test",
)


class Found:
    """Rows by arm and width, with the problems in one order, so that arms can be compared pair by pair."""

    def __init__(self, rows: Sequence[CodeRow]) -> None:
        self.problems = list(dict.fromkeys(row.problem for row in rows))
        self._rows: dict[tuple[str, int], dict[str, CodeRow]] = {}
        for row in rows:
            self._rows.setdefault((row.arm, row.width), {})[row.problem] = row

    def widths(self, arm: str) -> list[int]:
        """Return the widths that an arm was run with."""
        return sorted(width for name, width in self._rows if name == arm)

    def values(self, arm: str, width: int, what: str, suite: str | None = None) -> np.ndarray[Any, Any]:
        """Return a measure of each problem, ``(problems,)``."""
        rows = [self._rows[arm, width][problem] for problem in self.problems]
        return np.array([float(getattr(row, what)) for row in rows if suite in (None, row.suite)])

    def mean(self, arm: str, width: int, what: str, suite: str | None = None) -> float:
        """Return a measure's mean over problems; NaN if the suite has none."""
        values = self.values(arm, width, what, suite)
        return float(values.mean()) if len(values) else float("nan")


def bootstrap(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the middle 95 % of the mean of resampled values; of differences by problem, it is the paired bootstrap."""
    return bootstrap_band(torch.from_numpy(values), resamples=10_000)


def report(rows: Sequence[CodeRow], options: Any) -> None:
    """Print the table; write results, page, pictures and logs."""
    out = Path(options.out)
    page = Path(options.page) if options.page else out / "decoding.md"
    found = Found(rows)
    table = shares(found)
    shares(found, widest=True).show()
    verdict = gain(found, max(options.beams))
    print(verdict)
    measures = ("tokens", "seconds", "scorer_seconds", "parses", "body_parses", "passed", "shown", "covered")
    results = {
        f"{arm}, {width}": {what: found.mean(arm, width, what) for what in measures}
        for arm in ARMS
        for width in found.widths(arm)
    }
    save_results(out, results, asdict(options))
    figures = {"code": curves(found), "limits": limits(found)}
    log(out, found, figures)
    for name, figure in figures.items():
        write_atomic(page.with_name(f"decoding_{name}.png"), partial(figure.savefig, dpi=110, format="png"))
    write_section(page, "code_search", section(found, options, table, verdict), heading="Decoding")
    print(f"Page      {page}\nCurves    tensorboard --logdir {out / 'logs'}")


def shares(found: Found, *, widest: bool = False) -> TextTable:
    """Return what each arm reached and what it took, with the bootstrap's 95 % over problems; ``widest`` is for terminals."""
    lines = []
    for arm in ARMS:
        for width in found.widths(arm)[-1 if widest else 0 :]:
            cells = [_share(found.values(arm, width, what)) for what in ("parses", "body_parses", "passed")]
            suites = [f"{found.mean(arm, width, 'passed', suite):.2f}" for suite in ("own", "human_eval")]
            cost = [f"{found.mean(arm, width, 'tokens'):.0f}", f"{found.mean(arm, width, 'seconds'):.1f}"]
            scorer = f"{found.mean(arm, width, 'scorer_seconds'):.2f}"
            name = "greedy" if (arm, width) == ("beam", 1) else f"{arm}, {width}"
            lines.append((name, *cost, scorer, *cells, " / ".join(suites)))
    columns = [
        "decoder",
        "tokens",
        "seconds",
        "of these scorer",
        "parses",
        "function parses",
        "passes",
        "own / HumanEval",
    ]
    return TextTable(
        f"Means over {len(found.problems)} problems; in brackets 95 % of the bootstrap over problems", columns, lines
    )


def _share(values: np.ndarray[Any, Any]) -> str:
    low, high = bootstrap(values)
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def gain(found: Found, width: int) -> str:
    """Say by how much the parser's pruning raises the share that parses, pair by pair, and at how many tokens."""
    gains = []
    for what, words in (
        ("parses", "of texts that parse"),
        ("body_parses", "of functions that parse, without what follows them,"),
        ("passed", "of functions that pass"),
    ):
        pairs = [found.values(arm, width, what) for arm in ("beam + viability", "beam")]
        low, high = bootstrap(pairs[0] - pairs[1])
        difference = float((pairs[0] - pairs[1]).mean())
        interval = f"paired bootstrap: {100 * low:+.0f} to {100 * high:+.0f}"
        gains.append(f"the share {words} by {100 * difference:+.0f} points ({interval})")
    tokens = [found.mean(arm, width, "tokens") for arm in ("beam + viability", "beam")]
    spent = f"at {tokens[0]:.0f} tokens instead of {tokens[1]:.0f}"
    return f"With {width} beams, PythonViability changes {'; '.join(gains)}; {spent}."


def curves(found: Found) -> Figure:
    """Draw what parses and what passes against tokens."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels = [
        ("parses", "share of texts that parse as written"),
        ("passed", "share of functions that pass their tests"),
    ]
    for place, (what, words) in enumerate(panels):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, arm in enumerate(ARMS[:6]):
            _curve(axes, found, arm, what, f"C{number}")
        if what == "passed" and found.widths("likeliest sample"):
            widths = found.widths("likeliest sample")
            tokens = [found.mean("likeliest sample", width, "tokens") for width in widths]
            axes.plot(tokens, coverage(found, widths), "k--", linewidth=1, label="any sample of the pool (pass@k)")
        axes.set(xlabel="tokens for each problem", ylabel=words, ylim=(0, 1.02))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _curve(axes: Axes, found: Found, arm: str, what: str, color: str) -> None:
    widths = found.widths(arm)
    if not widths:
        return
    tokens = [found.mean(arm, width, "tokens") for width in widths]
    # Selectors from one pool often agree: their signs differ, so that none hides another.
    sign = dict(zip(ARMS, ("o-", "s-", "^:", "v:", "x:", "+:"), strict=False))[arm]
    axes.plot(tokens, [found.mean(arm, width, what) for width in widths], sign, color=color, markersize=6, label=arm)
    if arm.startswith("beam"):
        low, high = zip(*(bootstrap(found.values(arm, width, what)) for width in widths), strict=True)
        axes.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)


def coverage(found: Found, widths: Sequence[int]) -> list[float]:
    """Return the chance that any of k samples passes, without bias: Chen et al. 2021, section 2.1."""
    most = max(widths)
    right = [round(share * most) for share in found.values("likeliest sample", most, "covered")]
    return [float(np.mean([pass_at_k(most, count, width) for count in right])) for width in widths]


def limits(found: Found) -> Figure:
    """Draw what choosing by one test makes of that test and of all, and where the seconds go."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    arm = "sample by the first test"
    widths = found.widths(arm)
    for what, words, style, color in (
        ("shown", "the test that it was chosen by", "s--", "C1"),
        ("passed", "all tests", "o:", "C0"),
    ):
        axes.plot(widths, [found.mean(arm, width, what, "own") for width in widths], style, color=color, label=words)
    axes.set(xlabel="samples to choose from", ylabel="own problems: share that passes", ylim=(0, 1.02), xticks=widths)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes = figure.add_subplot(1, 2, 2)
    bars = [(one, max(found.widths(one))) for one in ARMS if found.widths(one)]
    scorer = np.array([found.mean(*bar, "scorer_seconds") for bar in bars])
    model = np.array([found.mean(*bar, "seconds") for bar in bars]) - scorer
    names = [f"{one}, {width}" for one, width in bars]
    axes.barh(names, model, color="C0", label="model")
    axes.barh(names, scorer, left=model, color="C3", label="scorer")
    axes.set(xlabel="seconds for each problem")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure


def log(out: Path, found: Found, figures: dict[str, Figure]) -> None:
    """Write curves over tokens, a run for each arm, and the pictures into TensorBoard."""
    for arm in ARMS:
        logger = TensorBoardLogger(out / "logs", name="", version=re.sub(r"\W+", "_", arm))
        for width in found.widths(arm):
            step = round(found.mean(arm, width, "tokens"))
            for what in ("parses", "passed", "seconds"):
                logger.experiment.add_scalar(f"decoding/{what}", found.mean(arm, width, what), step)
        logger.finalize("success")
    logger = TensorBoardLogger(out / "logs", name="", version="summary")
    for name, figure in figures.items():
        logger.experiment.add_figure(f"decoding/{name}", figure)
    logger.finalize("success")


def section(found: Found, options: Any, table: TextTable, verdict: str) -> str:
    """Return the page's part: what was run, the figures, and what they say of the limits."""
    model = options.model or "SmolLM2-135M-Instruct (weights of four bits, unpacked)"
    lines = [
        "## Code by search",
        f"{model} completes {options.problems} small functions of our own and {options.problems} of HumanEval, at most "
        f"{options.max_new_tokens} tokens each; samples at temperature {options.temperature:g}, seed {options.seed}. A text parses "
        "that is a program together with its prompt, as written, also where the limit cut it; empty ones do not. What passes is "
        "the function alone, without what the model wrote after it, in its tests. All samples of a problem come from one pool.",
        verdict,
        table.markdown(),
        "![what parses and what passes, against tokens](decoding_code.png)",
        limits_in_words(found),
        "![choosing by one test, and where the seconds go](decoding_limits.png)",
        "Made by `lightning-peft code_search --page docs/decoding.md`. Seconds are of one machine, and of its load.",
    ]
    return "\n\n".join(lines)


def limits_in_words(found: Found) -> str:
    """Say where search stops paying, from what was measured."""
    said: list[Callable[[Found], str | None]] = [_after, _doubling, _optimised, _selectors, _cost]
    return "**Limits.** " + " ".join(one for one in (say(found) for say in said) if one)


def _after(found: Found) -> str | None:
    width = max(set(found.widths("beam")) & set(found.widths("beam + viability")), default=1)
    if width < 2:
        return None
    whole, body = (
        100 * (found.mean("beam + viability", width, what) - found.mean("beam", width, what))
        for what in ("parses", "body_parses")
    )
    return (
        f"Of the {whole:+.0f} points in texts that parse, {body:+.0f} are the function's own; the others come of what is written "
        "after it and of where the limit cuts."
    )


def _doubling(found: Found) -> str | None:
    widths = found.widths("beam + viability")
    if len(widths) < 2:
        return None
    wide, narrow = widths[-1], widths[-2]
    arm = "beam + viability"
    by = [100 * (found.mean(arm, wide, what) - found.mean(arm, narrow, what)) for what in ("parses", "passed")]
    return f"From {narrow} to {wide} beams with viability, what parses changes by {by[0]:+.0f} points, what passes by {by[1]:+.0f}."


def _optimised(found: Found) -> str | None:
    widths = found.widths("sample by the first test")
    if not widths:
        return None
    share = [found.mean("sample by the first test", widths[-1], what, "own") for what in ("shown", "passed")]
    start = [found.mean("sample by the first test", widths[0], what, "own") for what in ("shown", "passed")]
    return (
        f"Choosing among {widths[-1]} samples by the first test of our own problems lifts that test from {start[0]:.2f} to "
        f"{share[0]:.2f} and all tests from {start[1]:.2f} to {share[1]:.2f}: a scorer that sees a part is optimised in part."
    )


def _selectors(found: Found) -> str | None:
    widths = found.widths("likeliest sample")
    if not widths:
        return None
    chosen = {
        arm: found.mean(arm, widths[-1], "passed")
        for arm in ("likeliest sample", "sample that parses", "agreed sample", "MBR sample")
    }
    best = max(chosen, key=lambda arm: chosen[arm])
    any_of = coverage(found, widths)[-1]
    return (
        f"Of {widths[-1]} samples one passes for {any_of:.2f} of the problems; the best selector without tests, {best}, finds "
        f"{chosen[best]:.2f}."
    )


def _cost(found: Found) -> str | None:
    widths = found.widths("beam + viability")
    if not widths:
        return None
    arm = "beam + viability", widths[-1]
    scorer = found.values(*arm, "scorer_seconds").sum()
    part = scorer / found.values(*arm, "seconds").sum()
    each = scorer / max(1, found.values(*arm, "scorer_calls").sum())
    return (
        f"The parser takes {100 * part:.1f} % of the time of {widths[-1]} beams, {1e6 * each:.0f} µs for each question."
    )

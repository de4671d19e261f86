"""Table, picture and page of the recipes ``keep_fluent`` and ``keep_safe``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_peft.files import write_atomic, write_text
from lightning_peft.recipes.keep_language import ARMS, Keep, Row
from lightning_peft.reporting import TextTable


def spread(values: Sequence[float]) -> str:
    """Return mean and standard error.

    >>> spread([1.0, 3.0]), spread([0.5])
    ('2.00 ± 1.00', '0.50')
    """
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{error}"


def table(rows: Sequence[Row], title: str) -> TextTable:
    """Return a line for the untuned model and for each arm: what is left and what is lost, mean and standard error over seeds."""
    names = [key.removesuffix(" before") for key in rows[0] if key.endswith(" before")]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    measured = [key for name in names for key in (f"{name} after", f"{name} lost")]
    lines = [["untuned", *(text for name in names for text in (f"{rows[0][f'{name} before']:.2f}", "")), "", ""]]
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        lines.append(
            [arm, *(spread([row[key] for row in own]) for key in (*measured, "share of old rows", "weights of step"))]
        )
    columns = ("arm", *(key.removesuffix(" after") for key in measured), "share of old rows", "weights of step")
    return TextTable(f"{title}, {len(rows) // len(arms)} seed(s), ± standard error", columns, lines)


def draw(file: Path, rows: Sequence[Row], panels: Mapping[str, str], limits: Mapping[str, float]) -> None:
    """Draw what each arm has lost: a panel for each measure, a dot for each seed, the limit as a line.

    Args:
        file: The PNG to write.
        rows: Of all runs.
        panels: Measures, and what they are called.
        limits: What may be lost.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for panel, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for place, arm in enumerate(arms):
            values = [row[f"{name} lost"] for row in rows if row["arm"] == arm]
            panel.bar(place, statistics.fmean(values), 0.6, color=f"C{place}", alpha=0.5)
            panel.scatter([place] * len(values), values, s=14, color=f"C{place}", zorder=3)
        if name in limits:
            panel.axhline(limits[name], color="k", ls="--", lw=1, label="limit")
            panel.legend(frameon=False)
        panel.axhline(0, color="0.5", lw=0.8)
        panel.set_xticks(range(len(arms)), arms)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, axis="y")
    write_atomic(file, lambda draft: figure.savefig(draft, dpi=110))


def report(
    options: Keep, rows: Sequence[Row], text: str, *, title: str, panels: Mapping[str, str], limits: Mapping[str, float]
) -> None:
    """Print the table, and write page and picture.

    Args:
        options: The recipe's.
        rows: Of all runs.
        text: The page, with PICTURE, TABLE, ARMS, LIMITS and COMMAND in capitals.
        title: Of the table.
        panels: Measures of the picture, and what they are called.
        limits: What may be lost.
    """
    written = Path(options.page) if options.page else Path(options.out) / f"{options.name}.md"
    draw(written.with_suffix(".png"), rows, panels, limits)
    found = table(rows, title)
    for word, value in {
        "PICTURE": written.with_suffix(".png").name,
        "TABLE": found.markdown(),
        "ARMS": "\n".join(f"- `{arm}`: {ARMS[arm]}." for arm in options.arms),
        "LIMITS": ", ".join(f"{value:.2f}" for value in limits.values()),
        "COMMAND": options.command(),
    }.items():
        text = text.replace(word, value)
    write_text(written, text)
    found.show()
    print(
        f"Results   {options.out}/results.json, results.csv\nPage      {written}\nPicture   {written.with_suffix('.png')}\n"
        f"Curves    tensorboard --logdir {options.out}/logs"
    )

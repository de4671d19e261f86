"""Tables and figures of a run: on the screen, as JSON and CSV, as a picture."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_peft.files import write_atomic, write_text

Row = Mapping[str, Any]


def format_value(value: object) -> str:
    """Show a number the way a table should: fractions to three digits, large counts with separators.

    >>> [format_value(v) for v in (0.84213, 1234567, 5e-4, "full", 183.4, -0.00613)]
    ['0.842', '1,234,567', '0.0005', 'full', '183', '-0.00613']
    """
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class TextTable:
    """A table of text, for the terminal and for a page.

    Args:
        title: Stands above it.
        columns: What the columns are called.
        rows: A text for every column.

    >>> print(TextTable("Steps", ("head", "drift"), [("zero", "0.01")]).markdown())
    Steps
    <BLANKLINE>
    | head | drift |
    | --- | --- |
    | zero | 0.01 |
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown, under its title."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join([f"{self.title}\n", *(f"| {' | '.join(line)} |" for line in lines)])

    def show(self, console: Console | None = None) -> None:
        """Print the table."""
        table = Table(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        (console or Console()).print(table)


def write_section(page: Path, name: str, text: str, *, heading: str) -> None:
    """Put a part into a page of several, in place of the one that stands there.

    Args:
        page: The page.
        name: Of the part; comments with it mark its ends.
        text: Markdown.
        heading: Of a page that is not there yet.
    """
    whole = page.read_text(encoding="utf-8") if page.exists() else f"# {heading}\n"
    part = f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
    write_text(page, pattern.sub(lambda _: part, whole) if pattern.search(whole) else f"{whole.rstrip()}\n\n{part}\n")


def print_table(title: str, measures: Mapping[str, str], rows: Mapping[str, Row]) -> None:
    """Print what was measured, a line per measure and a column per arm: few arms fit a narrow terminal so.

    Args:
        title: Stands above the table.
        measures: Key in a row, and what it is called.
        rows: Values by arm.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for key, label in measures.items():
        table.add_row(label, *(format_value(row.get(key, "-")) for row in rows.values()))
    Console().print(table)


def save_results(folder: Path, rows: Mapping[str, Row], about: Row) -> None:
    """Write ``results.json`` (``{"arms": {name: row}, "about": ...}``) and ``results.csv``, each in one step."""
    write_text(folder / "results.json", json.dumps({"arms": rows, "about": about}, indent=2))
    keys = dict.fromkeys(key for row in rows.values() for key in row if key != "arm")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["arm", *keys])
    writer.writeheader()
    writer.writerows({**row, "arm": name} for name, row in rows.items())
    write_text(folder / "results.csv", text.getvalue())


def finished_rows(folder: Path, about: Row, *, owner: str) -> dict[str, dict[str, Any]]:
    """Return the rows that :func:`save_results` wrote of the same run, by name; none if there is no file.

    Args:
        folder: Where they are.
        about: What the rows must be about.
        owner: Who asks, for messages.

    Raises:
        ValueError: If they come from a run with other options.
    """
    file = folder / "results.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["about"] != about:
        raise ValueError(
            f"{owner}: {file} comes from a run with {found['about']}, not {dict(about)}; drop --resume or use --out."
        )
    rows: dict[str, dict[str, Any]] = found["arms"]
    return rows


def plot_learned_forgotten(
    file: Path, rows: Mapping[str, Row], skills: Sequence[tuple[str, str]], *, learned: str = "accuracy"
) -> None:
    """Draw what each arm learned against what it forgot, a panel per old skill.

    Args:
        file: The PNG to write.
        rows: Rows by arm.
        skills: Pairs of the key of a drop and the title of its panel.
        learned: Key of the value on the vertical axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5.2 * len(skills), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(skills), sharey=True, squeeze=False)[0]
    for panel, (key, title) in zip(panels, skills, strict=True):
        for number, (name, row) in enumerate(rows.items()):
            panel.scatter(row[key], row[learned], s=70, color=f"C{number % 10}", zorder=3)
            panel.annotate(name, (row[key], row[learned]), xytext=(7, 6), textcoords="offset points")
        panel.axvline(0, color="0.6", linewidth=1)
        panel.grid(alpha=0.3)
        panel.set_title(title)
        panel.set_xlabel("forgotten: recall@1 before minus after")
        panel.margins(0.2)
    panels[0].set_ylabel("learned: sentiment accuracy on test rows")
    write_atomic(file, lambda draft: figure.savefig(draft, dpi=130))

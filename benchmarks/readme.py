"""Put the tables of benchmarks/results and docs into README.md, and draw its picture from the same figures."""

from __future__ import annotations

import csv
import itertools
import re
import statistics
from pathlib import Path

from lightning_peft.recipes.sentiment import SKILLS
from lightning_peft.reporting import plot_learned_forgotten

RESULTS = Path("benchmarks/results")
DOCS = Path("docs")


def table(name: str) -> str:
    """Return a table as README shows it: a file of results whole, of a page in docs its first table."""
    file = RESULTS / f"{name}.md"
    if file.is_file():
        return file.read_text().strip()
    lines = (DOCS / f"{name}.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    return "\n".join(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))


def main() -> None:
    """Rewrite README.md between its markers, and docs/sentiment.png."""
    readme = Path("README.md")
    text = readme.read_text()
    for name in re.findall(r"<!-- table: (\w+) -->", text):
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, name=name: f"{found[1]}{table(name)}\n{found[2]}", text, flags=re.DOTALL)
    readme.write_text(text)
    rows: dict[str, list[dict[str, str]]] = {}
    with (RESULTS / "sentiment.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            rows.setdefault(row["arm"], []).append(row)
    keys = ("accuracy", "forgetting", "unreplayed_forgetting")
    means = {
        arm: {key: statistics.mean(float(row[key]) for row in found) for key in keys} for arm, found in rows.items()
    }
    plot_learned_forgotten(Path("docs/sentiment.png"), means, SKILLS)


if __name__ == "__main__":
    main()

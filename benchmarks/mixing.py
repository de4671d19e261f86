"""What mixing old rows in costs: batches from a loader with replay against the same loader without, in turns.

Two loaders: the review job's, which tokenises 32 reviews in its collate function, and a plain ``TensorDataset`` of 64 rows of 16
numbers; each with 0 and 2 workers. Old and new rows are of one kind, so that a batch is as much work with and without. A round
times both, from the first batch to the last; workers have started by then. The ratio of a round is with / without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_peft.data.mix_loader import MixLoader
from lightning_peft.data.mix_plan import MixPlan
from lightning_peft.data.packaged import minilm, movie_reviews
from lightning_peft.data.streams import Stream
from lightning_peft.files import write_text
from lightning_peft.recipes.sentiment_data import LabelledBatch

RATIO = Fraction(1, 5)
LIMITS = {"review job": 1.01, "TensorDataset": 1.10}
"""What a ratio should not pass."""


def reviews() -> tuple[Any, Any, dict[str, Any]]:
    """Return new and old rows, and the options of the review job's loader."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    rows = [(row.text, row.label) for row in movie_reviews()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [rows[place] for place in order]
    options = {"batch_size": 32, "collate_fn": LabelledBatch(AutoTokenizer.from_pretrained(minilm()))}
    return mixed[:20000], mixed[20000:], options


def numbers() -> tuple[Any, Any, dict[str, Any]]:
    """Return new and old rows of numbers, and the options of their loader."""
    generator = torch.Generator().manual_seed(0)
    sets = [
        TensorDataset(torch.randn(count, 16, generator=generator), torch.zeros(count, dtype=torch.long))
        for count in (100_000, 10_000)
    ]
    return *sets, {"batch_size": 64}


KINDS: dict[str, tuple[Callable[[], Any], int]] = {"review job": (reviews, 60), "TensorDataset": (numbers, 600)}
"""What is loaded, and how many batches a round takes."""


def loaders(new: Any, old: Any, options: dict[str, Any], workers: int) -> dict[str, DataLoader[Any]]:
    """Return a loader without and one with old rows."""
    plain = DataLoader(new, shuffle=True, num_workers=workers, **options)
    plan = MixPlan(new=len(new), memory=Stream(len(old), 0), ratio=RATIO, batch=options["batch_size"])
    return {"without": plain, "with": MixLoader(plain, old, plan)}


def seconds(loader: DataLoader[Any], batches: int) -> float:
    """Return the seconds that so many batches take after the first one."""
    found = iter(loader)
    next(found)
    start = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(found, batches))
    spent = time.perf_counter() - start
    if taken < batches:
        raise RuntimeError(f"The loader gave {taken} batches of {batches}.")
    return spent


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return the ratios of every kind of loader and number of workers."""
    rows = []
    jobs = list(itertools.product(KINDS, (0, 2)))
    for kind, workers in tqdm(jobs, desc="mixing"):
        make, batches = KINDS[kind]
        both = loaders(*make(), workers)
        ratios = []
        for turn in range(rounds):
            order = ("with", "without") if turn % 2 else ("without", "with")
            spent = {name: seconds(both[name], batches) for name in order}
            ratios.append(spent["with"] / spent["without"])
        first, middle, last = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "loader": kind,
                "workers": workers,
                "ratio": middle,
                "quartiles": [first, last],
                "rounds": rounds,
                "batches": batches,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(
        "loader", "workers", "with / without", "quartiles", "limit", title="What mixing 20 % of old rows in costs"
    )
    for row in rows:
        limit = LIMITS[row["loader"]]
        said = f"{limit:.2f} {'ok' if row['ratio'] <= limit else 'MISSED'}"
        quartiles = " - ".join(f"{value:.3f}" for value in row["quartiles"])
        table.add_row(row["loader"], str(row["workers"]), f"{row['ratio']:.3f}", quartiles, said)
    Console().print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each case; a median needs at least 5")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mixing.json")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error(f"--rounds={options.rounds} must be at least 5")
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    write_text(
        options.out, json.dumps({"ratio": str(RATIO), "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )
    show(rows)


if __name__ == "__main__":
    main()

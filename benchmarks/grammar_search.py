"""What a scorer of prefixes buys on a grammar it knows: a small character model writes Python functions.

A GPT of 2 layers x 64 is trained for 220 steps on generated functions, per seed, and completes heads of functions with at most 90
characters. "valid" parses and has ended; "ok" also uses only names it knows and ends by returning. Two beams of 8 stand for
what a scorer of prefixes is compared with: transformers' own rules, and the same with finished texts checked (an end in the middle
of a program is dead, but no prefix is), which is what one would write around any beam search.

``python benchmarks/grammar_search.py --page docs/decoding.md``
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from grammar_task import CharTokenizer, heads, is_ok, is_valid, ok_score, trained
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from lightning_peft.decoding import BeamSearch, BestOfN, DecodeResult, Greedy, Sample
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers import PythonViability
from lightning_peft.files import write_text
from lightning_peft.reporting import TextTable, write_section

LENGTH = 90
Row = dict[str, float]


@dataclass
class EndsOnly:
    """Every text may go on; only a program may end."""

    programs: PythonViability

    def __call__(self, texts: list[Draft]) -> Tensor:
        return torch.zeros(len(texts))

    def finished(self, texts: list[Draft]) -> list[bool]:
        return self.programs.finished(texts)


def arms() -> dict[str, Callable[[], Any]]:
    """Return makers of decoders by name: a scorer begins with an empty memory."""

    def beam(width: int = 8, **options: Any) -> BeamSearch:
        return BeamSearch(num_beams=width, max_new_tokens=LENGTH, **options)

    narrow = {"expand": 1, "early_stopping": "first"}
    return {
        "greedy": lambda: Greedy(max_new_tokens=LENGTH),
        "one sample": lambda: Sample(max_new_tokens=LENGTH),
        "best of 8 by log-probability": lambda: BestOfN(n=8, max_new_tokens=LENGTH),
        "best of 8 by ok": lambda: BestOfN(n=8, final=ok_score, max_new_tokens=LENGTH),
        "beam 8": beam,
        "beam 8, picked by ok": lambda: beam(final=ok_score),
        "beam 8, ends checked": lambda: beam(partial=EndsOnly(PythonViability())),
        "beam 8, ends checked, first": lambda: beam(partial=EndsOnly(PythonViability()), **narrow),
        "beam 8, prefixes": lambda: beam(partial=PythonViability()),
        "beam 8, prefixes, first": lambda: beam(partial=PythonViability(), **narrow),
        "beam 8, prefixes, picked by ok": lambda: beam(partial=PythonViability(), final=ok_score),
        "beam 4, prefixes, first": lambda: beam(4, partial=PythonViability(), **narrow),
    }


def measured(result: DecodeResult) -> Row:
    """Return shares and costs, means over prompts."""
    best, usage = result.best, result.usage
    valid = [one.finished and is_valid(one.draft) for one in best]
    return {
        "valid": statistics.fmean(valid),
        "ok": statistics.fmean(one.finished and is_ok(one.draft) for one in best),
        "tokens": statistics.fmean(one.tokens for one in usage),
        "forwards": statistics.fmean(one.forwards for one in usage),
        "scorer calls": statistics.fmean(one.scorer_calls for one in usage),
        "scorer ms": 1000 * statistics.fmean(one.scorer_seconds for one in usage),
        "ms": 1000 * statistics.fmean(one.seconds for one in usage),
    }


def table(found: dict[str, list[Row]], prompts: int) -> TextTable:
    """Return means over seeds, and their range where that matters."""
    columns = ["decoder", "valid (range)", "ok (range)", "tokens", "forwards", "scorer calls", "scorer ms"]
    lines = []
    for name, rows in found.items():
        shares = []
        for key in ("valid", "ok"):
            values = [row[key] for row in rows]
            shares.append(f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        costs = [statistics.fmean(row[key] for row in rows) for key in columns[3:]]
        lines.append((name, *shares, *(f"{cost:.0f}" for cost in costs)))
    return TextTable(
        f"{len(next(iter(found.values())))} seeds, {prompts} prompts each; costs for each prompt", columns, lines
    )


def verdict(found: dict[str, list[Row]]) -> str:
    """Return how the narrow beam compares with the two others, in words."""

    def mean(name: str, key: str) -> float:
        return statistics.fmean(row[key] for row in found[name])

    ours = "beam 8, prefixes, first"
    parts = [
        f"{100 * mean(ours, 'tokens') / mean(other, 'tokens'):.0f} % of the tokens of `{other}` ({mean(other, 'valid'):.2f} valid)"
        for other in ("beam 8", "beam 8, ends checked")
    ]
    return f"`{ours}` reaches {mean(ours, 'valid'):.2f} valid with {' and '.join(parts)}."


def goes_on(out: Path, about: dict[str, int], seeds: int) -> dict[str, list[Row]]:
    """Return each arm's rows, a seed after the other; seeds that a file of the same options holds are not run again."""
    makers, tokenizer = arms(), CharTokenizer()
    found: dict[str, list[Row]] = {name: [] for name in makers}
    if out.is_file():
        kept = json.loads(out.read_text())
        found = kept["rows"] if kept["about"] == about and kept["rows"].keys() == makers.keys() else found
    for seed in range(min(map(len, found.values())), seeds):
        model, prompts = trained(seed, about["steps"]), heads(about["prompts"], seed)
        for name, make in tqdm(makers.items(), desc=f"seed {seed}"):
            found[name].append(measured(make().decode(model, tokenizer, prompts)))
        write_text(out, json.dumps({"about": about, "rows": found}, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=220, help="of training")
    parser.add_argument("--out", default="benchmarks/results/grammar_search.json", help="where the figures go")
    parser.add_argument("--page", help="a page whose section is written")
    options = parser.parse_args()
    found = goes_on(Path(options.out), {"prompts": options.prompts, "steps": options.steps}, options.seeds)
    shown = table(found, options.prompts)
    shown.show(Console(width=150))
    text = f"{shown.markdown()}\n\n{verdict(found)}\n\nMade by `python benchmarks/grammar_search.py --page docs/decoding.md`."
    print(verdict(found))
    if options.page:
        write_section(Path(options.page), "grammar", text, heading="Decoding")


if __name__ == "__main__":
    main()

"""What scoring prompts costs, with what they share once and with every pair on its own, in turns; and what search gains.

SmolLM2-135M-Instruct (packaged) judges sentences of film reviews (Rotten Tomatoes). Tokens are exact counts of what goes
through the model, padding included. "alone" scores each pair in a forward of its own, as its tokens are.

``search`` compares strategies under one budget of tokens: the prompt is chosen on validation rows and tested once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightning_peft.budget import Budget, Usage
from lightning_peft.data.packaged import language_model, movie_reviews
from lightning_peft.files import write_text
from lightning_peft.prompts import (
    Bootstrap,
    Candidate,
    Coordinate,
    Halving,
    PromptSearch,
    PromptSpace,
    PromptTemplate,
    RandomSearch,
    Strategy,
    Verbalizer,
    label_log_probabilities,
)

SHOTS, TOKEN_TARGET = 8, 0.2
"""Demonstrations of the comparison of costs, and the most that the shared way may take of the tokens."""
SPLIT_SEED = 2024
INSTRUCTIONS = (
    "",
    "Classify the sentiment of the movie review.",
    "Is the review of the film positive or negative?",
    "Decide whether the critic liked the film.",
    "You read reviews. Say what the reviewer thinks of the film.",
    "Label each sentence.",
)
FORMS = (
    "Review: {text}\nSentiment: {answer}",
    "{text}\nIn short, the film is {answer}",
    "Text: {text}\nLabel: {answer}",
)
VERBALIZERS = (["negative", "positive"], ["bad", "good"], ["terrible", "great"])
STRATEGIES: dict[str, Strategy] = {
    "random": RandomSearch(6, 48),
    "halving": Halving(12, 16),
    "coordinate": Coordinate(2, 3, 48),
    "bootstrap": Bootstrap(6, 48),
}


def rows(sizes: list[int]) -> list[list[tuple[str, int]]]:
    """Return disjoint parts of the sentences, balanced as they come."""
    found = [(review.text, review.label) for review in movie_reviews() if review.source == "rotten_tomatoes"]
    random.Random(SPLIT_SEED).shuffle(found)
    parts = iter(found)
    return [[next(parts) for _ in range(size)] for size in sizes]


def space(examples: list[tuple[str, int]], shots: Any) -> PromptSpace:
    """Return what is searched; without the chat form, so that the forms act."""
    forms = [PromptTemplate(form, chat=False) for form in FORMS]
    return PromptSpace(
        forms,
        [Verbalizer(answers) for answers in VERBALIZERS],
        instructions=INSTRUCTIONS,
        examples=examples,
        shots=shots,
    )


def costs(model: Any, tokenizer: Any, count: int, rounds: int) -> dict[str, Any]:
    """Compare both ways of scoring; the first round warms up."""
    examples, asked = rows([SHOTS, count])
    template, verbalizer = space(examples, SHOTS).build(Candidate(0, 1, tuple(range(SHOTS)), 0))
    inputs, seconds, usage = [text for text, _ in asked], {"shared": [], "alone": []}, {}
    options = {"shared": {"batch_size": 32}, "alone": {"batch_size": 1, "share_prefix": False}}
    scores = {}
    for number in tqdm(range(-1, rounds), desc="costs"):
        for way in sorted(options, reverse=number % 2 == 0):
            spent, start = Usage(), time.perf_counter()
            scores[way] = label_log_probabilities(
                model, tokenizer, inputs, template, verbalizer, usage=spent, **options[way]
            )
            if number >= 0:
                seconds[way].append(time.perf_counter() - start)
            usage[way] = spent
    ratios = [one / other for one, other in zip(seconds["shared"], seconds["alone"], strict=True)]
    return {
        "rows": count,
        "shots": SHOTS,
        "tokens": {way: spent.tokens for way, spent in usage.items()},
        "forwards": {way: spent.forwards for way, spent in usage.items()},
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "time ratios": ratios,
        "largest difference": float((scores["shared"] - scores["alone"]).abs().max()),
    }


def searches(model: Any, tokenizer: Any, seeds: int, budget: int) -> list[dict[str, Any]]:
    """Run each strategy for each seed under one budget."""
    examples, train, validation, test = rows([32, 200, 150, 300])
    found = []
    jobs = [(name, seed) for seed in range(seeds) for name in STRATEGIES]
    for name, seed in tqdm(jobs, desc="searches"):
        search = PromptSearch(
            space(examples, (0, 2, 4)),
            STRATEGIES[name],
            rounds=20,
            seed=seed,
            calibration="batch",
            budget=Budget(max_tokens=budget),
        )
        report = search.run(model, tokenizer, train, validation, test)
        found.append({
            "strategy": name,
            "seed": seed,
            "validation": report.validation.accuracy,
            "test": report.test.accuracy if report.test else None,
            "gap": report.gap,
            "tokens": report.usage.tokens,
            "prompt": report.prompt.instruction,
            "shots": len(report.prompt.demonstrations),
            "stopped": report.stopped,
        })  # fmt: skip
    return found


def show(result: dict[str, Any]) -> None:
    """Print the targets and the table of strategies."""
    cost, console = result["costs"], Console()
    share = cost["tokens"]["shared"] / cost["tokens"]["alone"]
    faster = statistics.median(cost["time ratios"])
    table = Table("target", "limit", "found", "", title=f"{cost['shots']} demonstrations, {cost['rows']} inputs")
    table.add_row(
        "tokens, shared / alone", f"{TOKEN_TARGET}", f"{share:.3f}", "ok" if share <= TOKEN_TARGET else "missed"
    )
    table.add_row("time, shared / alone", "1", f"{faster:.3f}", "ok" if faster < 1 else "missed")
    table.add_row(
        "largest difference of scores",
        "1e-3",
        f"{cost['largest difference']:.1e}",
        "ok" if cost["largest difference"] < 1e-3 else "missed",
    )
    console.print(table)
    if result.get("searches"):
        table = Table("strategy", "validation", "test", "gap", "tokens", title="Search, mean over seeds")
        for name in STRATEGIES:
            own = [row for row in result["searches"] if row["strategy"] == name]
            cells = [statistics.mean(row[key] for row in own) for key in ("validation", "test", "gap", "tokens")]
            table.add_row(name, *(f"{value:.3f}" for value in cells[:3]), f"{cells[3]:,.0f}")
        console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="inputs of the comparison of costs (64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of it (3)")
    parser.add_argument("--seeds", type=int, default=0, help="seeds of the searches; 0 leaves them out (0)")
    parser.add_argument("--budget", type=int, default=150_000, help="tokens of a search (150000)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prompt_search.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = language_model()
    result: dict[str, Any] = {"costs": costs(model, tokenizer, options.rows, options.rounds)}
    if options.seeds:
        result["searches"] = searches(model, tokenizer, options.seeds, options.budget)
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()

"""How long the rungs of the ladder will take, from a measured forward."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_peft.old_task import untouched
from lightning_peft.recipes.ladder_bench import CALIBRATION_ROWS, TRAIN_JUDGED, Bench, Job
from lightning_peft.reporting import TextTable

OVERHEAD = 5.0
"""Seconds of a rung that no token explains: copies, files, single calls."""


@dataclass(frozen=True)
class Speed:
    """How fast rows go through a network: tokens of a row, seconds of a token, and how often a row is read to judge it."""

    tokens: float
    seconds: float
    readings: int = 1


def speed_of(bench: Bench, job: Job) -> Speed:
    """Measure a forward of a batch of rows, after one that warms up."""
    rows = bench.task.train[: bench.batch_size]
    texts = [text if job.encoder else bench.task.template().prompt(text, bench.tokenizer) for text, _ in rows]
    if bench.tokenizer.pad_token_id is None:
        bench.tokenizer.pad_token = bench.tokenizer.eos_token
    device = next(bench.network.parameters()).device
    batch = {
        name: value.to(device) for name, value in bench.tokenizer(texts, padding=True, return_tensors="pt").items()
    }
    kept = {} if job.encoder else {"logits_to_keep": 1}
    with torch.no_grad(), untouched(bench.network, device):
        for _ in range(2):
            start = time.perf_counter()
            bench.network(**batch, **kept)
            seconds = time.perf_counter() - start
    answers = [] if job.encoder else bench.task.verbalizer.tokens(bench.tokenizer, bench.task.template().gap())
    beginnings = {tokens[:-1] for one in answers for tokens in one}  # a last token is only looked up
    return Speed(batch["input_ids"].shape[1], seconds / batch["input_ids"].numel(), max(1, len(beginnings)))


def estimates(jobs: Sequence[Job], benches: Mapping[bool, tuple[Bench, float]]) -> dict[str, float]:
    """Return the seconds that each job will take, about."""
    speeds = {
        encoder: speed_of(bench, next(job for job in jobs if job.encoder == encoder))
        for encoder, (bench, _) in benches.items()
    }
    found = {}
    for job in jobs:
        bench, speed, task = benches[job.encoder][0], speeds[job.encoder], benches[job.encoder][0].task
        judged = len(task.validation) + len(task.test) + min(TRAIN_JUDGED, len(task.train))
        if job.rung == "prompt":
            tokens = (judged + CALIBRATION_ROWS) * speed.tokens * speed.readings
        elif job.rung == "probe":
            tokens = (judged + len(task.validation) + min(job.shots or len(task.train), len(task.train))) * speed.tokens
        else:
            looks = 0 if job.rung == "search" else bench.checks * len(task.validation)
            tokens = bench.budget + (judged + looks) * speed.tokens * speed.readings
        found[job.name] = OVERHEAD + tokens * speed.seconds
    return found


def show_estimates(found: Mapping[str, float]) -> None:
    """Print them, and their sum."""
    rows = [(name, f"{seconds / 60:.1f}") for name, seconds in found.items()]
    TextTable(
        "About how long it will take", ("rung", "minutes"), [*rows, ("together", f"{sum(found.values()) / 60:.0f}")]
    ).show()

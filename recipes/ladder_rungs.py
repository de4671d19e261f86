"""Each rung of the ladder, learned and measured: a row of the table."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_peft.recipes.ladder_bench import RUNGS, Bench, Job, Measured
from lightning_peft.recipes.ladder_probe import probe
from lightning_peft.recipes.ladder_prompts import hard_prompt
from lightning_peft.recipes.ladder_train import train


def run_job(job: Job, bench: Bench, before: float) -> Measured:
    """Learn and measure one rung; return its row.

    Args:
        job: Which.
        bench: What it works with.
        before: The loss, or the recall, on general text of the pretrained network.
    """
    pl.seed_everything(job.seed, verbose=False)
    ways = {"prompt": hard_prompt, "search": hard_prompt, "probe": probe}
    row = ways.get(job.rung, train)(job, bench, before)
    number, _, sees = RUNGS[job.rung]
    return {"arm": job.arm, "rung": number, "shots": job.shots or "all", "seed": job.seed, "white-box": sees, **row}

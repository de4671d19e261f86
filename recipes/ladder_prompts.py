"""The rungs of the ladder on which nothing trains: a prompt written by hand, and one that is searched for."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from lightning_peft import Budget, PromptTemplate, Verbalizer
from lightning_peft.files import write_text
from lightning_peft.prompts import Halving, PromptSearch, ScoreCache, label_log_probabilities, leaning
from lightning_peft.recipes.ladder_bench import CALIBRATION_ROWS, Bench, Job, Measured, judged, labels_said
from lightning_peft.recipes.ladder_measures import PeakMemory, call_seconds, language_loss, prompt_length
from lightning_peft.recipes.ladder_task import Row

DEMONSTRATIONS = 4


def hard_prompt(job: Job, bench: Bench, before: float) -> Measured:
    """Measure a prompt: written by hand, or searched for."""
    task, rows, memory = bench.task, bench.task.labelled(job.shots, job.seed), PeakMemory()
    began = time.perf_counter()
    if job.rung == "prompt":
        space = task.space(rows, [min(DEMONSTRATIONS, len(rows))])
        shown = space.draw_demonstrations(random.Random(f"{job.seed} demonstrations"))
        first = replace(space.draw(random.Random(0)), form=0, instruction=0, demonstrations=shown, verbalizer=0)
        about: Measured = {}
        template, verbalizer = space.build(first)
    else:
        template, verbalizer, about = searched(job, bench, rows)
    texts = [text for text, _ in rows[:CALIBRATION_ROWS]]
    model, tokenizer = bench.network, bench.tokenizer
    lean = leaning(
        "batch", lambda some: label_log_probabilities(model, tokenizer, some, template, verbalizer), template, texts
    )
    seconds, peak = time.perf_counter() - began, memory.read()
    text = task.test[0][0]
    saved = write_text(bench.out / "saved" / f"{job.name}.txt", template.prompt(text, tokenizer))
    return {
        **judged(lambda some: labels_said(bench, model, some, (template, verbalizer), lean=lean), task, rows),
        "trainable": 0,
        "stored bytes": saved.stat().st_size,
        "seconds": seconds,
        "peak memory": peak,
        "step ms": None,
        "call ms": 1e3 * call_seconds(
            lambda one: label_log_probabilities(model, tokenizer, [one], template, verbalizer), [row[0] for row in task.test[:10]]
        ),
        "extra tokens": prompt_length(template, text, tokenizer) - prompt_length(task.template(), text, tokenizer),
        "forgotten attached": language_loss(model, tokenizer, task.general, template) - before,
        "forgotten detached": 0.0,
        "mergeable": "no",
        **about,
    }  # fmt: skip


def searched(job: Job, bench: Bench, rows: Sequence[Row]) -> tuple[PromptTemplate, Verbalizer, Measured]:
    """Search for a prompt; all that is spent, validation included, is inside the budget."""
    shown = rows[: max(8, len(rows) // 4)]
    search = PromptSearch(
        bench.task.space(shown, (0, 2, 4)),
        Halving(12, 16),
        rounds=50,
        budget=Budget(max_tokens=bench.budget),
        validated=2,
        calibration="batch",
        calibration_rows=min(CALIBRATION_ROWS, len(rows)),
        seed=job.seed,
    )
    cache = ScoreCache(bench.out / "scores.sqlite")
    report = search.run(bench.network, bench.tokenizer, rows, bench.task.validation, cache=cache)
    about = {
        "search tokens": report.usage.tokens,
        "candidates": sum(map(len, report.rounds)),
        "compared on validation": report.chosen_among,
        "prompt": report.prompt.instruction,
        "stopped": report.stopped,
    }
    return report.prompt, report.verbalizer, about

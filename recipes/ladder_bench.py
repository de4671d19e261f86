"""What the rungs of the ladder share: their names, a job, what it works with, and how it is judged."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_peft import PromptTemplate, Verbalizer
from lightning_peft.adapters.fingerprint import fingerprint, fingerprint_to_plain
from lightning_peft.data.content_digest import key_of
from lightning_peft.prompts import label_log_probabilities
from lightning_peft.recipes.ladder_task import LadderTask, Row

Kind = Literal["prompt", "search", "soft_prompt", "prefix", "probe", "lora", "full"]
RUNGS: dict[Kind, tuple[str, str, str]] = {
    "prompt": ("0", "a prompt written by hand, four demonstrations, batch calibration", "scores"),
    "search": ("0.25", "a prompt found by successive halving under the budget, chosen on validation rows", "scores"),
    "soft_prompt": ("0.5", "20 trained embeddings before the input (`SoftPrompt`)", "gradients"),
    "prefix": ("0.75", "20 trained keys and values in every layer (`KVPrefix`)", "gradients"),
    "probe": (
        "1",
        "logistic regression on the best layer's frozen features (`FeatureCache`, `fit_linear`)",
        "hidden states",
    ),
    "lora": ("1.5", "low-rank updates of all linear layers (`LoRA`)", "gradients"),
    "full": ("2", "everything trains", "gradients"),
}
"""Number, what it is, and what of the network it needs to see."""
BACKWARD = 3
"""A training token counts as so many forwards: a backward is two. Kaplan et al. 2020, arXiv:2001.08361, section 2.1."""
CALIBRATION_ROWS = 50
"""Training texts of batch calibration."""
TRAIN_JUDGED = 200
"""Most training rows on which accuracy is measured."""
Measured = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Args:
        rung: Which rung.
        model: What the model is called.
        encoder: Whether the model is a sentence encoder with a head.
        shots: Labelled rows; None is all.
        seed: Which rows, their order, demonstrations, initial values.
    """

    rung: Kind
    model: str
    encoder: bool
    shots: int | None
    seed: int

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.arm}, {self.shots or 'all'} rows, seed {self.seed}"

    @property
    def slug(self) -> str:
        """What its folder of logs is called."""
        return self.name.replace(", ", "-").replace(" ", "_")

    @property
    def arm(self) -> str:
        """What the rung is called in tables."""
        return f"{self.rung} (encoder)" if self.encoder else self.rung


@dataclass
class Bench:
    """What all rungs of one model share.

    Args:
        task: The rows.
        network: The pretrained network; each rung that changes it takes a copy.
        tokenizer: The network's.
        budget: Forward tokens of learning; a training token counts as three.
        batch_size: Rows of a training step.
        out: Folder for logs, caches and what is saved.
        trainer: Options of every Trainer: accelerator, devices, strategy, precision.
        checks: Validations of a training.
    """

    task: LadderTask
    network: Any
    tokenizer: Any
    budget: int
    batch_size: int
    out: Path
    trainer: dict[str, Any]
    checks: int = 4

    @cached_property
    def network_key(self) -> str:
        """Which network this is, by its weights: nothing here changes them."""
        return key_of(fingerprint_to_plain(fingerprint(self.network)))

    def steps(self, lengths: Sequence[int], extra: int = 0) -> int:
        """Return how many training steps the budget pays for, of rows of such lengths and so many virtual tokens."""
        chance = random.Random(0)
        drawn = [
            max(chance.choices(lengths, k=self.batch_size)) for _ in range(200)
        ]  # a batch is as long as its longest row
        return max(self.checks, round(self.budget / (BACKWARD * self.batch_size * (sum(drawn) / len(drawn) + extra))))


def labels_said(
    bench: Bench,
    model: Any,
    rows: Sequence[Row],
    prompt: tuple[PromptTemplate, Verbalizer],
    *,
    lean: Tensor | float = 0.0,
) -> list[int]:
    """Return the most probable label of each text."""
    scores = label_log_probabilities(model, bench.tokenizer, [text for text, _ in rows], *prompt) - lean
    found: list[int] = scores.argmax(1).tolist()
    return found


def judged(say: Callable[[Sequence[Row]], list[int]], task: LadderTask, train: Sequence[Row]) -> Measured:
    """Return accuracies on all three kinds of rows, and which test rows were right."""
    hits = {
        name: [int(said == label) for said, (_, label) in zip(say(rows), rows, strict=True)]
        for name, rows in (("validation", task.validation), ("test", task.test), ("train", train[:TRAIN_JUDGED]))
    }
    shares = {name: sum(found) / len(found) for name, found in hits.items()}
    return {
        "accuracy": shares["test"],
        "validation": shares["validation"],
        "train": shares["train"],
        "gap": shares["validation"] - shares["test"],
        "hits": "".join(map(str, hits["test"])),
    }

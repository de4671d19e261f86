"""What the main job learns from and is judged by: review sentences, and pairs of texts for the old skills."""

from __future__ import annotations

import ast
import csv
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.data.packaged import Review, human_eval, movie_reviews

TOKENS = 64  # 50 words of a review
CODE_TOKENS = 128
SPLIT_SEED = 2024  # the split is fixed: --seed changes training, never which rows are test rows
Pair = tuple[str, str]


class SentimentData(pl.LightningDataModule):
    """Rotten Tomatoes rows split into train, validation and test; IMDB reviews cut into halves as old skill.

    The pairs that are reported (500), those behind the curves (100), the memory (5,500) and those of validation (300)
    are disjoint, and come from another source than the sentiment rows. With each pair of the memory stands a text of
    random tokens, as anchor.

    Args:
        tokenizer: Tokenizer of the encoder.
        data: CSV file or hub id of labelled rows; unset, Rotten Tomatoes.
        batch_size: Labelled rows in a batch.
        rows: What is measured after training. "test": test rows, the reported pairs, HumanEval. "validation": validation
            rows, other pairs, docstrings of Python's standard library; nothing that is reported is looked at.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: str | None = None,
        *,
        batch_size: int = 32,
        rows: Literal["test", "validation"] = "test",
    ) -> None:
        super().__init__()
        self.tokenizer, self.batch_size, self.judged_by = tokenizer, batch_size, rows
        reviews = movie_reviews()
        rated = read_rows(data) if data else [row for row in reviews if row.source == "rotten_tomatoes"]
        labelled = [(row.text, row.label) for row in rated]
        random.Random(SPLIT_SEED).shuffle(labelled)
        if len(labelled) < 3500:
            raise ValueError(f"sentiment: data={data!r} has {len(labelled)} rows; 3,500 are needed at least.")
        self.test, self.validation, self.train = labelled[:2000], labelled[2000:3000], labelled[3000:]
        halves = [half_pair(row.text) for row in reviews if row.source == "imdb" and len(row.text.split()) >= 100]
        random.Random(SPLIT_SEED).shuffle(halves)
        self.guard, self.rehearsed = halves[500:600], halves[600:6100]
        self.halves = halves[:500] if rows == "test" else halves[6100:6400]

    @cached_property
    def code(self) -> list[Pair]:
        """Pairs of a docstring and its code, on which the skill is judged that nothing replays."""
        return [code_pair(problem) for problem in human_eval()] if self.judged_by == "test" else stdlib_pairs(300)

    @cached_property
    def memory(self) -> list[tuple[str, str, str]]:
        """Pairs to rehearse, each with a text of random tokens; only arms with replay or anchor ask for it."""
        texts = random_texts(self.tokenizer, len(self.rehearsed))
        return [(*pair, text) for pair, text in zip(self.rehearsed, texts, strict=True)]

    def rows(self, rows: list[tuple[str, int]], *, shuffle: bool = False) -> DataLoader[Any]:
        """Return labelled rows in batches of tokens."""
        return DataLoader(rows, self.batch_size, shuffle=shuffle, collate_fn=LabelledBatch(self.tokenizer))  # type: ignore[arg-type]

    def texts(self, rows: Sequence[tuple[str, ...]], tokens: int = TOKENS) -> DataLoader[Any]:
        """Return rows of several texts in batches of tokens, one batch for each place in a row."""
        return DataLoader(rows, 50, collate_fn=TextsBatch(self.tokenizer, tokens))  # type: ignore[arg-type]

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self.rows(self.train, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.rows(self.validation[:320])  # for the curves; all of them only where a learning rate is chosen

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.rows(self.test if self.judged_by == "test" else self.validation)


@dataclass
class LabelledBatch:
    """Collate (text, label) rows into tokens and labels."""

    tokenizer: Any

    def __call__(self, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        """Tokenise, padded to the longest row."""
        tokens = tokenize(self.tokenizer, [text for text, _ in rows], TOKENS)
        return {**tokens, "labels": torch.tensor([label for _, label in rows])}


@dataclass
class TextsBatch:
    """Collate rows of several texts, such as pairs, into as many batches of tokens."""

    tokenizer: Any
    tokens: int

    def __call__(self, rows: list[tuple[str, ...]]) -> tuple[dict[str, Tensor], ...]:
        """Tokenise each place of the rows."""
        return tuple(tokenize(self.tokenizer, texts, self.tokens) for texts in zip(*rows, strict=True))


def tokenize(tokenizer: Any, texts: Any, tokens: int) -> dict[str, Tensor]:
    """Return token ids and mask, cut to ``tokens`` and padded to the longest."""
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=tokens, return_tensors="pt"))


def half_pair(text: str) -> Pair:
    """Return the first 50 words of a text and its next 50."""
    words = text.split()
    return " ".join(words[:50]), " ".join(words[50:100])


def code_pair(problem: dict[str, str]) -> Pair:
    """Return the docstring of a HumanEval problem and its solution."""
    docstrings = re.findall(r"(\"\"\"|''')(.*?)\1", problem["prompt"], re.DOTALL)
    return docstrings[-1][1].strip(), problem["canonical_solution"]


def stdlib_pairs(count: int) -> list[Pair]:
    """Return docstrings of functions of Python's standard library and their bodies: what HumanEval asks, on other code.

    Args:
        count: How many; the same ones every time under one version of Python.
    """
    files = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    texts = [file.read_text(encoding="utf-8") for file in files]
    pairs = sorted({pair for text in texts for pair in functions_of(text)})
    return random.Random(SPLIT_SEED).sample(pairs, count)


def functions_of(source: str) -> Iterator[Pair]:
    """Yield docstring and body of every function whose docstring has ten words and whose body has four statements."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 4:
            docstring = (ast.get_docstring(node) or "").split()
            if len(docstring) >= 10:
                yield " ".join(docstring), "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])


def random_texts(tokenizer: Any, count: int) -> list[str]:
    """Return texts of 16 to 60 tokens drawn evenly from the vocabulary: no data, and every word may come."""
    chance, tokens = random.Random(SPLIT_SEED), tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ordinary = [number for number, token in enumerate(tokens) if not token.startswith(("[", "<"))]  # not [PAD], <s>
    return [tokenizer.decode(chance.choices(ordinary, k=chance.randint(16, 60))) for _ in range(count)]


def read_rows(data: str) -> list[Review]:
    """Read labelled rows from a CSV file, or from the hub.

    Raises:
        ValueError: If there is neither, or the columns are not there.
    """
    if Path(data).suffix == ".csv":
        with Path(data).open(encoding="utf-8", newline="") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    else:
        try:
            from datasets import load_dataset  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ValueError(
                f"sentiment: data={data!r} is no .csv file, and hub data sets need the extra: "
                "pip install 'lightning-peft[hub]'."
            ) from error
        rows = list(load_dataset(data, split="train"))
    if not rows or not {"text", "label"} <= rows[0].keys():
        raise ValueError(f"sentiment: data={data!r} needs the columns text and label; it has {list(rows[:1])}.")
    return [Review(row["text"], int(row["label"]), data) for row in rows]

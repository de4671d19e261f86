"""Labelled texts from files, packages or the hub, divided into training, validation and test rows."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_peft.data.packaged import movie_reviews

Text = tuple[str, str]
"""A text and the name of its class."""
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "dev": "validation", "test": "test"}
"""What a source may call its parts, and what they are used for; others (CLINC150's ``oos_*``) are left out."""
SPLIT_SEED = 2024  # the split is fixed: a seed changes training, never which rows are test rows
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence", "question", "utterance"), ("label", "intent", "class", "category")


def read_source(source: str) -> list[tuple[str, dict[str, list[Text]]]]:
    """Return what a source holds: named sets of texts by use, each with ``train``, ``validation`` and ``test``.

    Raises:
        ValueError: For a file that holds no labelled texts.
        FileNotFoundError: For what is neither a file nor a hub id.
    """
    if source == "movie_reviews":
        kinds = {"rotten_tomatoes": "sentences", "imdb": "reviews"}
        words = ("negative", "positive")
        reviews = movie_reviews()
        return [
            (name, _split({"train": [(row.text, words[row.label]) for row in reviews if row.source == kind]}))
            for kind, name in kinds.items()
        ]
    path = Path(source)
    if path.is_file():
        return [(path.stem, _split(read_file(path)))]
    if path.suffix or source.count("/") > 1:
        raise FileNotFoundError(
            f"read_source: data={source!r} is not there. Give a .json, .jsonl or .csv file with texts and labels, a hub id, or "
            "movie_reviews, which needs no network."
        )
    return [(source, _split(read_hub(source)))]


def read_file(path: Path) -> dict[str, list[Text]]:
    """Return the texts of a file by split.

    A JSON file is CLINC150's (``{"train": [[text, label], ...], "val": ..., "test": ...}``) or a list of rows; ``.jsonl`` and
    ``.csv`` have a row per line with ``text``, ``label`` and, if they like, ``split``.

    Raises:
        ValueError: For another file name, or rows that lack a text or a label.
    """
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as stream:
            return _by_split(csv.DictReader(stream), path)
    lines = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return _by_split((json.loads(line) for line in lines.splitlines() if line.strip()), path)
    if path.suffix != ".json":
        raise ValueError(f"read_source: {path} must be a .json, .jsonl or .csv file.")
    found = json.loads(lines)
    if isinstance(found, list):
        return _by_split(found, path)
    return {SPLITS[name]: [_text(row, path) for row in rows] for name, rows in found.items() if name in SPLITS}


def read_hub(name: str) -> dict[str, list[Text]]:
    """Return a data set of the hub by split; ``owner/name:config`` names a configuration.

    Raises:
        ImportError: Without the package ``datasets``.
    """
    try:
        from datasets import load_dataset  # noqa: PLC0415 - an extra
    except ImportError as missing:
        raise ImportError(
            f"read_source: data={name!r} is no file, and for the hub the package datasets is missing. Run: pip install "
            "'lightning-peft[hub]', or give a file."
        ) from missing
    owner, _, config = name.partition(":")
    found: dict[str, list[Text]] = {}
    for split, rows in load_dataset(owner, config or None).items():
        if split in SPLITS:
            label = next((column for column in LABEL_COLUMNS if column in rows.features), None)
            names = getattr(rows.features.get(label), "names", None)
            texts = [_text(row, Path(name)) for row in rows]
            found[SPLITS[split]] = [(text, names[int(number)]) for text, number in texts] if names else texts
    return found


def _by_split(rows: Iterable[Any], path: Path) -> dict[str, list[Text]]:
    found: dict[str, list[Text]] = {}
    for row in rows:
        split = row.get("split", "train") if isinstance(row, Mapping) else "train"
        if split in SPLITS:
            found.setdefault(SPLITS[split], []).append(_text(row, path))
    return found


def _text(row: Any, path: Path) -> Text:
    if isinstance(row, Mapping):
        columns = [next((name for name in names if name in row), None) for names in (TEXT_COLUMNS, LABEL_COLUMNS)]
        if None not in columns:
            return str(row[columns[0]]), str(row[columns[1]])
    elif isinstance(row, list | tuple) and len(row) == 2:
        return str(row[0]), str(row[1])
    raise ValueError(
        f"read_source: {path} has the row {row!r:.120}; a row is [text, label], or has one of {TEXT_COLUMNS} and one of "
        f"{LABEL_COLUMNS}."
    )


def _split(found: dict[str, list[Text]]) -> dict[str, list[Text]]:
    """Give every set its three uses; what a source does not divide is divided here, a fifth for each missing use."""
    if not found.get("train"):
        raise ValueError(f"read_source: a source has no training rows, only {sorted(found)}.")
    train = list(dict.fromkeys(found["train"]))
    random.Random(SPLIT_SEED).shuffle(train)
    share = len(train) // 5
    parts = dict(found)
    for use in ("validation", "test"):
        if not parts.get(use):
            parts[use], train = train[:share], train[share:]
    known = {text for text, _ in train}
    return {
        "train": train,
        **{use: [row for row in parts[use] if row[0] not in known] for use in ("validation", "test")},
    }

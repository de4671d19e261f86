"""A prompt: an instruction, solved examples, and a form with slots for the input and its answer."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ANSWER = "answer"
"""The slot of the answer."""
Row = str | Mapping[str, str]
"""An input: its text where the form has one slot for inputs, else the text of each slot."""


@dataclass(frozen=True)
class Demonstration:
    """An example that is solved in the prompt.

    Args:
        slots: The text of each slot, as pairs.
        answer: Its answer.
    """

    slots: tuple[tuple[str, str], ...]
    answer: str


@dataclass(frozen=True)
class PromptTemplate:
    r"""A prompt as plain, frozen data: an instruction, demonstrations in their order, and the form that each example takes.

    Without a chat template the prompt is ``instruction``, the demonstrations and the input, with ``separator`` between. With one,
    the instruction is the system's message and every demonstration a turn of user and assistant.

    The form ends with ``{answer}``, but for masked language models, where it may stand anywhere. Blanks before it belong to
    the answer: tokenizers make one token of a word and the blank before it.

    Args:
        form: Text with slots: ``{answer}`` and at least one for the input. Braces of the text itself are doubled.
        instruction: What shall be done; may be empty.
        demonstrations: Solved examples; :meth:`with_demonstrations` makes them of rows.
        separator: Stands between the parts.
        chat: Whether to use the tokenizer's chat template; unset, where it has one.
        max_slot_tokens: A longer text of a slot is cut after so many tokens; unset, none is.

    Raises:
        ValueError: For a form without ``{answer}`` or without an input, with an unnamed slot, or a demonstration that lacks one.

    >>> template = PromptTemplate("Review: {text}\nSentiment: {answer}", instruction="Judge the review.")
    >>> solved = template.with_demonstrations([("a joy", "positive")])
    >>> print(solved.prompt("too long"))
    Judge the review.
    <BLANKLINE>
    Review: a joy
    Sentiment: positive
    <BLANKLINE>
    Review: too long
    Sentiment:
    >>> solved.gap()
    ' '
    """

    form: str = "Input: {text}\nAnswer: {answer}"
    instruction: str = ""
    demonstrations: tuple[Demonstration, ...] = ()
    separator: str = "\n\n"
    chat: bool | None = None
    max_slot_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the form and what fills it."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.form) if name is not None]
        if names.count(ANSWER) != 1 or self.form.count("{answer}") != 1 or len(names) < 2:
            raise ValueError(
                f"PromptTemplate: form={self.form!r} needs {{answer}} once and a slot for the input, for instance {{text}}."
            )
        if wrong := [name for name in names if not name.isidentifier()]:
            raise ValueError(f"PromptTemplate: the slot {wrong[0]!r} of form={self.form!r} must be a plain name.")
        object.__setattr__(self, "demonstrations", tuple(self.demonstrations))
        for number, demonstration in enumerate(self.demonstrations):
            if missing := set(self.slots) - {name for name, _ in demonstration.slots}:
                raise ValueError(
                    f"PromptTemplate: demonstration {number} lacks the slot {min(missing)!r} of {self.form!r}."
                )
        if self.max_slot_tokens is not None and self.max_slot_tokens < 1:
            raise ValueError(f"PromptTemplate: max_slot_tokens={self.max_slot_tokens!r} must be at least 1.")

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots of the input, in the form's order."""
        names = (name for _, name, _, _ in string.Formatter().parse(self.form))
        return tuple(dict.fromkeys(name for name in names if name not in (None, ANSWER)))

    def with_demonstrations(self, examples: Sequence[tuple[Row, str]]) -> PromptTemplate:
        """Return the template with these examples, ``(input, answer)``, in the place of its demonstrations."""
        made = tuple(Demonstration(tuple(self.filled(row).items()), answer) for row, answer in examples)
        return replace(self, demonstrations=made)

    def filled(self, row: Row) -> dict[str, str]:
        """Return the text of each slot for an input.

        Raises:
            ValueError: If a slot has no text.
        """
        if isinstance(row, str):
            if len(self.slots) > 1:
                raise ValueError(
                    f"PromptTemplate: the form has the slots {', '.join(self.slots)}, so a row must be a mapping, not {row[:60]!r}."
                )
            return {self.slots[0]: row}
        if missing := [name for name in self.slots if not isinstance(row.get(name), str)]:
            raise ValueError(f"PromptTemplate: the row {dict(row)!r} has no text for the slot {missing[0]!r}.")
        return {name: row[name] for name in self.slots}

    def parts(self) -> tuple[str, str]:
        """Return the form before and after the answer, without the blanks around it."""
        before, after = self.form.split("{" + ANSWER + "}")
        return before.rstrip(), after

    def gap(self, tokenizer: Any = None) -> str:
        """Return what stands between prompt and answer: the blanks before ``{answer}``; nothing in a chat."""
        before = self.form.split("{" + ANSWER + "}")[0]
        return "" if self.chats(tokenizer) else before[len(before.rstrip()) :]

    def chats(self, tokenizer: Any) -> bool:
        """Whether the prompt takes the tokenizer's chat form.

        Raises:
            ValueError: If it should, and the tokenizer has none.
        """
        has = bool(getattr(tokenizer, "chat_template", None))
        if self.chat and not has:
            raise ValueError(
                "PromptTemplate: chat=True, and the tokenizer has no chat template. Leave chat unset, or give a chat model."
            )
        return has if self.chat is None else self.chat

    def masked(self, row: Row, masks: str, tokenizer: Any = None) -> str:
        """Return the prompt of an input for a model that fills in masks, with these in the place of the answer."""
        return self._written(self.form.format(**self._cut(self.filled(row), tokenizer), answer=masks))

    def prompt(self, row: Row, tokenizer: Any = None) -> str:
        """Return the prompt of an input, up to where its answer begins.

        Args:
            row: The input.
            tokenizer: The model's; needed for its chat form and for ``max_slot_tokens``.

        Raises:
            ValueError: For a form that does not end with the answer.
        """
        if self.parts()[1].strip():
            raise ValueError(
                f"PromptTemplate: form={self.form!r} must end with {{answer}}; text behind it is for models that fill in masks."
            )
        asked = self.parts()[0].format(**self._cut(self.filled(row), tokenizer))
        if not self.chats(tokenizer):
            return self._written(asked)
        turns = [{"role": "system", "content": self.instruction}] if self.instruction else []
        for one in self.demonstrations:
            turns.append({"role": "user", "content": self.parts()[0].format(**dict(one.slots))})
            turns.append({"role": "assistant", "content": one.answer})
        turns.append({"role": "user", "content": asked})
        found: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return found

    def _written(self, asked: str) -> str:
        """Return instruction, demonstrations and what is asked, one after the other."""
        whole = [self.form.format(**dict(one.slots), answer=one.answer) for one in self.demonstrations]
        return self.separator.join([*filter(None, [self.instruction]), *whole, asked])

    def _cut(self, slots: dict[str, str], tokenizer: Any) -> dict[str, str]:
        if self.max_slot_tokens is None:
            return slots
        if tokenizer is None:
            raise ValueError("PromptTemplate: max_slot_tokens needs the tokenizer. Pass it to prompt(row, tokenizer).")
        return {name: self._cut_text(text, tokenizer) for name, text in slots.items()}

    def _cut_text(self, text: str, tokenizer: Any) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= (self.max_slot_tokens or 0):
            return text
        cut: str = tokenizer.decode(ids[: self.max_slot_tokens])
        return cut

"""Words for labels: what a language model says when it means one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Verbalizer:
    """The answers that stand for each label; the first answer of a label is the one that demonstrations show.

    Args:
        answers: Answers in the order of the labels: ``["negative", "positive"]``, or for several answers of a label
            ``[["bad", "poor"], ["good"]]``; a mapping gives the labels names.
        length: How an answer of several tokens counts. ``"sum"``: by its probability, the sum of the log-probabilities of its
            tokens, so that a longer one counts less. ``"mean"``: by the mean over its tokens.

    Raises:
        ValueError: For fewer than two labels, a label without an answer, an empty answer, or one that two labels share.

    >>> Verbalizer({"no": "false", "yes": ["true", "right"]})
    Verbalizer(answers=(('false',), ('true', 'right')), labels=('no', 'yes'), length='sum')
    """

    answers: Any
    labels: tuple[str, ...] = ()
    length: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        """Bring the answers into one form and check them."""
        given: Mapping[str, Any] | Sequence[Any] = self.answers
        values = list(given.values()) if isinstance(given, Mapping) else list(given)
        answers = tuple((value,) if isinstance(value, str) else tuple(value) for value in values)
        labels = tuple(map(str, given)) if isinstance(given, Mapping) else self.labels
        object.__setattr__(self, "answers", answers)
        object.__setattr__(self, "labels", tuple(labels) or tuple(one[0] for one in answers if one))
        if self.length not in ("sum", "mean"):
            raise ValueError(f"Verbalizer: length={self.length!r} must be 'sum' or 'mean'.")
        if len(answers) < 2 or len(self.labels) != len(answers) or not all(answers):
            raise ValueError(
                f"Verbalizer: answers={self.answers!r} must name at least two labels, each with at least one answer."
            )
        flat = [answer for one in answers for answer in one]
        if wrong := [
            answer for answer in flat if not isinstance(answer, str) or not answer.strip() or answer != answer.strip()
        ]:
            raise ValueError(f"Verbalizer: the answer {wrong[0]!r} must be a text without blanks around it.")
        if twice := [answer for answer in flat if flat.count(answer) > 1]:
            raise ValueError(f"Verbalizer: the answer {twice[0]!r} stands twice; each must mean one label.")

    def __len__(self) -> int:
        return len(self.answers)

    def shown(self, label: int) -> str:
        """Return the answer that demonstrations of a label show."""
        found: str = self.answers[label][0]
        return found

    def tokens(self, tokenizer: Any, gap: str = "") -> list[list[Tokens]]:
        """Return the tokens of every answer, by label.

        Args:
            tokenizer: The model's.
            gap: What stands between prompt and answer.

        Raises:
            ValueError: If the tokens of two labels' answers are the same, or one has none.
        """
        found = [
            [tuple(tokenizer(gap + answer, add_special_tokens=False)["input_ids"]) for answer in answers]
            for answers in self.answers
        ]
        flat = [tokens for answers in found for tokens in answers]
        if () in flat or len(set(flat)) < len(flat):
            raise ValueError(
                f"Verbalizer: to this tokenizer two of the answers {self.answers!r} are the same, or one is nothing."
            )
        return found

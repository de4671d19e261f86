"""What a decoder hands back: texts, their scores, what they cost, and every text that was found on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lightning_peft.budget import Usage
from lightning_peft.decoding.draft import Draft


@dataclass(frozen=True)
class Candidate:
    """One text that was written after a prompt.

    Args:
        draft: Prompt and text.
        score: What it was ranked by: the final scorer's value where it gave one, else the decoder's own.
        logprob: Sum of its tokens' log-probabilities under the model, the end's included.
        finished: Whether it ended by itself; else it was cut by a limit or is dead.
        viable: Whether no scorer has ruled it out.
        ids: Its tokens, the end's included.
        judged: Whether ``score`` is the final scorer's.
    """

    draft: Draft
    score: float
    logprob: float
    finished: bool
    viable: bool
    ids: tuple[int, ...]
    judged: bool = False

    @property
    def text(self) -> str:
        """What was written, without the prompt."""
        return self.draft.completion

    def scored(self, score: float) -> Candidate:
        """Return it with another score."""
        return replace(self, score=score)

    @property
    def tokens(self) -> int:
        """Positions that went through the model for it: its last token did not have to."""
        return max(0, len(self.ids) - 1)


@dataclass(frozen=True)
class DecodeResult:
    """What was found for each prompt.

    Args:
        texts: The best text of each prompt, without the prompt.
        scores: Its score.
        usage: What each prompt has cost. ``tokens`` are rows times forwards after the prompt, ``prompt_tokens`` the prompt's
            positions with padding, ``scorer_calls`` questions to scorers, ``cached`` those answered from memory; ``seconds``
            are shared evenly by the prompts of a step.
        pool: All candidates of each prompt, best first.
        stopped: The limit of the budget that stopped each prompt's search; None where it ended by itself.
        num_return: How many of each pool are asked for.
    """

    texts: list[str]
    scores: list[float]
    usage: list[Usage]
    pool: list[list[Candidate]]
    stopped: list[str | None]
    num_return: int = 1

    @property
    def best(self) -> list[Candidate]:
        """The best candidate of each prompt."""
        return [pool[0] for pool in self.pool]

    @property
    def n_best(self) -> list[list[Candidate]]:
        """The ``num_return`` best candidates of each prompt, or as many as there are."""
        return [pool[: self.num_return] for pool in self.pool]


class Decoder(Protocol):
    """Anything that writes texts after prompts."""

    def decode(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Return texts, their scores and what they cost."""
        ...


def result_of(
    pools: list[list[Candidate]], usage: list[Usage], stopped: list[str | None], num_return: int = 1
) -> DecodeResult:
    """Return pools, best first, as a result."""
    best = [pool[0] for pool in pools]
    return DecodeResult([one.text for one in best], [one.score for one in best], usage, pools, stopped, num_return)

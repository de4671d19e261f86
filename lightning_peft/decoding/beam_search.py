"""Beam search whose beams an external scorer may judge, with an exact account of what was spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.budget import Budget
from lightning_peft.decoding.beams import Problem, SearchState
from lightning_peft.decoding.draft import Scorer
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.prompts import Prompts, end_tokens, read_prompts
from lightning_peft.decoding.result import DecodeResult, Hypothesis, best_first, result_of
from lightning_peft.decoding.rows import reading

NO_LIMIT = Budget()


@dataclass(frozen=True)
class BeamSearch:
    """Keep the best ``num_beams`` texts under way, judged by the model and by scorers of your own.

    Every step takes the ``num_beams * expand`` likeliest continuations, asks the partial scorer about those alone, drops the dead,
    and keeps the best by

        ``log p / length ** length_penalty + weight * partial(text)``

    with the partial value taken anew, never summed over steps. Dead texts so do not starve the beam, and the scorer sees a few
    texts where a processor of logits sees the vocabulary. Without scorers it is the beam search of transformers, token for token.

    **The trap:** a scorer with ``finished`` is asked before an end token may end a text; without it, an end token in the middle
    of a bracket ends it.

    Args:
        num_beams: Texts that are kept.
        expand: Continuations that are judged for each of them; at least 2, so that an end token does not take a place.
        partial: Judges texts under way; ``-inf`` drops them.
        final: Judges texts that ended, and chooses among them.
        weight: Of the partial value beside the log-probability per token.
        lookahead: Tokens that each continuation is rolled out greedily before the partial scorer sees it.
        length_penalty: Exponent of the length in the score; 0 compares sums.
        early_stopping: True ends a search with ``num_beams`` finished texts; False also when none under way is better than the
            worst of them at its present length; ``"never"`` only when none could become better at any length.
        max_new_tokens: Longest text.
        check_every: Ask the partial scorer at every token, or at those that end a line and at the end of the text.
        budget: What a single prompt may cost; the search then gives the best text so far.
        batch_size: Prompts searched at once.

    Raises:
        ValueError: For settings out of range.
    """

    num_beams: int = 8
    expand: int = 3
    partial: Scorer | None = None
    final: Scorer | None = None
    weight: float = 1.0
    lookahead: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    max_new_tokens: int = 128
    check_every: Literal["token", "line"] = "token"
    budget: Budget = NO_LIMIT
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, least in (
            ("num_beams", 1),
            ("expand", 2),
            ("lookahead", 0),
            ("max_new_tokens", 1),
            ("batch_size", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"BeamSearch: {name}={value!r} must be a whole number of at least {least}.")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"BeamSearch: early_stopping={self.early_stopping!r} must be True, False or 'never'.")
        if self.check_every not in ("token", "line"):
            raise ValueError(f"BeamSearch: check_every={self.check_every!r} must be 'token' or 'line'.")
        if self.lookahead and self.partial is None:
            raise ValueError(f"BeamSearch: lookahead={self.lookahead} is for a partial scorer. Give partial=.")

    def decode(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Search after each prompt.

        Args:
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            prompts: Texts to go on with.
        """
        found: list[Problem] = []
        with reading(model):
            for start in range(0, len(prompts), self.batch_size):
                part = read_prompts(model, tokenizer, prompts[start : start + self.batch_size], start)
                found += self._searched(model, part)
        return result_of([p.pool for p in found], [p.usage for p in found], [p.stopped for p in found])

    def as_custom_generate(self, tokenizer: Any) -> Callable[..., Tensor]:
        """Return this search for ``model.generate(..., custom_generate=...)``; leave its own ``num_beams`` at 1."""

        def generate(model: nn.Module, input_ids: Tensor, **given: Any) -> Tensor:
            if given.get("logits_processor"):
                raise ValueError(
                    "BeamSearch: logits processors are not applied. Leave generate's own settings at their defaults."
                )
            texts = [tokenizer.decode(row, skip_special_tokens=True) for row in input_ids]
            mask = given.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            ends = end_tokens(model, tokenizer)
            with reading(model):
                found = self._searched(model, Prompts(texts, input_ids, mask, tokenizer, ends))
            best = [problem.pool[0].tokens for problem in found]
            fill = min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            new = [[*tokens, *[fill] * (max(map(len, best)) - len(tokens))] for tokens in best]
            return torch.cat([input_ids, torch.tensor(new, device=input_ids.device)], 1)

        return generate

    def _searched(self, model: nn.Module, prompts: Prompts) -> list[Problem]:
        state = SearchState(self, model, prompts)
        while state.open:
            state.step()
        judge = Judge(self.final, [problem.usage for problem in state.problems], prompts.first)
        for problem in state.problems:
            problem.pool = best_first(list(_judged(judge, problem, self.budget)))
        return state.problems


def _judged(judge: Judge, problem: Problem, budget: Budget) -> Iterator[Hypothesis]:
    """Yield the hypotheses of a problem, finished ones with what the final scorer gives."""
    asked = [h.draft for h in problem.pool if h.finished]
    refused = budget.refuses(problem.usage, judge.coming(asked)) if asked else None
    problem.stopped = problem.stopped or (refused if judge.unknown(asked) else None)
    values = {} if refused or not judge.scores else dict(zip(asked, judge.values(asked), strict=True))
    for hypothesis in problem.pool:
        known = values.get(hypothesis.draft) if hypothesis.finished else None
        yield replace(hypothesis, final=known)

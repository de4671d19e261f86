"""Beam search with scorers of one's own, under a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.budget import Budget, Usage
from lightning_peft.counts import check_counts
from lightning_peft.decoding.beams import Beam, EarlyStopping, Hypothesis
from lightning_peft.decoding.custom_generate import custom_generate
from lightning_peft.decoding.draft import Draft, Scorer
from lightning_peft.decoding.judge import Judge, refusal
from lightning_peft.decoding.picking import judged_by, settled
from lightning_peft.decoding.result import DecodeResult, result_of
from lightning_peft.decoding.rows import Rows
from lightning_peft.decoding.texts import Texts, end_tokens
from lightning_peft.old_task import untouched

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BeamSearch:
    """Search for the best texts with a beam whose hypotheses scorers of yours judge, while they are written and at their end.

    A hypothesis ranks by ``logprob / length ** length_penalty + weight * partial(text)``; the partial scorer's value is taken
    anew at each step, never summed up. Of a step's continuations the ``num_beams * expand`` most likely are scored, dead ones
    (``-inf``) leave, and ``num_beams`` go on. Where a partial scorer has ``finished``, a text that may not end is dead. If all
    die before one has ended, the most likely dead one is returned with ``viable=False``. Without scorers the texts are those of
    transformers' ``generate(num_beams=...)``, token for token; its other settings (of ``generation_config``, say) are not read,
    only which tokens end a text.

    Args:
        num_beams: Hypotheses that go on.
        expand: Candidates a step, as a multiple of ``num_beams``. Without a partial scorer there are at least one more than
            ends, as in transformers; with one, dead candidates leave their places to others, if there are any: at 1 the beam
            gets narrower instead, and cheaper.
        partial: Judges texts that may go on.
        final: Judges texts that have ended; the best of them by it is returned.
        weight: Of the partial scorer's value; at 0 none counts, however great, but that of the dead.
        lookahead: Tokens by which a candidate is continued greedily before the partial scorer sees it.
        budget: Limits for each prompt; when the next step has no room, the best so far is returned.
        length_penalty: Power of the length that log-probabilities are divided by.
        early_stopping: As in transformers: True, False or ``"never"``; or ``"first"``, when ``num_return`` texts have ended:
            enough where a scorer says which texts may.
        max_new_tokens: Greatest length.
        check_every: ``"line"`` shows the partial scorer whole lines only: fewer questions, later answers.
        num_return: Texts that ``DecodeResult.n_best`` holds of each prompt.
        batch_size: Prompts that are searched together.

    Raises:
        ValueError: For a setting outside its range.
    """

    num_beams: int = 4
    expand: int = 2
    partial: Scorer | None = None
    final: Scorer | None = None
    weight: float = 1.0
    lookahead: int = 0
    budget: Budget = field(default_factory=Budget)
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    max_new_tokens: int = 64
    check_every: Literal["token", "line"] = "token"
    num_return: int = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Check the settings."""
        check_counts(self, "num_beams", "expand", "max_new_tokens", "batch_size")
        check_counts(self, "lookahead", least=0)
        if not 1 <= self.num_return <= self.num_beams:
            raise ValueError(f"BeamSearch: num_return={self.num_return!r} must be 1 to num_beams={self.num_beams}.")
        if self.early_stopping not in (True, False, "never", "first"):
            raise ValueError(
                f"BeamSearch: early_stopping={self.early_stopping!r} must be True, False, 'never' or 'first'."
            )
        if self.check_every not in ("token", "line"):
            raise ValueError(f"BeamSearch: check_every={self.check_every!r} must be 'token' or 'line'.")

    def decode(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Write after each prompt.

        Args:
            model: A causal language model of transformers; it is in eval mode meanwhile.
            tokenizer: The model's.
            prompts: Texts, of any lengths.
        """
        texts = Texts(tokenizer, prompts)
        return self.search(model, texts, end_tokens(model, tokenizer))

    def search(self, model: Any, texts: Texts, ends: frozenset[int], process: Processor | None = None) -> DecodeResult:
        """Write after prompts that are tokens already.

        Args:
            model: The model.
            texts: The prompts.
            ends: Tokens that end a text.
            process: Changes log-probabilities, given tokens and them: transformers' logits processors.
        """
        usage = [Usage() for _ in texts.prompts]
        accounts = dict(zip(texts.numbers, usage, strict=True))
        judges = Judge(self.partial, accounts), Judge(self.final, accounts)
        beams: list[Beam] = []
        with torch.no_grad(), untouched(model, next(model.parameters()).device):
            for first in range(0, len(usage), self.batch_size):
                problems = list(range(first, min(first + self.batch_size, len(usage))))
                beams += _Search(self, Rows(model, usage), texts, judges[0], ends, process).run(problems)
        scored = self.partial is not None or self.final is not None
        pools = [settled(beam.found, texts, ended_first=scored or beam.stopped is not None) for beam in beams]
        if self.final is not None:
            pools = [judged_by(judges[1], pool, self.budget) for pool in pools]
        return result_of(pools, usage, [beam.stopped for beam in beams], self.num_return)

    def as_custom_generate(self, tokenizer: Any) -> Callable[..., Tensor]:
        """Return a function for ``model.generate(..., custom_generate=...)``; leave generate's own ``num_beams`` at 1.

        Args:
            tokenizer: The model's; scorers read what it decodes.
        """
        return custom_generate(self, tokenizer)


@dataclass
class _Search:
    """One batch of problems, step by step."""

    settings: BeamSearch
    rows: Rows
    texts: Texts
    judge: Judge
    ends: frozenset[int]
    process: Processor | None

    def run(self, problems: list[int]) -> list[Beam]:
        s = self.settings
        start = time.perf_counter()
        device = next(self.rows.model.parameters()).device
        self.prompt_ids, mask = self.texts.padded(problems, device)
        logits = self.rows.start(self.prompt_ids, mask, problems)
        self.problems = problems
        beams = [
            Beam(one, s.num_beams, s.length_penalty, s.weight, s.early_stopping, s.max_new_tokens, s.num_return)
            for one in problems
        ]
        for beam in beams:
            beam.running = [Hypothesis(beam.problem, 0, (), 0.0, ended=False)]
        running = beams
        while True:
            self._advance(running, logits)
            start = self._share_time(running, start)
            running = [beam for beam in running if not beam.closed]
            running = [beam for beam in running if self._has_room(beam, 1, len(beam.running))]
            if not running:
                return beams
            going = [one for beam in running for one in beam.running]
            self.rows.keep([one.row for one in going])
            logits = self.rows.step(torch.tensor([one.ids[-1] for one in going], device=device))

    def _advance(self, beams: list[Beam], logits: Tensor) -> None:
        candidates = self._candidates(beams, logits)
        if self.judge.scorer is not None:
            self._score(beams, candidates)
        for beam, found in zip(beams, candidates, strict=True):
            if not beam.closed:
                for one in found:
                    beam.rank(one)
                beam.advance(found)

    def _candidates(self, beams: list[Beam], logits: Tensor) -> list[list[Hypothesis]]:
        """Return the most likely continuations of each beam."""
        s = self.settings
        going = [one for beam in beams for one in beam.running]
        logprobs = torch.log_softmax(logits, -1)
        if self.process is not None:
            logprobs = self._processed(beams, going, logprobs, self.process)
        least = max(2, 1 + len(self.ends)) if s.partial is None else 1
        count = s.num_beams * max(s.expand, least)
        values, places = logprobs.topk(min(count, logprobs.shape[1]))
        # What came before is the same for a whole row: it is added to the few that are left, not to the vocabulary.
        values += torch.tensor([one.logprob for one in going], device=logits.device)[:, None]
        best, tokens = values.tolist(), places.tolist()
        candidates, row = [], 0
        for beam in beams:
            rows = range(row, row + len(beam.running))
            row += len(beam.running)
            pairs = [(best[one][place], one, tokens[one][place]) for one in rows for place in range(len(best[one]))]
            pairs.sort(key=lambda pair: -pair[0])
            candidates.append(
                [
                    Hypothesis(beam.problem, one, (*going[one].ids, token), logprob, token in self.ends)
                    for logprob, one, token in pairs[:count]
                ]
            )
        return candidates

    def _score(self, beams: list[Beam], candidates: list[list[Hypothesis]]) -> None:
        """Give each candidate the partial scorer's value, where the budget has room for that."""
        shown: list[tuple[Hypothesis, Draft]] = []
        for beam, found in zip(beams, candidates, strict=True):
            drafts = self._shown(beam, found)
            if drafts is not None:
                pairs = list(zip(found, drafts, strict=True))
                coming = self.judge.coming(drafts, [draft for one, draft in pairs if one.ended])
                refused = refusal(self.settings.budget, self.rows.usage[beam.problem], coming)
                if refused:
                    beam.stop(refused)
                else:
                    shown += pairs
        values = self.judge.values([draft for _, draft in shown])
        for (one, _), value in zip(shown, values, strict=True):
            one.value = value
        ended = [(one, draft) for one, draft in shown if one.ended and not one.dead]
        for (one, _), may in zip(ended, self.judge.finished([draft for _, draft in ended]), strict=True):
            one.value = one.value if may else -float("inf")

    def _shown(self, beam: Beam, found: list[Hypothesis]) -> list[Draft] | None:
        """Return what the partial scorer sees of each candidate; None if the budget has no room for the lookahead."""
        written = [one.written for one in found]
        if self.settings.lookahead:
            places = [place for place, one in enumerate(found) if not one.ended]
            ahead = self.settings.lookahead
            if not self._has_room(beam, ahead, ahead * len(places)):
                return None
            for place, tokens in zip(places, self._rolled_out([found[place] for place in places]), strict=True):
                written[place] = tokens
        drafts = self.texts.drafts([(beam.problem, tokens) for tokens in written])
        if self.settings.check_every == "line":
            drafts = [draft if one.ended else _whole_lines(draft) for one, draft in zip(found, drafts, strict=True)]
        return drafts

    def _rolled_out(self, candidates: list[Hypothesis]) -> list[tuple[int, ...]]:
        """Return the tokens of candidates after some greedy ones more; those that end stop there."""
        written = [one.ids for one in candidates]
        going = list(range(len(candidates)))
        rows = self.rows.fork([one.row for one in candidates])
        for _ in range(self.settings.lookahead):
            if not going:
                break
            logits = rows.step(torch.tensor([written[one][-1] for one in going], device=self.prompt_ids.device))
            following = logits.argmax(-1).tolist()
            lasting = [place for place, token in enumerate(following) if token not in self.ends]
            for place in lasting:
                written[going[place]] = (*written[going[place]], following[place])
            if len(lasting) < len(going):
                rows.keep(lasting)
            going = [going[place] for place in lasting]
        return written

    def _has_room(self, beam: Beam, forwards: int, tokens: int) -> bool:
        refused = self.settings.budget.refuses(self.rows.usage[beam.problem], Usage(forwards=forwards, tokens=tokens))
        if refused:
            beam.stop(refused)
        return not refused

    def _share_time(self, beams: list[Beam], start: float) -> float:
        now = time.perf_counter()
        for beam in beams:
            self.rows.usage[beam.problem].seconds += (now - start) / len(beams)
        return now

    def _processed(self, beams: list[Beam], going: list[Hypothesis], logprobs: Tensor, process: Processor) -> Tensor:
        """Return log-probabilities as processors change them, which may hold a value for each prompt: one row of each at a time."""
        ids, changed = self._ids(going), logprobs.clone()
        rows: dict[int, list[int]] = {}
        for row, one in enumerate(going):
            rows.setdefault(one.problem, []).append(row)
        for place in range(max(len(beam.running) for beam in beams)):
            # Where a prompt has no such row, any will do.
            chosen = [rows.get(problem, [])[place : place + 1] for problem in self.problems]
            index = [one[0] if one else 0 for one in chosen]
            found = process(ids[index], logprobs[index])
            there = [at for at, one in enumerate(chosen) if one]
            changed[[index[at] for at in there]] = found[there]
        return changed

    def _ids(self, going: list[Hypothesis]) -> Tensor:
        device = self.prompt_ids.device
        prompts = self.prompt_ids[[one.problem - self.problems[0] for one in going]]
        return torch.cat([prompts, torch.tensor([one.ids for one in going], device=device, dtype=prompts.dtype)], 1)


def _whole_lines(draft: Draft) -> Draft:
    written = draft.completion
    return Draft(written[: written.rfind("\n") + 1], prompt=draft.prompt, problem=draft.problem)

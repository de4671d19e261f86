"""What accuracy decoders buy with tokens: at equal budgets, with one pool of samples for all that select from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_peft.budget import Usage
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.judge import Judge
from lightning_peft.decoding.result import Candidate, Decoder
from lightning_peft.decoding.sample import Sample
from lightning_peft.reporting import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed

Verifier = Callable[[list[Draft]], Any]
Band = tuple[float, float]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that at least one of ``k`` of ``n`` texts is right, without bias: ``1 - C(n - c, k) / C(n, k)``.

    Chen et al. 2021, arXiv:2107.03374, section 2.1.

    Raises:
        ValueError: Unless ``0 <= correct <= n`` and ``1 <= k <= n``.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n={n}, correct={correct}, k={k} must fulfil 0 <= correct <= n and 1 <= k <= n.")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


@dataclass(frozen=True)
class CurvePoint:
    """One decoder at one budget, over all prompts.

    Args:
        decoder: Its name.
        budget: Tokens that each prompt could spend.
        tokens: Those that were spent, on average.
        scorer_calls: Questions to scorers, on average.
        selected: Share of prompts whose chosen text is right.
        selected_band: 95 % of the bootstrap over prompts.
        coverage: Share of prompts for which any text found is right; of samples, the unbiased pass@k of as many as the budget
            allows.
        coverage_band: As above.
    """

    decoder: str
    budget: int
    tokens: float
    scorer_calls: float
    selected: float
    selected_band: Band
    coverage: float
    coverage_band: Band


@dataclass(frozen=True)
class ComputeCurve:
    """Accuracy against tokens.

    Args:
        rows: One for each decoder and budget.
        prompts: Number of prompts.
    """

    rows: list[CurvePoint]
    prompts: int

    def table(self) -> TextTable:
        """Return the rows as a table."""
        lines = [
            (
                row.decoder,
                str(row.budget),
                f"{row.tokens:.0f}",
                f"{row.scorer_calls:.0f}",
                _with_band(row.selected, row.selected_band),
                _with_band(row.coverage, row.coverage_band),
            )
            for row in self.rows
        ]
        columns = ["decoder", "budget", "tokens", "scorer calls", "selected", "coverage"]
        return TextTable(f"{self.prompts} prompts; in brackets 95 % of the bootstrap over prompts", columns, lines)

    def figure(self) -> Figure:
        """Draw selected accuracy (lines) and coverage (dashes) against tokens, with their bands."""
        from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, seldom needed

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(dict.fromkeys(row.decoder for row in self.rows)):
            rows = [row for row in self.rows if row.decoder == name]
            x, color = [row.tokens for row in rows], f"C{number % 10}"
            axes.plot(x, [row.selected for row in rows], "o-", color=color, markersize=4, label=name)
            axes.plot(x, [row.coverage for row in rows], "--", color=color, linewidth=1)
            low, high = zip(*(row.selected_band for row in rows), strict=True)
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1)
        axes.set_xlabel("tokens for each prompt")
        axes.set_ylabel("share right: selected (lines), coverage (dashes)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return figure


def compute_curve(
    decoders: Mapping[str, Decoder],
    prompts: Sequence[str],
    verifier: Verifier,
    budgets: Sequence[int],
    *,
    model: Any,
    tokenizer: Any,
    resamples: int = 1000,
    seed: int = 0,
    cut_counts: bool = False,
) -> ComputeCurve:
    """Measure decoders at equal budgets of tokens.

    A search runs anew under each budget. Of those that select among samples, all with the same sampling share one pool, drawn
    once; at a budget each sees as many of its first texts as the budget pays for, and at most its ``n``. ``coverage`` is what a
    perfect selector would reach: where it is far above ``selected``, the selector is at fault. For majority vote give a
    ``SelfConsistency``.

    Args:
        decoders: By name.
        prompts: Texts.
        verifier: Takes drafts, which know their prompt and its place, and says for each whether it is right.
        budgets: Most tokens after the prompt, for each prompt.
        model: A causal language model of transformers.
        tokenizer: The model's.
        resamples: Of the bootstrap over prompts.
        seed: Of the bootstrap.
        cut_counts: Whether a text that a limit has cut can be right; else it is wrong without a question.

    Raises:
        ValueError: For no prompt or budget, one text in place of a list, a budget below 1, or a decoder without a budget.
    """
    if isinstance(prompts, str) or not prompts or not budgets or min(budgets) < 1:
        raise ValueError(
            f"compute_curve: {len(prompts)} prompts and budgets={list(budgets)!r}; give a list of prompts, and budgets from 1 on."
        )
    measure = _Measure(model, tokenizer, list(prompts), verifier, cut_counts)
    rows = []
    for name, decoder in tqdm(decoders.items(), desc="compute curve", leave=False):
        for budget in sorted(budgets):
            found = (
                measure.samples(decoder, budget)
                if isinstance(decoder, Sample)
                else measure.search(name, decoder, budget)
            )
            rows.append(_point(name, budget, found, (resamples, seed)))
    return ComputeCurve(rows, len(prompts))


@dataclass
class _Found:
    """For each prompt: what was spent, whether the chosen text is right, and the chance that any is."""

    usage: list[Usage]
    selected: list[float]
    coverage: list[float]


class _Measure:
    """Runs decoders, remembers pools and verdicts."""

    def __init__(self, model: Any, tokenizer: Any, prompts: list[str], verifier: Verifier, cut_counts: bool) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.verifier, self.cut_counts = verifier, cut_counts
        self._pools: dict[Sample, list[list[Candidate]]] = {}
        self._verdicts: dict[tuple[int, str], float] = {}

    def search(self, name: str, decoder: Any, budget: int) -> _Found:
        if not hasattr(decoder, "budget"):
            raise ValueError(
                f"compute_curve: {name!r} is a {type(decoder).__name__} without a budget; it cannot be held to one."
            )
        limited = replace(decoder, budget=replace(decoder.budget, max_tokens=budget))
        result = limited.decode(self.model, self.tokenizer, self.prompts)
        right = [self.right(pool) for pool in result.pool]
        return _Found(result.usage, [one[0] for one in right], [max(one) for one in right])

    def samples(self, decoder: Sample, budget: int) -> _Found:
        usage, pools = [Usage() for _ in self.prompts], self.pool(decoder)
        numbers = [pool[0].draft.problem for pool in pools]
        judge = Judge(getattr(decoder, "final", None), dict(zip(numbers, usage, strict=True)))
        selected, coverage = [], []
        for account, pool in zip(usage, pools, strict=True):
            drawn = pool[: decoder.n]
            paid = drawn[: _paid(drawn, budget)]
            account.tokens = sum(one.tokens for one in paid)
            selected.append(self.right(decoder.select(paid, judge))[0] if paid else 0.0)
            coverage.append(pass_at_k(len(drawn), int(sum(self.right(drawn))), len(paid)) if paid else 0.0)
        return _Found(usage, selected, coverage)

    def pool(self, decoder: Sample) -> list[list[Candidate]]:
        """Return the texts that all decoders with this sampling share; drawn anew only for one that wants more of them."""
        of = Sample(temperature=decoder.temperature, seed=decoder.seed, max_new_tokens=decoder.max_new_tokens)
        if of not in self._pools or len(self._pools[of][0]) < decoder.n:
            # The first texts of a larger pool are those of a smaller one.
            drawing = replace(of, n=decoder.n, batch_size=decoder.batch_size)
            self._pools[of] = drawing.draw(self.model, self.tokenizer, self.prompts).pools
        return self._pools[of]

    def right(self, pool: Sequence[Candidate]) -> list[float]:
        """Return 1 for each text that is right, else 0."""
        asked = [one.draft for one in pool if (one.finished or self.cut_counts) and one.viable]
        new = {(draft.problem, str(draft)): draft for draft in asked}
        new = {key: draft for key, draft in new.items() if key not in self._verdicts}
        if new:
            said = self.verifier(list(new.values()))
            self._verdicts |= {key: float(bool(one)) for key, one in zip(new, said, strict=True)}
        seen = {(draft.problem, str(draft)) for draft in asked}
        keys = [(one.draft.problem, str(one.draft)) for one in pool]
        counts = [(one.finished or self.cut_counts) and one.viable for one in pool]
        return [self._verdicts[key] if key in seen and count else 0.0 for key, count in zip(keys, counts, strict=True)]


def _paid(pool: Sequence[Candidate], budget: int) -> int:
    """Return how many of the first texts a budget of tokens pays for."""
    left, count = budget, 0
    for one in pool:
        left -= one.tokens
        if left < 0:
            break
        count += 1
    return count


def _point(name: str, budget: int, found: _Found, bootstrap: tuple[int, int]) -> CurvePoint:
    selected, coverage = (torch.tensor(values, dtype=torch.float64) for values in (found.selected, found.coverage))
    return CurvePoint(
        name,
        budget,
        sum(one.tokens for one in found.usage) / len(found.usage),
        sum(one.scorer_calls for one in found.usage) / len(found.usage),
        float(selected.mean()),
        bootstrap_band(selected, *bootstrap),
        float(coverage.mean()),
        bootstrap_band(coverage, *bootstrap),
    )


def bootstrap_band(values: Tensor, resamples: int = 1000, seed: int = 0) -> Band:
    """Return the middle 95 % of the mean over resampled values (Efron 1979, the percentile bootstrap).

    >>> bootstrap_band(torch.ones(5, dtype=torch.float64))
    (1.0, 1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _with_band(value: float, band: Band) -> str:
    return f"{value:.2f} [{band[0]:.2f}, {band[1]:.2f}]"

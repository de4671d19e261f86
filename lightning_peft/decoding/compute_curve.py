"""How right decoders are for the tokens that they spend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lightning_peft.budget import Budget, Usage
from lightning_peft.decoding.draft import Draft, Scorer
from lightning_peft.decoding.result import DecodeResult, Hypothesis
from lightning_peft.decoding.sampling import Sample
from lightning_peft.decoding.selection import Selector
from lightning_peft.reporting import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Decoder(Protocol):
    """Whatever writes texts after prompts."""

    def decode(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> DecodeResult:
        """Write texts after prompts."""
        ...


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """Return the chance that one of ``k`` draws is right, given that ``right`` of ``drawn`` were: ``1 - C(n-c, k) / C(n, k)``.

    Unbiased (Chen et al. 2021, arXiv:2107.03374, section 2.1), where "any of the first k" is a noisy draw of the same number.

    Raises:
        ValueError: For ``k`` above ``drawn``.

    >>> round(pass_at_k(10, 3, 2), 4)
    0.5333
    """
    if k > drawn:
        raise ValueError(f"pass_at_k: k={k} is more than the {drawn} texts that were drawn.")
    return 1.0 - math.prod((drawn - right - i) / (drawn - i) for i in range(k))


@dataclass(frozen=True)
class CurvePoint:
    """One decoder at one budget.

    Args:
        decoder: Its name.
        budget: Tokens that a prompt might cost.
        usage: What each prompt did cost.
        right: Whether the chosen text of each prompt is right.
        covered: Chance that some text of each prompt's pool is right: of drawn ones unbiased, else 0 or 1.
    """

    decoder: str
    budget: int
    usage: tuple[Usage, ...]
    right: tuple[float, ...]
    covered: tuple[float, ...]

    @property
    def tokens(self) -> float:
        """Mean tokens that a prompt did cost."""
        return sum(account.tokens for account in self.usage) / len(self.usage)


@dataclass(frozen=True)
class ComputeCurve:
    """Accuracy and coverage of decoders against tokens.

    Args:
        points: A point for every decoder and budget.
        seed: Of the resampling.
        resamples: How often problems are drawn again for an interval.
    """

    points: tuple[CurvePoint, ...]
    seed: int = 0
    resamples: int = 2000

    def of(self, decoder: str) -> list[CurvePoint]:
        """Return the points of a decoder, by budget."""
        return sorted((p for p in self.points if p.decoder == decoder), key=lambda p: p.budget)

    @property
    def decoders(self) -> list[str]:
        """The names, in order."""
        return list(dict.fromkeys(point.decoder for point in self.points))

    def interval(self, values: Sequence[float]) -> tuple[float, float]:
        """Return the 95 % interval of a mean over problems, by drawing problems again."""
        rng = np.random.default_rng(self.seed)
        known = np.asarray(values)
        means = known[rng.integers(len(known), size=(self.resamples, len(known)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)

    def difference(self, one: str, other: str, budget: int) -> tuple[float, float, float]:
        """Return by how much one decoder is more often right than another, paired by problem, with its interval."""
        a, b = (next(p for p in self.points if (p.decoder, p.budget) == (name, budget)) for name in (one, other))
        gaps = [x - y for x, y in zip(a.right, b.right, strict=True)]
        return sum(gaps) / len(gaps), *self.interval(gaps)

    def table(self, title: str = "Right answers against tokens") -> TextTable:
        """Return all points as text."""
        lines = []
        for point in self.points:
            low, high = self.interval(point.right)
            calls, seconds = (
                sum(getattr(account, name) for account in point.usage) / len(point.usage)
                for name in ("scorer_calls", "scorer_seconds")
            )
            mean = sum(point.right) / len(point.right)
            covered = sum(point.covered) / len(point.covered)
            cells = [f"{point.tokens:.0f}", f"{mean:.3f} ({low:.3f} to {high:.3f})", f"{covered:.3f}"]
            lines.append([point.decoder, str(point.budget), *cells, f"{calls:.0f}", f"{seconds:.2f}"])
        columns = ["decoder", "budget", "tokens", "right (95 %)", "covered", "scorer calls", "scorer s"]
        return TextTable(title, columns, lines)

    def figure(self, right: str = "right") -> Figure:
        """Draw accuracy with its band, and coverage as a thin line, against tokens on a logarithmic axis."""
        from matplotlib.figure import Figure  # noqa: PLC0415 - half a second

        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(self.decoders):
            points = self.of(name)
            x = [point.tokens for point in points]
            means = [sum(p.right) / len(p.right) for p in points]
            bands = [self.interval(p.right) for p in points]
            axes.plot(x, means, "o-", color=f"C{i}", label=name)
            axes.fill_between(x, [b[0] for b in bands], [b[1] for b in bands], color=f"C{i}", alpha=0.15, linewidth=0)
            axes.plot(x, [sum(p.covered) / len(p.covered) for p in points], ":", color=f"C{i}", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens through the model, mean of a prompt")
        axes.set_ylabel(f"share {right} (dotted: some text of the pool is)")
        axes.set_ylim(-0.02, 1.02)
        axes.legend(fontsize="small")
        return figure


def compute_curve(
    decoders: Mapping[str, Decoder],
    prompts: Sequence[str],
    verifier: Scorer,
    budgets: Sequence[int],
    *,
    model: nn.Module,
    tokenizer: Any,
) -> ComputeCurve:
    """Measure decoders at equal numbers of tokens.

    Texts are drawn once for each way of drawing, and every selector chooses from the same ones: as many as its budget pays for.
    Other decoders search anew within each budget, until one is enough for all prompts.

    Args:
        decoders: By name.
        prompts: The problems.
        verifier: Says which texts are right: above 0.5.
        budgets: Tokens that a prompt may cost, its own included.
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: For budgets that are not whole numbers above 0.
    """
    if not budgets or any(not isinstance(b, int) or b < 1 for b in budgets):
        raise ValueError(f"compute_curve: budgets={budgets!r} must be whole numbers of tokens above 0.")
    judged = _Verdicts(verifier)
    pools: dict[Sample, DecodeResult] = {}
    points = []
    with tqdm(total=len(decoders) * len(budgets), desc="decoding") as bar:
        for name, decoder in decoders.items():
            sample = decoder if isinstance(decoder, Sample) else getattr(decoder, "sample", None)
            result: DecodeResult | None = None
            for budget in sorted(budgets):
                bar.set_postfix_str(f"{name}, {budget}")
                if isinstance(sample, Sample):
                    if sample not in pools:
                        pools[sample] = sample.decode(model, tokenizer, prompts)
                    selector = decoder if isinstance(decoder, Selector) else None
                    points.append(_of_pool(name, budget, selector, pools[sample], judged))
                else:
                    if result is None or any(result.stopped):
                        limit = replace(getattr(decoder, "budget", Budget()), max_tokens=budget)
                        limited: Any = replace(decoder, budget=limit)  # type: ignore[type-var]
                        result = limited.decode(model, tokenizer, prompts)
                    points.append(_of_search(name, budget, result, judged))
                bar.update()
    return ComputeCurve(tuple(points))


class _Verdicts:
    """A verifier that is asked about each text once."""

    def __init__(self, verifier: Scorer) -> None:
        self._verifier = verifier
        self._known: dict[tuple[int, str], bool] = {}

    def __call__(self, drafts: Sequence[Draft]) -> list[bool]:
        new = list({_key(draft): draft for draft in drafts if _key(draft) not in self._known}.values())
        if new:
            for draft, value in zip(new, torch.as_tensor(self._verifier(new)).tolist(), strict=True):
                self._known[_key(draft)] = value > 0.5
        return [self._known[_key(draft)] for draft in drafts]


def _key(draft: Draft) -> tuple[int, str]:
    return draft.problem, str(draft)


def _of_search(name: str, budget: int, result: DecodeResult, judged: _Verdicts) -> CurvePoint:
    right = judged(result.drafts)
    covered = [any(judged([h.draft for h in pool])) for pool in result.pool]
    return CurvePoint(name, budget, tuple(result.usage), tuple(map(float, right)), tuple(map(float, covered)))


def _of_pool(name: str, budget: int, selector: Selector | None, drawn: DecodeResult, judged: _Verdicts) -> CurvePoint:
    usage, right, covered = [], [], []
    for pool, whole in zip(drawn.pool, drawn.usage, strict=True):
        prompt = whole.tokens - sum(max(len(h.tokens) - 1, 0) for h in pool)
        bought: list[Hypothesis] = []
        account = Usage(tokens=prompt)
        for hypothesis in pool:
            cost = max(len(hypothesis.tokens) - 1, 0)
            if account.tokens + cost > budget:
                break
            account.tokens += cost
            bought.append(hypothesis)
        chosen = (selector.order(bought, account) if selector and bought else bought)[:1]
        verdicts = judged([h.draft for h in pool])
        usage.append(account if bought else Usage())
        right.append(float(any(judged([h.draft for h in chosen]))))
        covered.append(pass_at_k(len(pool), sum(verdicts), len(bought)))
    return CurvePoint(name, budget, tuple(usage), tuple(right), tuple(covered))

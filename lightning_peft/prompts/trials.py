"""Try a candidate prompt on rows: what is known already is not computed again, and processes share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapters.fingerprint import fingerprint, fingerprint_to_plain
from lightning_peft.budget import Usage
from lightning_peft.data.content_digest import key_of
from lightning_peft.distributed import gather_objects, rank, world_size
from lightning_peft.prompts.calibration import Calibration, calibration_inputs, leaning
from lightning_peft.prompts.label_scores import label_log_probabilities, prompt_tokens, scoring_cost
from lightning_peft.prompts.score_cache import ScoreCache
from lightning_peft.prompts.space import Candidate, PromptSpace
from lightning_peft.prompts.template import Row

Example = tuple[Row, int]
"""An input and its label."""
DECIMALS = 4
"""Scores are rounded, so that the order of a sum on one or several processes decides nothing."""


@dataclass(frozen=True)
class Result:
    """How a candidate did.

    Args:
        candidate: The prompt.
        correct: Inputs whose most probable label is right.
        rows: Inputs.
        length: Tokens of the prompt around an input.
        digest: The prompt's hash.
    """

    candidate: Candidate
    correct: int
    rows: int
    length: int
    digest: str

    @property
    def accuracy(self) -> float:
        """The share of right labels."""
        return self.correct / self.rows

    @property
    def order(self) -> tuple[float, int, int, str]:
        """Sorts the best first: by accuracy; of equal ones by more rows, then the shorter prompt, then the hash."""
        return (-self.accuracy, -self.rows, self.length, self.digest)


class CandidateScorer:
    """Scores candidates of a space with a frozen model, on one process or several, and keeps count.

    Args:
        model: A language model of transformers.
        tokenizer: The model's.
        space: What candidates are of.
        calibration: What is taken out of the scores.
        calibration_rows: Training inputs for ``calibration="batch"``.
        cache: Where scores are kept; unset, in memory.
        batch_size: Inputs of a forward.
        search: A name under which the cache remembers what was spent, so that a killed search goes on counting.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        space: PromptSpace,
        *,
        calibration: Calibration = "none",
        calibration_rows: Sequence[Row] = (),
        cache: ScoreCache | None = None,
        batch_size: int = 32,
        search: str = "",
    ) -> None:
        self.model, self.tokenizer, self.space, self.batch_size = model, tokenizer, space, batch_size
        self.calibration, self.calibration_rows = calibration, list(calibration_rows)
        self.cache = cache or ScoreCache()
        self._weights = key_of(fingerprint_to_plain(fingerprint(model)), type(model).__name__)
        self.search = key_of(self._weights, search)
        self.usage = Usage(**_told(self.cache.spent(self.search)))
        """What all processes together have spent; seconds are those of the slowest."""

    def cost(self, candidate: Candidate, rows: Sequence[Row]) -> Usage:
        """Return what scores of these inputs would cost now: forwards and tokens of all processes."""
        keys = self._keys(candidate, rows)
        missing = _missing(keys, rows, self._known(keys))
        return sum((self._part_cost(candidate, missing[k :: world_size()]) for k in range(world_size())), Usage())

    def score_cost(self, candidate: Candidate, *parts: Sequence[Row]) -> Usage:
        """Return what :meth:`score` of these inputs, and then of those, would cost now, its calibration included."""
        template, _ = self.space.build(candidate)
        calibrated = calibration_inputs(self.calibration, template, self.calibration_rows)
        total, seen = Usage(), set[str]()
        for part in (parts[0], calibrated, *parts[1:]):
            new = {key: row for key, row in zip(self._keys(candidate, part), part, strict=True) if key not in seen}
            total += self.cost(candidate, list(new.values()))
            seen |= new.keys()
        return total

    def log_probabilities(self, candidate: Candidate, rows: Sequence[Row]) -> Tensor:
        """Return the log-probability of each label, ``(rows, labels)``, rounded; the same on every process."""
        keys = self._keys(candidate, rows)
        known = self._known(keys)
        missing = _missing(keys, rows, known)
        mine = missing[rank() :: world_size()]
        template, verbalizer = self.space.build(candidate)
        usage = Usage(cached=(len(rows) - len(missing)) if rank() == 0 else 0)
        found = label_log_probabilities(
            self.model, self.tokenizer, mine, template, verbalizer, batch_size=self.batch_size, usage=usage
        )
        computed = {
            key: [round(score, DECIMALS) for score in scores]
            for key, scores in zip(self._keys(candidate, mine), found.tolist(), strict=True)
        }
        everybody = gather_objects((computed, usage))
        for part, _ in everybody:
            computed |= part
        together = sum((spent for _, spent in everybody), Usage())
        self.usage += replace(together, seconds=max(spent.seconds for _, spent in everybody))
        if computed and rank() == 0:
            self.cache.put(computed, (self.search, asdict(self.usage)))
        known |= computed
        return torch.tensor([known[key] for key in keys])

    def score(self, candidate: Candidate, examples: Sequence[Example]) -> Result:
        """Return how many labels of examples a candidate gets right."""
        rows, labels = [row for row, _ in examples], torch.tensor([label for _, label in examples])
        template, _ = self.space.build(candidate)
        scores = self.log_probabilities(candidate, rows) - self.leaning(candidate)
        blank = prompt_tokens(template, dict.fromkeys(template.slots, ""), self.tokenizer)
        right = int((scores.argmax(1) == labels).sum())
        return Result(candidate, right, len(rows), len(blank), self.space.digest(candidate))

    def leaning(self, candidate: Candidate) -> Tensor | float:
        """Return what calibration takes out of a candidate's scores."""
        template, _ = self.space.build(candidate)
        return leaning(
            self.calibration, lambda rows: self.log_probabilities(candidate, rows), template, self.calibration_rows
        )

    def _known(self, keys: Sequence[str]) -> dict[str, list[float]]:
        # One process says what is known: files and memories of others may be behind, and all must compute alike.
        found: dict[str, list[float]] = _told(self.cache.get(keys) if rank() == 0 else {})
        return found

    def _part_cost(self, candidate: Candidate, rows: Sequence[Row]) -> Usage:
        template, verbalizer = self.space.build(candidate)
        return scoring_cost(self.model, self.tokenizer, rows, template, verbalizer, batch_size=self.batch_size)

    def _keys(self, candidate: Candidate, rows: Sequence[Row]) -> list[str]:
        digest = self.space.digest(candidate)
        return [key_of(self._weights, digest, row if isinstance(row, str) else dict(row)) for row in rows]


def _missing(keys: Sequence[str], rows: Sequence[Row], known: Mapping[str, Any]) -> list[Row]:
    """Return the rows of unknown keys, each once."""
    return [row for key, row in dict(zip(keys, rows, strict=True)).items() if key not in known]


def _told(value: Any) -> Any:
    """Return what the first process has, on every process."""
    return gather_objects(value)[0]

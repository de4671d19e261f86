"""What a recipe of meta-learning has trained and measured so far; files are whole after each arm, so that a killed run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.files import write_atomic, write_text
from lightning_peft.meta import AdaptationCurve
from lightning_peft.recipes.maml_page import Facts
from lightning_peft.reporting import finished_rows, save_results

FREE = frozenset({"arms", "seeds", "quick", "resume", "accelerator", "out", "page"})
"""Settings that choose what is measured and not how: a resumed run may have others."""


class Record:
    """Networks in ``nets``, adaptation curves by task in ``curves``, and ``results.json`` and ``.csv`` with what they come to.

    Args:
        owner: The recipe, for messages.
        out: Folder of the run.
        options: Its settings; with ``resume`` it goes on with what the folder holds, else that is forgotten.
        free: Settings that may differ from those of a resumed run.

    Raises:
        ValueError: If a run to be resumed had other settings.
    """

    def __init__(self, owner: str, out: Path, options: Any, *, free: frozenset[str] = FREE) -> None:
        self.out = out
        self._about = {name: value for name, value in asdict(options).items() if name not in free}
        if not options.resume:
            for file in (*out.glob("nets/*.pt"), *out.glob("curves/*.json"), *out.glob("results.*")):
                file.unlink()
        self._rows = finished_rows(out, self._about, owner=owner)
        save_results(
            out, self._rows, self._about
        )  # before any network is kept, so that a resumed run knows whose they are

    def trained(self, name: str, module: nn.Module, fit: Callable[[], None]) -> float:
        """Fit a module, or give it the weights that it was fitted to; return the seconds that it took."""
        file = self.out / "nets" / f"{name}.pt"
        learned = {key: value for key, value in module.named_parameters() if value.requires_grad}
        if not file.is_file():
            start = time.perf_counter()
            fit()
            found = {key: value.detach().cpu() for key, value in learned.items()}
            write_atomic(file, partial(torch.save, {"seconds": time.perf_counter() - start, "weights": found}))
        kept = torch.load(file, weights_only=True)
        with torch.no_grad():
            for key, value in learned.items():
                value.copy_(kept["weights"][key])
        seconds: float = kept["seconds"]
        return seconds

    def has(self, name: str) -> bool:
        """Return whether something is measured already."""
        return name in self._rows and self._file(name).is_file()

    def add(self, name: str, curve: AdaptationCurve, facts: Mapping[str, Any]) -> None:
        """Keep a curve, and facts that stand beside it."""
        write_text(self._file(name), json.dumps(asdict(curve)))
        summary = {
            f"{kind} {what}": getattr(curve, what)(kind)
            for kind in ("loss", "accuracy")
            if curve.rows(kind)
            for what in ("means", "intervals", "medians")
        }
        self._rows[name] = {**facts, **summary}
        save_results(self.out, self._rows, self._about)

    def by_arm(
        self, arms: Iterable[str], seeds: int
    ) -> tuple[dict[str, list[AdaptationCurve]], dict[str, list[Facts]]]:
        """Return the curves of ``arm-seed`` by arm in the order of seeds, and the facts."""
        names = {arm: [f"{arm}-{seed}" for seed in range(seeds)] for arm in arms}
        curves = {
            arm: [AdaptationCurve(**json.loads(self._file(name).read_text(encoding="utf-8"))) for name in found]
            for arm, found in names.items()
        }
        return curves, {arm: [self._rows[name] for name in found] for arm, found in names.items()}

    def _file(self, name: str) -> Path:
        return self.out / "curves" / f"{name}.json"

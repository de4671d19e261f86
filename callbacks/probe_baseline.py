"""Always try a linear probe first: what a head on frozen features reaches stands beside what training reaches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_peft.callbacks.measuring import forward_context
from lightning_peft.callbacks.probe_features import ProbeFeatures, without_adapters
from lightning_peft.data.cached_rows import CachedRows
from lightning_peft.data.content_digest import key_of
from lightning_peft.data.feature_cache import FeatureCache
from lightning_peft.data.mix_loader import MixLoader, carried_options, row_count
from lightning_peft.distributed import gather_objects
from lightning_peft.logging import log_values, register_chart
from lightning_peft.mixins.cached_inputs import targets_of
from lightning_peft.mixins.prompt_search_mixin import PromptSearchMixin
from lightning_peft.old_task import untouched
from lightning_peft.one_lightning import refuse_pytorch_lightning
from lightning_peft.probes.layer_probe import fit_layers
from lightning_peft.train_loader import validation_loader

_OWNER, _KEY = "ProbeBaseline", "baseline/probe"


class ProbeBaseline(pl.Callback):
    """Fit a linear probe to frozen features before the first step, and say at the end whether training beat it.

    Features are those of the network as it is pretrained, without adapters. Of a transformers model every layer is tried, and the
    mean over tokens and the last token; with ``head`` the features are what goes into that module. Ridge regression chooses the
    layer, logistic regression fits the head (:func:`~lightning_peft.probes.fit_layers`), both chosen by validation rows, which is
    the score that is shown. It is logged as ``baseline/probe`` at every validation, in a chart with ``monitor``. Nothing of
    training moves: weights, generators and modes are as without it.

    Alain & Bengio 2016, arXiv:1610.01644. For prompts: Zhao et al. 2021, arXiv:2102.09690, show how far label words may be from
    what a model knows.

    **The trap:** best of many layers on the rows that are shown: the probe is a little flattered. So is the best validation of a
    training.

    Args:
        head: Dotted name of the module's head; unset, the hidden states of its only transformers model.
        label: Index or key of the labels in a batch; unset, ``labels`` or ``label``, or the last part of a tuple.
        monitor: The logged validation metric that it is compared with, an accuracy; for labels that are numbers, an R².
        rows: Most training rows, drawn at random; more cost more time.
        forward: ``forward(module, batch)`` runs the module so that its head gets the features; unset, ``module(inputs)``.
        cache: A :class:`~lightning_peft.data.FeatureCache` or a folder for one, so that the next fit pays nothing; unset,
        temporary.

    Raises:
        ValueError: For ``rows`` below 2; before the first step, without validation rows or for a module that does not fit; at the
            first validation, if ``monitor`` is not logged.

    >>> ProbeBaseline(head="head").rows
    2000
    """

    probe_score: float | None = None
    """What the probe reached on validation rows."""

    def __init__(
        self,
        head: str | None = None,
        *,
        label: int | str | None = None,
        monitor: str = "learn/accuracy",
        rows: int = 2000,
        forward: Callable[[Any, Any], Any] | None = None,
        cache: FeatureCache | str | Path | None = None,
    ) -> None:
        if rows < 2:
            raise ValueError(f"{_OWNER}: rows={rows!r} must be at least 2.")
        self.features = ProbeFeatures(_OWNER, head, label, forward)
        self.monitor, self.rows = monitor, rows
        self.cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
        self.seconds, self.layer, self.by_layer = 0.0, 0, ()
        self.best: float | None = None
        self._validation_rows = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":
            self.features.check(pl_module)
            register_chart(trainer, "Baseline", "against a linear probe", [_KEY], beside=[self.monitor])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self.probe_score, self.best = None, None
        if self.probe_score is None:
            self._fit(trainer, pl_module)
            log_values(trainer, {_KEY: self.probe_score or 0.0})

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.probe_score is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"{_OWNER}: monitor={self.monitor!r} is not logged; there are {', '.join(sorted(trainer.callback_metrics))}."
            )
        value = float(trainer.callback_metrics[self.monitor])
        self.best = value if self.best is None or math.isnan(self.best) else max(self.best, value)
        log_values(trainer, {_KEY: self.probe_score})

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.probe_score is not None:
            rank_zero_info(self.verdict())

    def verdict(self) -> str:
        """Say in a sentence whether training beat the probe.

        Raises:
            ValueError: Before a fit.
        """
        if self.probe_score is None:
            raise ValueError(f"{_OWNER}: there is no probe yet; it comes with the first step of a fit.")
        told = f"a linear probe on frozen features (layer {self.layer}, {self.seconds:.0f} s) reaches {self.probe_score:.3f}"
        if self.best is None:
            return f"{_OWNER}: {told}; {self.monitor} was never validated."
        gain, error = self.best - self.probe_score, self._error()
        verdict = (
            "beat it" if gain > 2 * error else "did not reach it" if gain < -2 * error else "cannot be told from it"
        )
        return (
            f"{_OWNER}: {told}, training {self.best:.3f} at best ({self.monitor}): it {verdict} (difference {gain:+.3f}, standard "
            f"error {error:.3f} over {self._validation_rows} validation rows)."
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        names = ("probe_score", "seconds", "layer", "by_layer", "best", "_validation_rows")
        return {name: getattr(self, name) for name in names}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def _error(self) -> float:
        """Return the standard error of a difference of two shares of the validation rows, as if they were independent."""
        shares = [min(1.0, max(0.0, share)) for share in (self.best or 0.0, self.probe_score or 0.0)]
        return math.sqrt(sum(share * (1 - share) for share in shares) / max(1, self._validation_rows))

    def _fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.perf_counter()
        train, held = (
            self._loader(_training(trainer, pl_module), "training"),
            self._loader(validation_loader(trainer), "validation"),
        )
        some = torch.randperm(len(train.dataset), generator=torch.Generator().manual_seed(0))[: self.rows]  # type: ignore[arg-type]
        if isinstance(train.dataset, CachedRows) and isinstance(
            held.dataset, CachedRows
        ):  # LinearProbeMixin was before
            (features, targets), (others, wanted) = _cached(train.dataset, some), _cached(held.dataset)
        else:
            train = DataLoader(Subset(train.dataset, some.tolist()), **carried_options(train))
            with untouched(pl_module, pl_module.device), without_adapters(pl_module):
                key = key_of(self.features.key(pl_module), str(trainer.precision))
                kept = [
                    self._kept(trainer, pl_module, one, key, name)
                    for name, one in (("train", train), ("validation", held))
                ]
            (features, targets), (others, wanted) = ((rows.all(), targets_of(rows)) for rows in kept)
        solver: Any = "ridge" if targets.is_floating_point() else "lbfgs"
        found = fit_layers(features, targets, (others, wanted), solver=solver)
        # One process says what was found: sums may differ in their last digit.
        told = gather_objects((found.fit.score, found.layer, found.by_layer))[0]
        self.probe_score, self.layer, self.by_layer = told
        self._validation_rows = len(wanted)
        self.seconds = max(gather_objects(time.perf_counter() - start))
        rank_zero_info(
            f"{_OWNER}: {self.probe_score:.3f} on {len(wanted)} validation rows, from {len(targets)} training rows (layer "
            f"{self.layer} of {len(self.by_layer)}, {found.pooling}), in {self.seconds:.1f} s."
        )

    def _loader(self, loaders: Any, name: str) -> DataLoader[Any]:
        loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"{_OWNER}: the {name} data is {type(loader).__name__}; a probe needs a DataLoader of training rows and one of "
                "validation rows."
            )
        dataset: Any = loader.dataset
        dataset = dataset.new if isinstance(loader, MixLoader) else dataset
        row_count(dataset, f"{_OWNER}: {name}")
        return DataLoader(dataset, **carried_options(loader))

    def _kept(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: DataLoader[Any], key: str, name: str
    ) -> CachedRows:
        plugin: Any = trainer.precision_plugin

        def extract(batch: Any) -> tuple[Tensor, list[Tensor]]:
            return self.features(pl_module, trainer.strategy.batch_to_device(plugin.convert_input(batch)))

        return self.cache.rows(loader, extract, key=key, name=f"probe {name}", context=lambda: forward_context(trainer))


def _training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return the loader of training rows; a search for a prompt has put another one in its place."""
    if isinstance(pl_module, PromptSearchMixin):
        return DataLoader(pl_module.training_rows, 32, collate_fn=_texts_and_labels)  # type: ignore[arg-type]
    return trainer.train_dataloader


def _texts_and_labels(examples: list[tuple[Any, int]]) -> tuple[list[Any], Tensor]:
    return [row for row, _ in examples], torch.tensor([label for _, label in examples])


def _cached(rows: CachedRows, some: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return features, as of one layer and pooling, and labels of rows that another cache has kept."""
    features, targets = rows.all()[:, None, None], targets_of(rows)
    return (features, targets) if some is None else (features[some], targets[some])

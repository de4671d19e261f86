"""A head on a frozen backbone, whose features are computed once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from typing_extensions import override

from lightning_peft.adapters import LinearProbe
from lightning_peft.adapters.fingerprint import fingerprint, fingerprint_to_plain
from lightning_peft.data.cached_rows import CachedRows
from lightning_peft.data.content_digest import key_of
from lightning_peft.data.feature_cache import FeatureCache
from lightning_peft.data.mix_loader import MixLoader
from lightning_peft.heads import output_layer
from lightning_peft.logging import log_values
from lightning_peft.mixins.adapter_mixin import AdapterMixin
from lightning_peft.mixins.cached_inputs import FEATURES, CachedBatch, CachedInputs, Reads, divided, on_cpu, targets_of
from lightning_peft.mixins.feature_checks import refuse_moving
from lightning_peft.old_task import untouched
from lightning_peft.probes.linear_fit import PENALTIES, LinearFit, fit_linear
from lightning_peft.probes.pooling import Pooling, hidden_features
from lightning_peft.train_loader import change_train_loader, change_validation_loader, leave_loaders

_OWNER = "LinearProbeMixin"


class LinearProbeMixin(AdapterMixin):
    """A frozen backbone in eval mode; only what lies outside it trains, on features that are computed once.

    ``class Net(LinearProbeMixin, MyModule)``. Without more, every step runs the backbone. With ``feature_cache`` it runs once over
    training and validation rows; from then on epochs train the head alone, with the results of the uncached run. For that the
    module's steps call ``self.features(inputs)``, where ``inputs`` is the batch, or its first part where a batch is a tuple:
    your own method of that name, or the mixin's, which pools a transformers backbone's hidden states by ``pooling`` and ``layers``
    and takes any other backbone's output as it is.

    With ``solver="lbfgs"`` or ``"ridge"`` there are no epochs at all: :func:`~lightning_peft.probes.fit_linear` fits the head, a
    linear layer on the features, for each of ``penalties``, and validation rows choose. The fit then has one step, in which
    nothing moves; validation, logging and checkpoints are as ever.

    Alain & Bengio 2016, arXiv:1610.01644; Kornblith et al. 2019, arXiv:1805.08974 (L-BFGS with a path of penalties).

    **The trap:** of transformers' decoders the mean of the last layer is seldom the best feature. Look at several ``layers``.

    Args:
        *args: Handed on to the module.
        adapter: :class:`LinearProbe`.
        backbone: As in :class:`AdapterMixin`.
        feature_cache: A :class:`~lightning_peft.data.FeatureCache`, a folder for one, or True for a temporary one.
        solver: ``"sgd"``, the module's own optimizer, or ``"lbfgs"`` or ``"ridge"``.
        **kwargs: Handed on to the module.

    Raises:
        ValueError: When a fit begins, if rows are random, a loader's order is not known, features depend on what trains or are
            random in training, or the head is not a linear layer on the features; in training, if the steps do not ask for
            features or the backbone moves.
    """

    feature_cache: FeatureCache | None = None
    solver: Literal["sgd", "lbfgs", "ridge"] = "sgd"
    pooling: Pooling = "mean"
    """How tokens become one vector: :func:`~lightning_peft.probes.pool`."""
    layers: Sequence[int] = (-1,)
    """Which hidden states are read; several stand side by side."""
    penalties: Sequence[float] = PENALTIES
    """What a solver tries."""
    probe_head: str = "head"
    """Dotted name of the head that a solver fits."""
    cached_inputs: Sequence[str] = ()
    """What of a mapping the steps need beside the features, though ``features`` reads it too."""
    linear_fit: LinearFit | None = None
    """What a solver found."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let features be asked for through the cache, wherever they are defined."""
        super().__init_subclass__(**kwargs)
        if "features" in vars(cls):
            cls.features = _through_cache(cls.features)  # type: ignore[method-assign,assignment]

    def __init__(
        self,
        *args: Any,
        adapter: LinearProbe = LinearProbe(),
        backbone: str | None = None,
        feature_cache: FeatureCache | str | Path | bool | None = None,
        solver: Literal["sgd", "lbfgs", "ridge"] = "sgd",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)
        if solver not in ("sgd", "lbfgs", "ridge"):
            raise ValueError(f"{_OWNER}: solver={solver!r} must be 'sgd', 'lbfgs' or 'ridge'.")
        for name in self.hparams.keys() & {"feature_cache", "solver"}:
            del self.hparams[name]
        if feature_cache is True or (feature_cache is None and solver != "sgd"):
            feature_cache = FeatureCache()
        elif isinstance(feature_cache, str | Path):
            feature_cache = FeatureCache(feature_cache)
        self.feature_cache, self.solver = feature_cache or None, solver
        self._cached: dict[str, CachedRows] = {}
        self._asked = False

    def features(self, inputs: Any) -> Any:
        """Return the features of some inputs, ``(rows, features)``.

        From the cache; else by the module's own method of this name; else the backbone's pooled hidden states, or its output.
        """
        if isinstance(inputs, CachedInputs):
            self._asked = True
            return inputs[FEATURES]
        own = getattr(super(), "features", None)
        if own is not None:
            return own(inputs)
        network = self.adapted_network
        if isinstance(inputs, Mapping) and hasattr(network, "config"):
            return hidden_features(network, inputs, layers=self.layers, pooling=self.pooling)
        return network(inputs)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.feature_cache is not None:
            self._cached, self._asked = {}, False
            change_train_loader(self.trainer, _OWNER, functools.partial(self._with_features, name="train"), rows=True)
            change_validation_loader(self.trainer, _OWNER, functools.partial(self._with_features, name="validation"))

    @override
    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if stage == "fit":
            leave_loaders(self.trainer, _OWNER)

    @override
    def configure_optimizers(self) -> Any:
        if self.solver == "sgd":
            return super().configure_optimizers()
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.0)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.solver != "sgd":
            self._solve()
        self._versions = _versions(self.adapted_network)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.solver != "sgd":
            self.trainer.should_stop = True
        if self.feature_cache is None:
            return
        if not self._asked:
            raise ValueError(
                f"{type(self).__name__}: training_step did not call self.features(inputs), so the feature cache is of no use. Call "
                "it where the step runs the backbone now, or leave feature_cache out."
            )
        if _versions(self.adapted_network) != self._versions:
            raise ValueError(
                f"{type(self).__name__}: the backbone has changed while its features came from the cache. What changes it (a "
                "schedule, an average of weights) does not go with feature_cache; leave one of them out."
            )

    # --- the cached loaders -----------------------------------------------------------------------------------------------

    def _with_features(self, loaders: Any, name: str) -> Any:
        """Return loaders of cached rows in the place of these."""
        if isinstance(loaders, list | tuple):
            return type(loaders)(self._with_features(one, f"{name} {number}") for number, one in enumerate(loaders))
        if isinstance(loaders, MixLoader):
            raise ValueError(f"{_OWNER}: a feature cache does not go with ReplayMixing, which changes the rows.")
        if not isinstance(loaders, DataLoader) or type(loaders.batch_sampler) not in (BatchSampler, type(None)):
            raise ValueError(
                f"{_OWNER}: the {name} loader is a {type(loaders).__name__} whose order is not known, so its features cannot be "
                "cached. Give a DataLoader with a batch_size."
            )
        rows = self._rows(loaders, name)
        self._cached[name] = rows
        one_step = self.solver != "sgd" and name.startswith("train")
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_size=len(rows) if one_step else loaders.batch_size,
            sampler=None if one_step else loaders.sampler,
            drop_last=loaders.drop_last,
            generator=loaders.generator,
            collate_fn=CachedBatch(isinstance(rows.rest, list) and isinstance(rows.rest[0], Mapping)),  # type: ignore[arg-type]
        )
        return loader

    def _rows(self, loader: DataLoader[Any], name: str) -> CachedRows:
        assert self.feature_cache is not None
        trainer = self.trainer
        plugin: Any = trainer.precision_plugin

        def extract(batch: Any) -> tuple[Any, Any]:
            batch = trainer.strategy.batch_to_device(plugin.convert_input(batch), self.device)
            inputs, rest = divided(batch)
            read = Reads(inputs) if isinstance(inputs, Mapping) else inputs
            found = self.features(read)
            if isinstance(read, Reads):
                dropped = read.not_needed() - set(self.cached_inputs)
                rest = {key: value for key, value in inputs.items() if key not in dropped}
            return on_cpu(found), on_cpu(rest)

        @contextmanager
        def context() -> Iterator[None]:
            with untouched(self, self.device), plugin.forward_context():
                yield

        some = loader.collate_fn([loader.dataset[place] for place in range(min(2, len(loader.dataset)))])  # type: ignore[arg-type]
        some = trainer.strategy.batch_to_device(plugin.convert_input(some), self.device)
        refuse_moving(self, self.features, divided(some)[0], context)
        return self.feature_cache.rows(loader, extract, key=self._key(), name=name, context=context)

    def _key(self) -> str:
        """Say which network and function gives the features."""
        trained = {name for name, one in self.named_parameters() if one.requires_grad}
        frozen = {name: one for name, one in fingerprint_to_plain(fingerprint(self)).items() if name not in trained}
        own = {"pooling": self.pooling, "layers": list(self.layers), "precision": str(self.trainer.precision)}
        return key_of(frozen, own, list(self.cached_inputs), _sources(type(self)))

    # --- the solvers ------------------------------------------------------------------------------------------------------

    def _solve(self) -> None:
        layer, train = output_layer(self, self.probe_head, owner=_OWNER), self._cached["train"]
        validation = self._cached.get("validation", self._cached.get("validation 0"))
        if validation is None:
            raise ValueError(
                f"{_OWNER}: solver={self.solver!r} chooses its penalty by validation rows. Give a validation loader and a "
                "validation_step."
            )
        features = train.all()
        if features.dim() != 2 or not isinstance(self.get_submodule(self.probe_head), nn.Linear):
            raise ValueError(
                f"{_OWNER}: solver={self.solver!r} fits a linear layer on vectors; {self.probe_head!r} is "
                f"{type(self.get_submodule(self.probe_head)).__name__}, the features are {tuple(features.shape)}. Use solver='sgd'."
            )
        targets, held = targets_of(train), targets_of(validation)
        outputs = None if targets.is_floating_point() else layer.out_features
        chosen: Any = self.solver
        fit = fit_linear(
            features,
            targets,
            (validation.all(), held),
            solver=chosen,
            penalties=self.penalties,
            outputs=outputs,
        )
        with torch.no_grad():
            layer.weight.copy_(fit.weight)
            if layer.bias is None:
                raise ValueError(f"{_OWNER}: the head {self.probe_head!r} has no bias, and the solution has one.")
            layer.bias.copy_(fit.bias)
        self.linear_fit = fit
        log_values(self.trainer, {"learn/probe_penalty": fit.penalty, "learn/probe_validation": fit.score})
        rank_zero_info(
            f"{_OWNER}: {self.solver} chose penalty {fit.penalty:g} of {len(fit.path)}; validation {fit.score:.3f}, training "
            f"{fit.train_score:.3f}."
        )


def _through_cache(features: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(features)
    def asked(self: LinearProbeMixin, inputs: Any) -> Any:
        if isinstance(inputs, CachedInputs):
            return LinearProbeMixin.features(self, inputs)
        return features(self, inputs)

    return asked


def _versions(network: nn.Module) -> list[int]:
    return [tensor._version for tensor in (*network.parameters(), *network.buffers())]


def _sources(cls: type) -> list[str]:
    """Return the text of every method ``features`` of a class."""
    found = []
    for base in cls.__mro__:
        method = vars(base).get("features")
        if method is not None:
            try:
                found.append(inspect.getsource(inspect.unwrap(method)))
            except (OSError, TypeError):
                found.append(f"{base.__module__}.{base.__qualname__}")
    return found

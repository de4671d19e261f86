"""LoRA: train a low-rank update beside frozen layers.

``y = W x + b + (alpha / rank) B A x`` with ``A`` of shape ``(rank, in)`` and ``B`` of shape ``(out, rank)``.
Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from torch import nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.eva import eva_start
from lightning_peft.adapters.layer_kinds import AdaptedParameters, kind_of
from lightning_peft.adapters.lora_init import initialise
from lightning_peft.adapters.lora_targets import Target, biases, check_apart, select_targets
from lightning_peft.adapters.lora_update import UPDATES, LoRAUpdate, ParametersLoRA
from lightning_peft.adapters.updates import Update, place

ValueT = TypeVar("ValueT", int, float)


@dataclass(frozen=True, repr=False)
class LoRA(Adapter):
    """Low-rank updates on chosen layers, everything else frozen.

    Layers may be ``nn.Linear``, transformers' ``Conv1D``, ``nn.Conv1d/2d/3d``, ``nn.Embedding``, ``nn.MultiheadAttention`` (its
    input and output projections) and parameters that hold a matrix per expert. Adding the adapter changes no output: ``B``
    starts at zero (of an embedding, ``A``), and where a start is another one, the update counts from it. On a bfloat16 or
    float16 base the matrices stay float32 and are cast at each use.

    **The trap:** less capacity is no protection. LoRA moves less than full fine-tuning, and forgets about as much for
    the distance that it moves; put ``ReplayMixing`` beside it.

    Args:
        rank: Rank of the update, at most the smaller side of every target.
        alpha: The update is scaled by ``alpha / rank``, so that a change of rank needs no new learning rate.
        targets: Globs over layer names relative to the adapted network, or ``"all-linear"``: every linear layer
            except an output embedding that shares its weight with the input's, and except the output embedding and the
            head of a transformers model. Of fused experts the name is that of the parameter, ``"*.experts.down_proj"``.
        exclude: Globs of layers to leave out.
        dropout: Probability of dropping an input of the update during training; embeddings, attention in one module and
            experts have none. It follows the layer's train or eval mode, and networks of ``from_pretrained`` come in eval
            mode: call ``train()`` on them if dropout is to act.
        rank_pattern: Ranks of their own, by glob; the first glob that matches a layer counts.
        alpha_pattern: Likewise for ``alpha``.
        scaling: ``"lora"`` for ``alpha / rank``, ``"rslora"`` for ``alpha / sqrt(rank)``, which keeps the size of the update
            where ranks are large (Kalajdzievski 2023, arXiv:2312.03732, section 3).
        init: Where ``A`` and ``B`` start on linear layers. ``"default"``: Kaiming-uniform and zero. ``"pissa"``: the largest
            singular directions of ``W`` (Meng et al. 2024, arXiv:2404.02948, section 3). ``"olora"``: the first directions of its
            QR factors (Büyükakyüz 2024, arXiv:2406.01775). ``"orthogonal"``: orthogonal halves. ``"eva"``: the largest
            directions of the layer's inputs (Paischer et al. 2024, arXiv:2410.07170, section 3), from the ``batches=`` of
            ``add_adapter``. ``W`` is not touched by any.
        dora: Train the length of every row of ``W + update`` apart from its direction (Liu et al. 2024, arXiv:2402.09353).
        bias: ``"all"`` also trains every bias of the network, ``"lora_only"`` those of the targets.

    Raises:
        ValueError: For a value out of range, here; for targets that do not fit a network, when it is adapted.

    >>> LoRA(rank=4, targets=["*.query", "*.value"]).scale_of("layer.0.query")
    4.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Literal["all-linear"] | list[str] | tuple[str, ...] = "all-linear"
    exclude: list[str] | tuple[str, ...] = ()
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    scaling: Literal["lora", "rslora"] = "lora"
    init: Literal["default", "pissa", "olora", "orthogonal", "eva"] = "default"
    dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        super().__post_init__()
        for name, rank in [("rank", self.rank), *_entries("rank_pattern", self.rank_pattern)]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"LoRA: {name}={rank!r} must be a whole number of at least 1.")
        for name, alpha in [("alpha", self.alpha), *_entries("alpha_pattern", self.alpha_pattern)]:
            if not math.isfinite(alpha) or alpha == 0:
                raise ValueError(f"LoRA: {name}={alpha!r} must be a finite number other than 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout={self.dropout!r} must lie in [0, 1).")
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            raise ValueError(f"LoRA: targets={self.targets!r} must be 'all-linear' or a list of globs.")
        self._check_choices()
        for name in ("targets", "exclude"):  # equal and hashable, whichever sequence they came as
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value))

    def _check_choices(self) -> None:
        hints = get_type_hints(LoRA)
        for name in ("scaling", "init", "bias"):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(f"LoRA: {name}={getattr(self, name)!r} must be one of {list(get_args(hints[name]))}.")
        if isinstance(self.exclude, str):
            raise ValueError(f"LoRA: exclude={self.exclude!r} must be a list of globs.")

    def rank_of(self, layer: str) -> int:
        """Return the rank of the update of a layer."""
        return _first_match(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """Return the ``alpha`` of the update of a layer."""
        return _first_match(self.alpha_pattern, layer, self.alpha)

    def scale_of(self, layer: str) -> float:
        """Return the factor of the update of a layer."""
        rank, alpha = self.rank_of(layer), self.alpha_of(layer)
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        targets = self.select(model)
        self._check(targets)
        check_apart(self.also(model), targets, owner="LoRA")
        also = biases(model, self.bias, targets)
        trained = []
        for host in dict.fromkeys(target.host for target in targets.values()):
            mine = {key: target for key, target in targets.items() if target.host == host}
            update = self._update(model.get_submodule(host), mine)
            kind = kind_of(model.get_submodule(host)) or AdaptedParameters
            prefix = place(kind.adapt(model.get_submodule(host)), name, update)
            trained += [f"{host}.{prefix}{parameter}".lstrip(".") for parameter in update.trainable()]
        return trained + also

    def _update(self, module: nn.Module, targets: Mapping[str, Target]) -> Update:
        key, target = next(iter(targets.items()))
        rank, scale, kind = self.rank_of(key), self.scale_of(key), kind_of(module)
        if kind is None:
            return ParametersLoRA(
                module, [path for t in targets.values() for path in t.parameters], rank=rank, scale=scale
            )
        adapted: Any = kind.adapt(module)
        update: LoRAUpdate = UPDATES[kind](adapted, rank=rank, scale=scale, dropout=self.dropout, dora=self.dora)
        if not target.on_meta:
            initialise(update, adapted, self.init)
        return update

    @override
    def learn_start(self, model: nn.Module, name: str, batches: Iterable[Any]) -> Adapter:
        if self.init != "eva":
            return super().learn_start(model, name, batches)
        return eva_start(model, name, self, batches)

    @override
    def select(self, model: nn.Module) -> dict[str, Target]:
        """Return what of ``model`` this adapter would adapt, by name.

        Raises:
            ValueError: If a glob matches nothing, or a layer shares its weight.
        """
        return select_targets(model, self.targets, self.exclude, owner="LoRA")

    def _check(self, chosen: Mapping[str, Target]) -> None:
        for pattern in (self.rank_pattern, self.alpha_pattern):
            if unmatched := [glob for glob in pattern if not any(fnmatchcase(key, glob) for key in chosen)]:
                raise ValueError(f"LoRA: the pattern {unmatched[0]!r} matches none of the {len(chosen)} targets.")
        small = {
            key: f"{key!r} ({t.width} -> {t.out})"
            for key, t in chosen.items()
            if self.rank_of(key) > min(t.width, t.out)
        }
        if small:
            raise ValueError(
                f"LoRA: rank={self.rank} is above the size of {', '.join(small.values())}. "
                f"Lower the rank, or leave out with exclude={list(small)}."
            )
        for key, target in chosen.items():
            if reason := target.refusal(rank=self.rank_of(key), dora=self.dora, init=self.init):
                raise ValueError(f"LoRA: {key!r} {reason} Leave it out with exclude=[{key!r}].")


def _first_match(pattern: Mapping[str, ValueT], name: str, otherwise: ValueT) -> ValueT:
    return next((value for glob, value in pattern.items() if fnmatchcase(name, glob)), otherwise)


def _entries(name: str, pattern: Mapping[str, ValueT]) -> list[tuple[str, ValueT]]:
    return [(f"{name}[{glob!r}]", value) for glob, value in pattern.items()]

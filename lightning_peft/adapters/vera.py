"""VeRA: train two vectors per layer beside random matrices that all layers share.

``y = W x + b0 + b * (B (d * (A x)))`` with ``A`` of shape ``(rank, in)`` and ``B`` of shape ``(out, rank)``, drawn once and
frozen. Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.layer_kinds import kind_of
from lightning_peft.adapters.layer_targets import select_layers
from lightning_peft.adapters.lora_targets import LINEAR, Target, check_apart
from lightning_peft.adapters.updates import master_dtype, place
from lightning_peft.adapters.vera_update import Projections, VeRAUpdate


@dataclass(frozen=True, repr=False)
class VeRA(Adapter):
    """Low-rank updates from one shared pair of random matrices, of which only two scaling vectors per layer train.

    The matrices are large enough for the widest layer, and smaller layers use their first columns and rows. They are
    drawn from ``seed`` alone, as PEFT draws them, and are in no checkpoint: the seed is. Adding the adapter changes no
    output: ``b`` starts at zero. On a bfloat16 or float16 base vectors and matrices stay float32 and are cast at each use.

    **The trap:** the matrices depend on the widest of the *chosen* layers. Another choice of targets is another pair, and
    vectors that were trained beside the first mean nothing beside it.

    Args:
        rank: Rank of the update; far above LoRA's, since a rank costs one number per layer.
        targets: Globs over names of ``nn.Linear`` or transformers' ``Conv1D`` layers, or ``"all-linear"``, as for ``LoRA``.
        exclude: Globs of layers to leave out.
        seed: Seed of the shared matrices, PEFT's ``projection_prng_key``.
        d_initial: Where ``d`` starts.
        dropout: Probability of dropping an input of the update during training.

    Raises:
        ValueError: For a value out of range, here; for targets that do not fit a network, when it is adapted.

    >>> from lightning_peft import add_adapter
    >>> net = add_adapter(nn.Sequential(nn.Linear(8, 3)), VeRA(rank=4))
    >>> [(name, len(p)) for name, p in net.named_parameters() if p.requires_grad]
    [('0.adapters.default.vera_lambda_b', 3), ('0.adapters.default.vera_lambda_d', 4)]
    """

    rank: int = 256
    targets: Literal["all-linear"] | list[str] | tuple[str, ...] = "all-linear"
    exclude: list[str] | tuple[str, ...] = ()
    seed: int = 0
    d_initial: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        super().__post_init__()
        for name, least in (("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"VeRA: {name}={value!r} must be a whole number of at least {least}.")
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise ValueError(f"VeRA: d_initial={self.d_initial!r} must be a finite number other than 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"VeRA: dropout={self.dropout!r} must lie in [0, 1).")
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            raise ValueError(f"VeRA: targets={self.targets!r} must be 'all-linear' or a list of globs.")
        if isinstance(self.exclude, str):
            raise ValueError(f"VeRA: exclude={self.exclude!r} must be a list of globs.")
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value))

    @override
    def select(self, model: nn.Module) -> dict[str, Target]:
        """Return the layers of ``model`` that this adapter would update, by name.

        Raises:
            ValueError: If a glob matches nothing, or a layer does not fit.
        """
        return select_layers(model, self.targets, self.exclude, LINEAR, owner="VeRA")

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        targets = self.select(model)
        check_apart(self.also(model), targets, owner="VeRA")
        first = next(iter(targets.values())).module.get_parameter("weight")
        shared = Projections(
            self.rank, max(t.width for t in targets.values()), max(t.out for t in targets.values()), self.seed
        ).to(first.device, master_dtype(first.dtype))
        trained: list[str] = []
        for host, target in targets.items():
            kind = kind_of(target.module)
            assert kind is not None
            layer = kind.adapt(target.module)
            update = VeRAUpdate(layer, target, shared, d_initial=self.d_initial, dropout=self.dropout)
            if not trained:
                update.projections = shared  # registered once, so that it moves and is copied with the network
            prefix = place(layer, name, update)
            trained += [f"{host}.{prefix}{parameter}".lstrip(".") for parameter in update.trainable()]
        return trained

"""Hold a freshly added head at zero, so that its first gradients cannot hurt the pretrained network.

With logits ``W h + b`` the gradient that reaches the features is ``W^T dL/dlogits``: zero while ``W`` is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from lightning_peft.heads import output_layer, prior_bias, zero_init
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "ZeroInitHead"


class ZeroInitHead(pl.Callback):
    """Zero the output layer of a head before training starts.

    The first loss of a classifier is then ``ln(classes)`` and the first gradient of the backbone exactly zero.
    Kumar et al. 2022, arXiv:2202.10054, show what the gradients of a random head do to pretrained features.

    **The trap:** it protects the first steps only. The head grows, and full fine-tuning then forgets as it would have.

    With ``bias="prior"`` the head starts at the average of the training targets instead of at zero (see
    :func:`~lightning_peft.heads.prior_bias`), so that the first steps need not learn how common each class is; the gradient
    of the backbone is zero as before. The targets are read from the training loader once, before the first step, with the
    random state put back; every process reads its own share.

    Args:
        head: Dotted name of the head inside the LightningModule. Of a multi-layer head only the last linear layer is
            zeroed: zeroing all of them would stop learning for good.
        bias: What the bias of the output layer starts at.
        target: What returns the targets of a batch. Without it: the entry ``labels`` or ``label`` of a mapping, the last one of a
            sequence.

    Raises:
        ValueError: If ``bias`` is unknown; before training, if the name is unknown, holds no linear layer, or that layer is
            frozen, or has no bias for the prior, or the targets do not fit its outputs.
    """

    def __init__(
        self,
        head: str = "head",
        bias: Literal["zero", "prior"] = "zero",
        target: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if bias not in {"zero", "prior"}:
            raise ValueError(f"{_OWNER}: bias={bias!r} is unknown; take 'zero' or 'prior'.")
        self.head, self.bias, self.target = head, bias, target

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        # Before Lightning restores a checkpoint: a resumed head keeps what it has learned. So does a head whose
        # trainer has taken steps already and fits on.
        if stage != "fit" or trainer.global_step > 0:
            return
        if self.head not in dict(pl_module.named_modules()):
            pl_module.configure_model()  # a network that is built there; Lightning asks for it to be idempotent
        layer = output_layer(pl_module, self.head, owner=_OWNER)
        if self.bias == "prior" and layer.bias is None:
            raise ValueError(f"{_OWNER}: head={self.head!r} has no bias to hold a prior. Leave bias='prior' out.")
        zero_init(layer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not output_layer(pl_module, self.head, owner=_OWNER).weight.requires_grad:
            raise ValueError(
                f"{_OWNER}: the weight of head={self.head!r} is frozen, so it would stay zero and pass no gradient on. "
                "Keep the head outside the backbone that an adapter freezes, or leave ZeroInitHead out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bias == "zero" or trainer.global_step > 0:  # a resumed head keeps its bias
            return
        layer = output_layer(pl_module, self.head, owner=_OWNER)
        if hasattr(layer.bias, "device_mesh"):
            raise ValueError(f"{_OWNER}: the head is sharded, where a prior was never tried. Leave bias='prior' out.")
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            prior = prior_bias(self._targets(trainer), layer.out_features, owner=_OWNER)
        with torch.no_grad():
            layer.bias.copy_(prior.to(layer.bias))
        rank_zero_info(
            f"{_OWNER}: the bias of {self.head!r} starts at {[round(value, 4) for value in prior.tolist()[:8]]}."
        )

    def _targets(self, trainer: pl.Trainer) -> Iterator[Tensor]:
        if math.isinf(trainer.num_training_batches):
            raise ValueError(
                f"{_OWNER}: the training loader has no end, so there is no average target. Give limit_train_batches."
            )
        loader: Any = trainer.train_dataloader
        batches = tqdm(
            islice(loader, int(trainer.num_training_batches)),
            total=int(trainer.num_training_batches),
            desc="targets",
            delay=2,
            leave=False,
            disable=trainer.progress_bar_callback is None or trainer.global_rank > 0,
        )
        for batch in batches:
            yield self.target(batch) if self.target is not None else _target_of(batch)


def _target_of(batch: Any) -> Tensor:
    found = batch.get("labels", batch.get("label")) if isinstance(batch, Mapping) else None
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        found = batch[-1]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{_OWNER}: where the targets are in a batch of type {type(batch).__name__} is not known. Give target=."
        )
    return found

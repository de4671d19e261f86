"""Hold a freshly added head at zero, so that its first gradients cannot hurt the pretrained network.

With logits ``W h + b`` the gradient that reaches the features is ``W^T dL/dlogits``: zero while ``W`` is zero.
"""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_peft.heads import output_layer, zero_init
from lightning_peft.one_lightning import refuse_pytorch_lightning


class ZeroInitHead(pl.Callback):
    """Zero the output layer of a head before training starts.

    The first loss of a classifier is then ``ln(classes)`` and the first gradient of the backbone exactly zero.
    Kumar et al. 2022, arXiv:2202.10054, show what the gradients of a random head do to pretrained features.

    **The trap:** it protects the first steps only. The head grows, and full fine-tuning then forgets as it would have.

    Args:
        head: Dotted name of the head inside the LightningModule. Of a multi-layer head only the last linear layer is
            zeroed: zeroing all of them would stop learning for good.

    Raises:
        ValueError: Before training, if the name is unknown, holds no linear layer, or that layer is frozen.
    """

    def __init__(self, head: str = "head") -> None:
        self.head = head

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), "ZeroInitHead")
        # Before Lightning restores a checkpoint: a resumed head keeps what it has learned. So does a head whose
        # trainer has taken steps already and fits on.
        if stage != "fit" or trainer.global_step > 0:
            return
        if self.head not in dict(pl_module.named_modules()):
            pl_module.configure_model()  # a network that is built there; Lightning asks for it to be idempotent
        zero_init(output_layer(pl_module, self.head, owner="ZeroInitHead"))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not output_layer(pl_module, self.head, owner="ZeroInitHead").weight.requires_grad:
            raise ValueError(
                f"ZeroInitHead: the weight of head={self.head!r} is frozen, so it would stay zero and pass no gradient on. "
                "Keep the head outside the backbone that an adapter freezes, or leave ZeroInitHead out."
            )

"""Give a LightningModule an adapter: one more base class, no change to the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_peft.adapters import Adapter, FullFinetune, LinearProbe, LoRA, add_adapter
from lightning_peft.adapters.attachment import Attachment, attachment_of
from lightning_peft.checkpointing import RECORD, complete, refresh_base, slim
from lightning_peft.freezing import trainable_count
from lightning_peft.matching import nearest
from lightning_peft.mixins.order import refuse_order


class AdapterMixin(pl.LightningModule):
    """Adapt the pretrained network inside a LightningModule.

    ``class Sentiment(AdapterMixin, MyModule)`` is all: the adapter comes in ``configure_model``, after the module's
    own, freezes the backbone and leaves what lies outside it trainable. Checkpoints then hold what trains and a
    fingerprint of the base; they load only on the base that they belong to. Weights saved without the adapter load
    with ``load_state_dict(..., strict=False)`` before or after.

    **The trap:** the mixin stands *before* the module in the list of bases, else its hooks are never called.

    Args:
        *args: Handed on to the module.
        adapter: What to add.
        backbone: Dotted name of the pretrained network inside the module.
        **kwargs: Handed on to the module.

    Raises:
        ValueError: When the adapter is attached, if there is no such backbone or the adapter does not fit it; when a
            checkpoint is loaded, if it does not belong here.
    """

    adapter: Adapter
    backbone_name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the mixin would be skipped."""
        super().__init_subclass__(**kwargs)
        refuse_order(cls, AdapterMixin)

    def __init__(self, *args: Any, adapter: Adapter, backbone: str = "backbone", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = as_adapter(adapter)
        self.backbone_name = backbone
        # save_hyperparameters() in the module collects our arguments too. As plain data they load with weights_only.
        if isinstance(self.hparams.get("adapter"), Adapter):
            self.hparams["adapter"] = self.adapter.to_plain()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        backbone = dict(self.named_modules()).get(self.backbone_name)  # may be built in configure_model only
        if backbone is not None and (attachment := attachment_of(backbone)) is not None:
            refresh_base(backbone, attachment)

    @override
    def configure_model(self) -> None:
        super().configure_model()
        self.attach_adapter()

    def attach_adapter(self) -> None:
        """Put the adapter on now; a second call does nothing.

        ``configure_model`` does it by itself. Call it there yourself, before ``fully_shard``, if your module shards.
        """
        if attachment_of(self.adapted_network) is None:
            add_adapter(self.adapted_network, self.adapter)
            if self.adapter.frozen_features:
                self.adapted_network.eval()

    @property
    def adapted_network(self) -> nn.Module:
        """The backbone.

        Raises:
            ValueError: If the module has no child of that name.
        """
        children: dict[str, nn.Module] = {name: child for name, child in self.named_modules() if name}
        if self.backbone_name not in children:
            raise ValueError(
                f"{type(self).__name__}: backbone={self.backbone_name!r} is none of its modules. "
                f'Nearest: {nearest(self.backbone_name, children)}. Pass backbone="name" with the name of the '
                "pretrained network."
            )
        return children[self.backbone_name]

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        backbone = dict(self.named_modules()).get(getattr(self, "backbone_name", ""))
        if backbone is not None and self.adapter.frozen_features:
            backbone.eval()
        return self

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        for logger in self.loggers:
            logger.log_metrics({"adapter/trainable_parameters": trainable_count(self)}, step=self.global_step)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        slim(checkpoint, self, self.backbone_name, self._attached())
        checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(self._plain_arguments(checkpoint))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.attach_adapter()
        complete(checkpoint, self, self.backbone_name, self._attached())

    def _attached(self) -> Attachment:
        attachment = attachment_of(self.adapted_network)
        assert attachment is not None
        return attachment

    def _plain_arguments(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return our own arguments for ``load_from_checkpoint``; LightningCLI has written its own form of them."""
        if "_instantiator" in checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]:
            return {}
        return {"adapter": checkpoint[RECORD]["adapter"], "backbone": self.backbone_name}


class LoRAMixin(AdapterMixin):
    """Low-rank updates on the backbone: :class:`AdapterMixin` with ``adapter=LoRA()``."""

    def __init__(self, *args: Any, adapter: LoRA = LoRA(), backbone: str = "backbone", **kwargs: Any) -> None:  # noqa: B008
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)


class LinearProbeMixin(AdapterMixin):
    """A frozen backbone in eval mode; only what lies outside it trains."""

    def __init__(
        self,
        *args: Any,
        adapter: LinearProbe = LinearProbe(),
        backbone: str = "backbone",
        **kwargs: Any,  # noqa: B008
    ) -> None:
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)


class FullFinetuneMixin(AdapterMixin):
    """Everything trains; checkpoints and schedules work as on the other rungs."""

    def __init__(
        self,
        *args: Any,
        adapter: FullFinetune = FullFinetune(),
        backbone: str = "backbone",
        **kwargs: Any,  # noqa: B008
    ) -> None:
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)


def as_adapter(value: Adapter | Mapping[str, Any]) -> Adapter:
    """Return an adapter given as itself or as the plain data of a checkpoint.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(value, Adapter):
        return value
    if isinstance(value, Mapping):
        return Adapter.from_plain(value)
    raise TypeError(f"adapter={value!r} must be an Adapter, for instance LoRA(rank=8).")

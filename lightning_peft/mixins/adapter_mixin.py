"""Give a LightningModule an adapter: one more base class, no change to the module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Self

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_peft.adapters import Adapter, add_adapter, set_adapter
from lightning_peft.adapters.attachment import Attachment, attachment_of, check_whole, refresh_base
from lightning_peft.adapters.backbone import WHOLE, find_backbone, prefix_of, submodule, unknown_backbone
from lightning_peft.checkpointing import complete, peek, read_record, slim
from lightning_peft.freezing import trainable_count, trainable_names
from lightning_peft.logging import log_values
from lightning_peft.mixins.guards import refuse_dead_adapters, refuse_fit, warn_of_moved_flags
from lightning_peft.mixins.order import is_mixin, refuse_order

# The record of the checkpoint that is being loaded, for the __init__ that rebuilds the module.
_LOADING: ContextVar[Mapping[str, Any] | None] = ContextVar("loading", default=None)


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
        backbone: Dotted name of the pretrained network inside the module, ``"."`` for the module itself; unset, the
            class attribute ``backbone_name``, and where that is None too, the child called ``backbone`` or the only
            one that fits. Where the module has a ``backbone`` argument of its own, the keyword is the module's and the
            class attribute is the way.
        **kwargs: Handed on to the module.

    Raises:
        ValueError: When the adapter is attached, if there is no such backbone or the adapter does not fit it; when a
            checkpoint is loaded, if it does not belong here.
    """

    adapter: Adapter | None
    backbone_name: str | None = None
    conditional_adapters: bool = False
    """Set this where a batch does not use every adapted layer, as in a mixture of experts: none is taken for dead then."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the mixin would be skipped."""
        super().__init_subclass__(**kwargs)
        refuse_order(cls, AdapterMixin)

    def __init__(self, *args: Any, adapter: Adapter | None = None, backbone: str | None = None, **kwargs: Any) -> None:
        own = own_signature(type(self))
        if backbone is not None and "backbone" in own.parameters:
            kwargs["backbone"] = backbone
        super().__init__(*args, **kwargs)
        # save_hyperparameters() in the module collects our arguments over the module's own. They are in the
        # checkpoint's record already; the module's must come back.
        for name in self.hparams.keys() & {"adapter", "backbone"}:
            if name in own.parameters:
                bound = own.bind(self, *args, **kwargs)
                bound.apply_defaults()
                self.hparams[name] = bound.arguments[name]
            else:
                del self.hparams[name]
        loaded = _LOADING.get()
        self.adapter = as_adapter(next(iter(loaded["adapters"].values())) if loaded else adapter)
        if loaded:
            self.backbone_name = loaded["backbone"]
        elif backbone is not None and "backbone" not in own.parameters:
            self.backbone_name = backbone

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild a module and its adapter from a checkpoint; ``adapter=`` need not be given again.

        Raises:
            ValueError: If the file is no checkpoint of an adapted module, or does not fit the class or its base.
        """
        weights_only = kwargs.get("weights_only") is not False
        record, _ = read_record(peek(checkpoint_path, weights_only=weights_only))
        token = _LOADING.set(None if "adapter" in kwargs else record)
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        finally:
            _LOADING.reset(token)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        name = type(self).__name__
        if self.adapter is None:
            raise ValueError(f"{name}: adapter=None; pass one, for instance {name}(..., adapter=LoRA(rank=8)).")
        attachment = self._attachment()
        if attachment is not None:
            refresh_base(self.adapted_network, attachment)
        if stage == "fit":
            refuse_fit(self.trainer, self, attached=attachment is not None)

    @override
    def configure_model(self) -> None:
        super().configure_model()
        self.attach_adapter()

    def attach_adapter(self) -> None:
        """Put the adapter on now; a second call does nothing.

        ``configure_model`` does it by itself. Call it there yourself, before ``fully_shard``, if your module shards.
        """
        if self.adapter is None or self._attachment() is not None:
            return
        name = type(self).__name__
        self.backbone_name = self.backbone_name or find_backbone(self, self.adapter, owner=name)
        add_adapter(self.adapted_network, self.adapter)
        if not trainable_count(self):
            raise ValueError(
                f"{name}: with {self.adapter!r} on backbone={self.backbone_name!r} nothing is left to train. Name the "
                "pretrained network alone, so that a head stays outside it."
            )
        if self.adapter.frozen_features:
            self.adapted_network.eval()

    @property
    def adapted_network(self) -> nn.Module:
        """The backbone.

        Raises:
            ValueError: If it has not been found yet, or the module has no child of that name.
        """
        owner = type(self).__name__
        if self.backbone_name is None:
            raise ValueError(f"{owner}: the backbone is found when the adapter comes. Call attach_adapter() first.")
        network = submodule(self, self.backbone_name)
        if network is None:
            raise unknown_backbone(self, self.backbone_name, owner=owner)
        return network

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        adapter = vars(self).get("adapter")  # the module's own __init__ may call this before ours has set it
        if adapter is not None and adapter.frozen_features and self._attachment() is not None:
            self.adapted_network.eval()
        return self

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # After ddp_spawn Lightning brings the trained weights back to a module that never saw configure_model.
        prefix = prefix_of(self.backbone_name or WHOLE)
        if any(key.startswith(prefix) for key in state_dict.keys() - self.state_dict().keys()):
            self.attach_adapter()
        return super().load_state_dict(state_dict, *args, **kwargs)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        warn_of_moved_flags(self.trainer, self, self._attached())

    @override
    def on_after_backward(self) -> None:
        super().on_after_backward()
        if not vars(self).get("_gradients_checked"):
            self._gradients_checked = True
            if self.automatic_optimization and not self.conditional_adapters:
                refuse_dead_adapters(self.trainer, self, self._attached())

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self._attached().ever_trained.update(trainable_names(self.adapted_network))

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        log_values(self.trainer, {"adapter/trainable_parameters": trainable_count(self)})

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        attachment = self._attached()
        check_whole(self.adapted_network, attachment, type(self).__name__)
        warn_of_moved_flags(self.trainer, self, attachment)
        slim(checkpoint, self, self.backbone_name or WHOLE, attachment)
        # A module that keeps one object of hyper-parameters, save_hyperparameters(cfg), is rebuilt as Module(cfg=...):
        # Lightning looks for that name in the signature of the mixin, where it is not.
        name = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_NAME)
        if name not in (None, "kwargs"):
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {name: checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]}
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = "kwargs"

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.attach_adapter()
        record, _ = read_record(checkpoint)
        attachment = self._attached()
        for name in record["adapters"].keys() - attachment.adapters.keys():
            add_adapter(self.adapted_network, Adapter.from_plain(record["adapters"][name]), name)
        if record.get("active") in {None, *attachment.adapters} - {attachment.active}:
            set_adapter(self.adapted_network, record.get("active"))
        complete(checkpoint, self, self.backbone_name or WHOLE, attachment)

    def _attachment(self) -> Attachment | None:
        """What the backbone remembers about its adapter; None before it comes (the network may not be built yet)."""
        network = submodule(self, self.backbone_name or "")
        return None if network is None else attachment_of(network)

    def _attached(self) -> Attachment:
        attachment = self._attachment()
        if attachment is None:
            raise ValueError(
                f"{type(self).__name__}: the backbone {self.backbone_name!r} carries no adapter (any more). "
                "Call self.attach_adapter(), or use the plain class where the adapter was taken off or merged."
            )
        return attachment


def as_adapter(value: Adapter | Mapping[str, Any] | None) -> Adapter | None:
    """Return an adapter given as itself or as the plain data of a checkpoint; None stays None.

    Raises:
        TypeError: For anything else.
    """
    if value is None or isinstance(value, Adapter):
        return value
    if isinstance(value, Mapping):
        return Adapter.from_plain(value)
    raise TypeError(f"adapter={value!r} must be an Adapter, for instance LoRA(rank=8).")


def own_signature(cls: type) -> inspect.Signature:
    """Return the signature of the user's own ``__init__``: of the first base that is no mixin nor made with one."""
    for base in cls.__mro__:
        if "__init__" in vars(base) and not is_mixin(base) and not issubclass(base, AdapterMixin):
            return inspect.signature(vars(base)["__init__"])
    return inspect.Signature()

"""Adapt a LightningModule class in one expression."""

from __future__ import annotations

import copyreg
import inspect
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_peft.adapters import Adapter, LoRA
from lightning_peft.mixins.adapter_mixin import AdapterMixin
from lightning_peft.one_lightning import refuse_pytorch_lightning

ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)

_MADE: dict[tuple[type, str, str | None], type] = {}


def adapted(module: type[ModuleT], adapter: Adapter = LoRA(), *, backbone: str | None = None) -> type[ModuleT]:
    """Return a subclass of ``module`` with an adapter: ``class Net(AdapterMixin, Net)`` without the class statement.

    The class keeps the name, the docstring and the arguments of ``module``, and takes ``adapter=`` and ``backbone=``
    besides; it and its instances pickle. Equal arguments give the same class.

    Args:
        module: The LightningModule class; its file stays untouched.
        adapter: What to add, unless an instance is made with another one.
        backbone: As in :class:`~lightning_peft.AdapterMixin`.

    Raises:
        TypeError: If ``module`` is an instance, no class of ``lightning.pytorch.LightningModule``, or adapted already; if it has an
            argument called ``adapter`` itself; if ``adapter`` is none.

    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> net = adapted(BoringModel, LoRA(rank=2), backbone=".")()
    >>> net.configure_model()
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['layer.adapters.default.lora_A', 'layer.adapters.default.lora_B']
    """
    if isinstance(module, type):
        refuse_pytorch_lightning(module, "adapted")
    if not (isinstance(module, type) and issubclass(module, pl.LightningModule)):
        raise TypeError(f"adapted: {module!r} must be a LightningModule class, not an instance or another class.")
    if issubclass(module, AdapterMixin):
        raise TypeError(f"adapted: {module.__name__} has an adapter mixin already; pass it adapter= instead.")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapted: {adapter!r} must be an adapter, such as LoRA(rank=8).")
    if "adapter" in inspect.signature(module).parameters:
        raise TypeError(
            f"adapted: {module.__name__} has an argument called adapter itself, which would be out of reach. Derive a "
            "class that gives it another name."
        )
    key = (module, repr(adapter), backbone)
    if key not in _MADE:
        _MADE[key] = _subclass(module, adapter, backbone)
    return _MADE[key]


def _subclass(module: type[pl.LightningModule], default: Adapter, found_at: str | None) -> type:
    # The class bears its base's name, so that pickle, which finds classes by name, would find the base. It asks the
    # metaclass first; that is also the one of classes derived from ours, which their names do find.
    kind: Any = type(module)
    meta: Any = type(f"Adapted{kind.__name__}", (kind,), {})
    copyreg.pickle(meta, lambda cls: (_again, cls.made_by) if "made_by" in vars(cls) else cls.__qualname__)

    class Adapted(AdapterMixin, module, metaclass=meta):  # type: ignore[misc, valid-type, metaclass]
        made_by = (module, default, found_at)

        def __init__(self, *args: Any, adapter: Adapter = default, backbone: str | None = None, **kwargs: Any) -> None:
            super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            if "__init__" in vars(cls):  # else the derived class would show the signature that we give to ours below
                cls.__signature__ = _without_self(inspect.signature(vars(cls)["__init__"]))

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Adapted, attribute, getattr(module, attribute))
    if found_at is not None:
        Adapted.backbone_name = found_at
    Adapted.__signature__ = _with_ours(inspect.signature(module), inspect.signature(Adapted.__init__))
    return Adapted


def _without_self(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _with_ours(own: inspect.Signature, ours: inspect.Signature) -> inspect.Signature:
    """Return a module's signature with our keywords put before its ``**kwargs``; a ``backbone`` may be its own."""
    added = [ours.parameters[name] for name in ("adapter", "backbone") if name not in own.parameters]
    rest = [parameter for parameter in own.parameters.values() if parameter.kind is parameter.VAR_KEYWORD]
    first = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    return own.replace(parameters=[*first, *added, *rest])


def _again(module: type[pl.LightningModule], adapter: Adapter, backbone: str | None) -> type:
    return adapted(module, adapter, backbone=backbone)

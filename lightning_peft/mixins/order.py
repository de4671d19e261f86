"""In which order mixins and modules may stand among the bases of a class."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_peft.one_lightning import refuse_pytorch_lightning


def refuse_order(cls: type, mixin: type) -> None:
    """Stop a class whose bases put a LightningModule of the user's before the mixin, or come from another Lightning.

    Raises:
        TypeError: With what works.
    """
    refuse_pytorch_lightning(cls, mixin.__name__)
    for base in cls.__mro__[1:]:
        if base is mixin:
            return
        if issubclass(base, pl.LightningModule) and not issubclass(base, mixin) and not is_mixin(base):
            raise TypeError(
                f"{cls.__name__}: {base.__name__} stands before {mixin.__name__}, so the mixin's hooks would be "
                f"skipped. Write class {cls.__name__}({mixin.__name__}, {base.__name__})."
            )


def is_mixin(cls: type) -> bool:
    """Whether a class is one of the library's mixins, which may stand in any order among themselves."""
    return cls.__module__.startswith("lightning_peft.mixins.")

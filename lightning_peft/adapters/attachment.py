"""What a network remembers about the adapter it carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.fingerprint import Fingerprint

_ATTRIBUTE = "lightning_peft_attachment"


@dataclass
class Attachment:
    """The adapter of a network, and what is needed to take it off again.

    Args:
        adapter: The adapter as it was asked for.
        name: The adapter's name, part of its parameters' names.
        base: Fingerprint of the network before the adapter came, so before any change of precision or sharding.
        flags: ``requires_grad`` of every parameter of the network before the adapter came.
        ever_trained: Names of the parameters that trained at any time since.
        attributes: Plain attributes that had to change, as (module, attribute, value found).
    """

    adapter: Adapter
    name: str
    base: Fingerprint
    flags: dict[str, bool]
    ever_trained: set[str] = field(default_factory=set)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return what ``model`` remembers about its adapter, or None if it carries none."""
    found = vars(model).get(_ATTRIBUTE)
    assert found is None or isinstance(found, Attachment)
    return found


def set_attachment(model: nn.Module, attachment: Attachment | None) -> None:
    """Let ``model`` remember (or forget) its adapter; plain data, so it is copied and pickled with the model."""
    if attachment is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = attachment

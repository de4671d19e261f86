"""Checkpoints that hold what trains, recognise the base they belong to, and never load by halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.adapter import PLAIN_FORMAT, Adapter
from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.fingerprint import (
    Fingerprint,
    fingerprint_differences,
    fingerprint_from_plain,
    fingerprint_to_plain,
    print_tensor,
)
from lightning_peft.freezing import record_trained
from lightning_peft.version import __version__

RECORD = "lightning_peft"
"""Key of our record in a checkpoint."""
_LISTED = 8


def slim(checkpoint: dict[str, Any], root: nn.Module, backbone: str, attachment: Attachment) -> None:
    """Cut the weights of a checkpoint to what training can have changed, and add the record that loading checks.

    What stays: everything outside the backbone, every backbone parameter that trained at any time so far, every
    backbone buffer that is no longer what it was when the adapter came.

    Args:
        checkpoint: A Lightning checkpoint, changed in place.
        root: The LightningModule.
        backbone: Dotted name of the adapted network inside it; empty if it is the module itself.
        attachment: What the backbone remembers about its adapter.
    """
    record_trained(root)
    prefix = f"{backbone}." if backbone else ""
    state: dict[str, Tensor] = checkpoint["state_dict"]
    parameters = {name for name, _ in root.named_parameters()}

    def stays(key: str) -> bool:
        if not key.startswith(prefix):
            return True
        name = key.removeprefix(prefix)
        if name in attachment.ever_trained:
            return True
        return key not in parameters and print_tensor(state[key]) != attachment.base.get(name)

    checkpoint["state_dict"] = {key: value for key, value in state.items() if stays(key)}
    checkpoint[RECORD] = {
        "format": PLAIN_FORMAT,
        "version": __version__,
        "adapter": attachment.adapter.to_plain(),
        "name": attachment.name,
        "backbone": backbone,
        "keys": list(checkpoint["state_dict"]),
        "base": fingerprint_to_plain(attachment.base),
    }


def complete(checkpoint: dict[str, Any], root: nn.Module, backbone: str, attachment: Attachment) -> None:
    """Check a slim checkpoint against the module, then fill in the base weights, so that it loads strictly.

    Raises:
        ValueError: If the checkpoint is foreign, damaged, of another adapter or of another base; the message lists the
            keys.
    """
    record = _read_record(checkpoint)
    prefix = f"{backbone}." if backbone else ""
    saved: dict[str, Tensor] = checkpoint["state_dict"]
    here: Mapping[str, Tensor] = root.state_dict()
    outside = {key for key in here if not key.startswith(prefix)}
    expected = outside | {prefix + name for name in attachment.ever_trained} | set(record["keys"])
    brought = {key.removeprefix(prefix) for key in saved if key.startswith(prefix)}
    base: Fingerprint = fingerprint_from_plain(record["base"])
    lines = {
        "missing from the checkpoint": sorted(expected - saved.keys()),
        "in the checkpoint but not in the module": sorted(saved.keys() - here.keys()),
        "of another shape": [
            f"{key}: {tuple(saved[key].shape)} in the checkpoint, {tuple(here[key].shape)} in the module"
            for key in sorted(saved.keys() & here.keys())
            if saved[key].shape != here[key].shape
        ],
        "different in the base network": fingerprint_differences(
            base, attachment.base, ignore=brought, model=root.get_submodule(backbone)
        ),
    }
    if any(lines.values()):
        adapter = Adapter.from_plain(record["adapter"])
        raise ValueError(
            f"The checkpoint (lightning_peft {record['version']}, {adapter!r}) does not fit this module "
            f"({attachment.adapter!r}):\n{_listing(lines)}"
            "Load it into the same class, with the same adapter, on the same pretrained weights."
        )
    attachment.ever_trained |= brought & set(attachment.flags)
    checkpoint["state_dict"] = {**here, **saved}


def refresh_base(backbone: nn.Module, attachment: Attachment) -> None:
    """Take the fingerprint of the frozen weights anew, in case a base checkpoint was loaded since the adapter came.

    Buffers keep their first print: one that moved since must stay in every checkpoint.
    """
    for name, parameter in backbone.named_parameters():
        if name in attachment.base and name not in attachment.ever_trained:
            taken = print_tensor(parameter)
            attachment.base[name] = taken if taken.digest else attachment.base[name]


def _read_record(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    record = checkpoint.get(RECORD)
    if not isinstance(record, Mapping):
        raise ValueError(
            f"The checkpoint has no {RECORD!r} record, so no module with an adapter mixin wrote it. To start from its "
            "weights, load them into the un-adapted module with load_state_dict before the run."
        )
    if missing := [key for key in ("format", "version", "adapter", "keys", "base") if key not in record]:
        raise ValueError(f"The checkpoint's {RECORD!r} record is damaged: it lacks {missing}. Use another checkpoint.")
    if record["format"] > PLAIN_FORMAT:
        raise ValueError(
            f"The checkpoint has format {record['format']!r}, written by lightning_peft {record['version']}; this is "
            f"{__version__} (format {PLAIN_FORMAT}). Upgrade lightning_peft."
        )
    return record


def _listing(lines: Mapping[str, list[str]]) -> str:
    text = ""
    for title, names in lines.items():
        if names:
            text += f"  {len(names)} {title}:\n" + "".join(f"    {name}\n" for name in names[:_LISTED])
            text += f"    ... and {len(names) - _LISTED} more\n" if len(names) > _LISTED else ""
    return text

"""Checkpoints that hold what trains, recognise the base they belong to, and never load by halves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
import torch
from torch import Tensor, nn

from lightning_peft.adapters.adapter import PLAIN_FORMAT, Adapter
from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.backbone import WHOLE, prefix_of
from lightning_peft.adapters.fingerprint import (
    Fingerprint,
    fingerprint_differences,
    fingerprint_from_plain,
    fingerprint_to_plain,
    print_tensor,
)
from lightning_peft.adapters.layer import is_merged
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
        backbone: Dotted name of the adapted network inside it, ``"."`` for the module itself.
        attachment: What the backbone remembers about its adapter.
    """
    record_trained(root)
    prefix = prefix_of(backbone)
    state: dict[str, Any] = checkpoint["state_dict"]
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}

    def stays(key: str) -> bool:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in attachment.ever_trained or not isinstance(state[key], Tensor):
            return True
        if key in parameters and name not in attachment.flags:  # of an adapter that has not acted yet
            return True
        return key not in parameters and print_tensor(state[key]) != attachment.base.get(name)

    checkpoint["state_dict"] = {key: value for key, value in state.items() if stays(key)}
    checkpoint[RECORD] = {
        "format": PLAIN_FORMAT,
        "version": __version__,
        "adapters": {name: adapter.to_plain() for name, adapter in attachment.adapters.items()},
        "active": attachment.active,
        "values": attachment.values,
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
    record, base = read_record(checkpoint)
    network = root if backbone == WHOLE else root.get_submodule(backbone)
    if is_merged(network):
        raise ValueError(
            "The adapter is merged into the base, so no checkpoint can be loaded. Call unmerge_adapter first."
        )
    prefix = prefix_of(backbone)
    saved: dict[str, Any] = checkpoint["state_dict"]
    here: Mapping[str, Any] = root.state_dict()
    outside = {key for key in here if not key.startswith(prefix)}
    added = {name for name, _ in network.named_parameters()} - attachment.flags.keys()
    expected = outside | {prefix + name for name in attachment.ever_trained | added} | set(record["keys"])
    brought = {key.removeprefix(prefix) for key in saved if key.startswith(prefix)}
    unbrought = {name for name, _ in network.named_buffers()} & (attachment.base.keys() - brought)
    prints = {name: (attachment.base[name], print_tensor(here[prefix + name])) for name in unbrought}
    lines = {
        "different in the adapter": _adapters_differences(record["adapters"], attachment.adapters),
        "missing from the checkpoint": sorted(expected - saved.keys()),
        "in the checkpoint but not in the module": sorted(saved.keys() - here.keys()),
        "of another shape": [
            f"{key}: {_shape(saved[key])} in the checkpoint, {_shape(here[key])} in the module"
            for key in sorted(saved.keys() & here.keys())
            if _shape(saved[key]) != _shape(here[key])
        ],
        "different in the base network": fingerprint_differences(base, attachment.base, ignore=brought, model=network),
        "moved here since the adapter came, and not in the checkpoint (load it into a fresh module)": sorted(
            name for name, (first, now) in prints.items() if first.dtype == now.dtype and first != now
        ),
    }
    if any(lines.values()):
        raise ValueError(
            f"The checkpoint (lightning_peft {record['version']}) does not fit this {type(root).__name__}:\n{_listing(lines)}"
            "Load it into the same class, with the same adapter, on the same pretrained weights."
        )
    attachment.ever_trained |= brought & set(attachment.flags)
    attachment.values = {name: dict(values) for name, values in record.get("values", {}).items()}
    checkpoint["state_dict"] = {**here, **saved}


def peek(path: str | Path | IO[bytes], *, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint file.

    Raises:
        ValueError: If it is no checkpoint.
        FileNotFoundError: If there is no such file.
    """
    try:
        if isinstance(path, str | Path):
            with fsspec.open(str(path), "rb") as stream:
                found = torch.load(stream, map_location="cpu", weights_only=weights_only)
        else:
            found = torch.load(path, map_location="cpu", weights_only=weights_only)
            path.seek(0)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}). It is damaged, or not a checkpoint. "
            "Objects of your own in it need weights_only=False."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a checkpoint.")
    return found


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _adapters_differences(saved: Mapping[str, Mapping[str, Any]], here: Mapping[str, Adapter]) -> list[str]:
    free = {"format", "version", "dropout"}  # dropout changes training, not what the weights mean
    lines = []
    for name in sorted(saved.keys() | here.keys()):
        theirs, ours = saved.get(name, {}), here[name].to_plain() if name in here else {}
        label = "" if saved.keys() == here.keys() == {name} else f"{name}."
        lines += [
            f"{label}{key}: {theirs.get(key)!r} in the checkpoint, {ours.get(key)!r} in the module"
            for key in sorted((theirs.keys() | ours.keys()) - free)
            if theirs.get(key) != ours.get(key)
        ]
    return lines


def read_record(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any], Fingerprint]:
    """Return our record in a checkpoint, and the fingerprint in it.

    Raises:
        ValueError: If there is none, it is damaged, or a newer library wrote it.
    """
    record = checkpoint.get(RECORD)
    if not isinstance(record, Mapping):
        raise ValueError(
            f"The checkpoint has no {RECORD!r} record, so no module with an adapter mixin wrote it. To start from its "
            "weights, load them into the un-adapted module with load_state_dict before the run."
        )
    types = {"format": int, "version": str, "adapters": Mapping, "keys": list, "base": Mapping, "backbone": str}
    damaged = [key for key, kind in types.items() if not isinstance(record.get(key), kind)]
    damaged += [] if isinstance(checkpoint.get("state_dict"), Mapping) else ["state_dict"]
    if damaged:
        raise ValueError(f"The checkpoint is damaged: {damaged} missing or unreadable. Use another checkpoint.")
    if record["format"] > PLAIN_FORMAT:
        raise ValueError(
            f"The checkpoint has format {record['format']!r}, written by lightning_peft {record['version']}; this is "
            f"{__version__} (format {PLAIN_FORMAT}). Upgrade lightning_peft."
        )
    try:
        return record, fingerprint_from_plain(record["base"])
    except (TypeError, ValueError) as error:
        raise ValueError("The checkpoint is damaged: 'base' is unreadable. Use another checkpoint.") from error


def _listing(lines: Mapping[str, list[str]]) -> str:
    text = ""
    for title, names in lines.items():
        if names:
            text += f"  {len(names)} {title}:\n" + "".join(f"    {name}\n" for name in names[:_LISTED])
            text += f"    ... and {len(names) - _LISTED} more\n" if len(names) > _LISTED else ""
    return text

"""Where every tensor of an adapter stands in PEFT's files, and in which shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.layer_kinds import AdaptedConv
from lightning_peft.adapters.lora_update import EmbeddingLoRA, LoRAUpdate, ParametersLoRA
from lightning_peft.adapters.updates import Update, hosts

PREFIX = "base_model.model."


class Entry(Protocol):
    """One tensor of a file."""

    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return the value to write into the file."""

    def write(self, value: Tensor) -> None:
        """Take the value that stood in the file."""


@dataclass
class Stored:
    """A tensor of ours that a file holds in the shape ``shape`` and times ``factor``."""

    place: Tensor
    shape: tuple[int, ...]
    factor: float = 1.0

    def read(self) -> Tensor:
        """Return a copy on the CPU, which shares memory with nothing."""
        return (self.place.detach() * self.factor).reshape(self.shape).cpu().clone().contiguous()

    def write(self, value: Tensor) -> None:
        """Copy the value into the network."""
        with torch.no_grad():
            self.place.copy_(value.reshape(self.place.shape).to(self.place.dtype) / self.factor)


def entries(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Entry]:
    """Return the tensors of an adapter by their keys in PEFT's files.

    Args:
        model: The adapted network.
        attachment: What it remembers of its adapters.
        name: Name of the adapter.
    """
    found: dict[str, Entry] = {}
    targeted = set()
    for path, module, updates in hosts(model):
        update = updates.get_update(name)
        if update is not None:
            targeted.add(path)
            found |= {f"{PREFIX}{path}.{key}".replace("..", "."): entry for key, entry in _of_update(update, module)}
    parameters = dict(model.named_parameters())
    for key in sorted(attachment.base_parameters(name)):
        place = parameters[key] if attachment.active == name else attachment.values[name][key]
        path, _, parameter = key.rpartition(".")
        host = path.removesuffix(".out_proj") if path.removesuffix(".out_proj") in targeted else path
        inner = key[len(host) + 1 :] if host else key
        wrapped = parameter.endswith("bias") and host in targeted
        found[f"{PREFIX}{host}.base_layer.{inner}" if wrapped else PREFIX + key] = Stored(place, tuple(place.shape))
    return found


def _of_update(update: Update, module: nn.Module) -> Iterator[tuple[str, Entry]]:
    match update:
        case EmbeddingLoRA():
            yield "lora_embedding_A", _whole(update.lora_A)
            yield "lora_embedding_B", _whole(update.lora_B)
        case LoRAUpdate():
            a, b = (update.lora_A, update.lora_B) if update.start_A is None else update.factors()
            yield "lora_A.weight", _whole(a)
            yield "lora_B.weight", _whole(b)
        case ParametersLoRA():
            yield from _of_parameters(update, module)
    magnitude = getattr(update, "lora_magnitude_vector", None)
    if magnitude is not None:
        ones = [1] * len(module.kernel_size) if isinstance(module, AdaptedConv) else None
        yield (
            "lora_magnitude_vector",
            Stored(magnitude, (len(magnitude),) if ones is None else (1, len(magnitude), *ones)),
        )


def _whole(tensor: Tensor, factor: float = 1.0) -> Stored:
    return Stored(tensor, tuple(tensor.shape), factor)


def _of_parameters(update: ParametersLoRA, module: nn.Module) -> Iterator[tuple[str, Entry]]:
    keys: list[Any] = list(update.paths)
    if isinstance(module, nn.MultiheadAttention):
        # PEFT 0.21 adds the update of the output projection twice, in forward and in merge: half of B there is one of ours.
        wheres = {"in_proj_weight": ("", 1.0), "out_proj_weight": ("base_layer.out_proj.", 0.5)}
    else:
        # Wrappers within wrappers: the parameter that was adapted last is the outermost.
        wheres = {key: ("base_layer." * (len(keys) - 1 - place), 1.0) for place, key in enumerate(keys)}
    for key in keys:
        where, factor = wheres[key]
        yield f"{where}lora_A.weight", _whole(update.lora_A[key])
        yield f"{where}lora_B.weight", _whole(update.lora_B[key], factor)

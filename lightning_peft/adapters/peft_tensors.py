"""Where every tensor of an adapter stands in PEFT's files, and in which shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.ia3_update import IA3Update
from lightning_peft.adapters.kv_prefix import KVPrefix
from lightning_peft.adapters.layer_kinds import AdaptedConv
from lightning_peft.adapters.layer_norm_tuning import LayerNormTuning
from lightning_peft.adapters.lora_update import EmbeddingLoRA, LoRAUpdate, ParametersLoRA
from lightning_peft.adapters.peft_prompts import Joined, prefix_updates
from lightning_peft.adapters.soft_prompt import TextPrompt
from lightning_peft.adapters.updates import Update, hosts
from lightning_peft.adapters.vera_update import VeRAUpdate

PREFIX, PROMPT = "base_model.model.", "prompt_embeddings"


class Entry(Protocol):
    """One tensor of a file."""

    optional: bool
    """Whether a file may lack it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""

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
    optional: bool = False

    def read(self) -> Tensor:
        """Return a copy on the CPU, which shares memory with nothing; of a sharded tensor all processes must ask for it."""
        place: Any = self.place
        whole: Tensor = place.full_tensor() if hasattr(place, "full_tensor") else place
        return (whole.detach() * self.factor).reshape(self.shape).cpu().clone().contiguous()

    def write(self, value: Tensor) -> None:
        """Copy the value into the network."""
        with torch.no_grad():
            self.place.copy_(value.reshape(self.place.shape).to(self.place.dtype) / self.factor)


@dataclass
class Drawn:
    """A tensor that is drawn from a seed: a file may hold it, and then it must hold the same."""

    place: Tensor
    key: str
    optional = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return tuple(self.place.shape)

    def read(self) -> Tensor:
        """Return a copy on the CPU."""
        return self.place.detach().cpu().clone()

    def write(self, value: Tensor) -> None:
        """Compare.

        Raises:
            ValueError: If the file holds another tensor than its seed gives.
        """
        if not torch.allclose(self.place.to(value), value, rtol=1e-2 if value.itemsize < 4 else 1e-6, atol=0):
            raise ValueError(
                f"load_adapter: {self.key} in the file is not what its projection_prng_key gives here, so training could not "
                "be resumed from a checkpoint, which holds the key alone."
            )


def entries(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Entry]:
    """Return the tensors of an adapter by their keys in PEFT's files.

    Args:
        model: The adapted network.
        attachment: What it remembers of its adapters.
        name: Name of the adapter.
    """
    found: dict[str, Entry] = _shared(model, attachment.adapters[name], name)
    targeted = set()
    for path, module, updates in hosts(model):
        update = updates.get_update(name)
        if update is not None:
            targeted.add(path)
            found |= {f"{PREFIX}{path}.{key}".replace("..", "."): entry for key, entry in _of_update(update, module)}
    adapter, parameters = attachment.adapters[name], dict(model.named_parameters())
    norms = set(adapter.select(model)) if isinstance(adapter, LayerNormTuning) else set()
    # Around prompts PEFT has no second wrapper.
    prefix = PREFIX if PROMPT not in found else PREFIX.removesuffix("model.")
    for key in sorted(attachment.base_parameters(name)):
        place = parameters[key] if attachment.active == name else attachment.values[name][key]
        path, _, parameter = key.rpartition(".")
        host = path.removesuffix(".out_proj") if path.removesuffix(".out_proj") in targeted else path
        inner = key[len(host) + 1 :] if host else key
        if key in norms:
            stored = f"{path}.ln_tuning_layers.{parameter}"
        elif parameter.endswith("bias") and host in targeted and prefix == PREFIX:
            stored = f"{host}.base_layer.{inner}"
        else:
            stored = key
        found[prefix + stored] = Stored(place, tuple(place.shape))
    return found


def _shared(model: nn.Module, adapter: Adapter, name: str) -> dict[str, Entry]:
    """Return what an adapter has once for the whole network, by the keys in PEFT's files."""
    if isinstance(adapter, KVPrefix):
        return {PROMPT: Joined(model, prefix_updates(model, name), adapter.offset_positions)}
    for _, _, updates in hosts(model):
        update = updates.get_update(name)
        if isinstance(update, TextPrompt):
            return {PROMPT: _whole(update.prompt)}
        if isinstance(update, VeRAUpdate) and (projections := getattr(update, "projections", None)) is not None:
            keys = {"base_model.vera_A": projections.vera_A, "base_model.vera_B": projections.vera_B}
            return {key: Drawn(place, key) for key, place in keys.items()}
    return {}


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
        case VeRAUpdate():
            yield "vera_lambda_b", _whole(update.vera_lambda_b)
            yield "vera_lambda_d", _whole(update.vera_lambda_d)
        case IA3Update():
            size, taps = update.ia3_l.numel(), _kernel_ones(module)
            flat = (1, size) if update.scales_input else (size, 1)
            yield "ia3_l", Stored(update.ia3_l, flat if taps is None else (1, size, *taps))
    magnitude = getattr(update, "lora_magnitude_vector", None)
    if magnitude is not None:
        size, taps = len(magnitude), _kernel_ones(module)
        yield "lora_magnitude_vector", Stored(magnitude, (size,) if taps is None else (1, size, *taps))


def _kernel_ones(module: nn.Module) -> list[int] | None:
    """Return a 1 for every dimension of a convolution's kernel, None for other layers."""
    return [1] * len(module.kernel_size) if isinstance(module, AdaptedConv) else None


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

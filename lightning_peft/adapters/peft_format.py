"""Read and write adapters in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.adapters.attach import add_adapter, remove_adapter
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.lora import LoRA, LoRALinear
from lightning_peft.files import write_atomic, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# Fields that change what the adapter computes. Anything but these values is refused, not ignored.
_WRITTEN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}
# The same, of later PEFT releases: left out when writing, since an earlier one warns of fields that it does not know.
_LATER = dict.fromkeys(
    (
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
    )
)


def save_adapter(model: nn.Module, path: str | Path, *, base: str | None = None) -> Path:
    """Write the LoRA of a network in PEFT's layout, so that PEFT and transformers read it too.

    Args:
        model: An adapted network.
        path: The folder to write.
        base: Name of the pretrained network, for the record.

    Raises:
        ValueError: If the network carries no LoRA.
    """
    attachment = attachment_of(model)
    if attachment is None or not isinstance(attachment.adapter, LoRA):
        carried = "no adapter" if attachment is None else repr(attachment.adapter)
        raise ValueError(
            f"save_adapter: only a LoRA can be written yet, and this {type(model).__name__} has {carried}."
        )
    lora, name, folder = attachment.adapter, attachment.name, Path(path)
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    weights = {
        f"{_PREFIX}{key}.{matrix}.weight": getattr(layer, matrix)[name].detach().clone().cpu().contiguous()
        for key, layer in layers.items()
        for matrix in ("lora_A", "lora_B")
    }
    config = {
        **_WRITTEN,
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        # An exact expression: PEFT would match a name in a list against the end of longer names too.
        "target_modules": "|".join(re.escape(key) for key in layers),
        "exclude_modules": None,
        "init_lora_weights": True,
    }
    write_atomic(folder / WEIGHTS, lambda draft: save_file(weights, draft, metadata={"format": "pt"}))
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))
    return folder


def load_adapter(model: nn.Module, path: str | Path, *, name: str = "default") -> nn.Module:
    """Add the LoRA that a PEFT folder holds to a bare network; every tensor must find its place.

    Args:
        model: A network without an adapter, changed in place.
        path: The folder.
        name: Name for the adapter.

    Raises:
        ValueError: If the folder holds another method or an option we do not compute, or a tensor is missing, left
            over, or of another shape.
    """
    folder = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"load_adapter: {folder} has no {file}. Give the folder that save_adapter or PEFT wrote.")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    weights = _read_weights(folder / WEIGHTS)
    add_adapter(model, _lora(config, model), name)
    try:
        _fill(model, name, weights, folder)
    except ValueError:
        remove_adapter(model)
        raise
    return model


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"load_adapter: {file} is damaged ({error}). Copy or train it again.") from error


def _lora(config: dict[str, Any], model: nn.Module) -> LoRA:
    if missing := [key for key in _REQUIRED if config.get(key) is None]:
        raise ValueError(f"load_adapter: {CONFIG} lacks {missing}; PEFT would guess them, and a wrong guess is silent.")
    if config["peft_type"] != "LORA":
        raise ValueError(f"load_adapter: peft_type={config['peft_type']!r} cannot be read yet; only LORA can.")
    plain = {**_WRITTEN, **_LATER}
    # An empty dict or list, false and null mean the same in these fields.
    strange = {
        key: config[key] for key in plain.keys() & config.keys() if (config[key] or None) != (plain[key] or None)
    }
    if strange:
        raise ValueError(f"load_adapter: {CONFIG} asks for {strange}, which cannot be computed yet.")
    targets = config["target_modules"]
    linear = [key for key, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if isinstance(targets, str):
        names = linear if targets == "all-linear" else [key for key in linear if re.fullmatch(targets, key)]
    else:
        names = [key for key in linear if any(key == t or key.endswith(f".{t}") for t in targets)]
    if not names:
        raise ValueError(f"load_adapter: target_modules={targets!r} matches no linear layer of {type(model).__name__}.")
    return LoRA(rank=config["r"], alpha=config["lora_alpha"], targets=names, dropout=config.get("lora_dropout", 0.0))


def _fill(model: nn.Module, name: str, weights: dict[str, Tensor], folder: Path) -> None:
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    places = {
        f"{_PREFIX}{key}.{matrix}.weight": getattr(layer, matrix)[name]
        for key, layer in layers.items()
        for matrix in ("lora_A", "lora_B")
    }
    wrong = [f"missing: {key}" for key in sorted(places.keys() - weights.keys())]
    wrong += [f"left over: {key}" for key in sorted(weights.keys() - places.keys())]
    wrong += [
        f"shape {tuple(weights[key].shape)} in the file, {tuple(place.shape)} in the network: {key}"
        for key, place in places.items()
        if key in weights and weights[key].shape != place.shape
    ]
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong[:10])
        raise ValueError(
            f"load_adapter: {folder} does not fit this {type(model).__name__}, in {len(wrong)} keys:\n{listed}"
        )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(weights[key])

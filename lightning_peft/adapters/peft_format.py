"""Read and write adapters in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.adapters.attach import add_adapter, remove_adapter
from lightning_peft.adapters.attachment import attachment_of, check_whole, required_attachment
from lightning_peft.adapters.peft_config import CONFIG, DESCRIPTIVE, WRITERS, adapter_from_config
from lightning_peft.adapters.peft_tensors import PREFIX, entries
from lightning_peft.adapters.switch import check_known, set_adapter
from lightning_peft.files import write_atomic, write_text

WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_LISTED = 10


def save_adapter(module: nn.Module, path: str | Path, *, name: str | None = None, base: str | None = None) -> Path:
    """Write an adapter in PEFT's layout, so that PEFT, transformers and vLLM read it too.

    Each file is replaced in one step. The weights carry a copy of the configuration, so that a run that was killed between
    the two files cannot leave a pair that loads with another one's scale.

    Args:
        module: An adapted network, or a module around one; names in the file are relative to the network.
        path: The folder to write.
        name: Which of several adapters; the active one by default.
        base: Name of the pretrained network, for the record.

    Raises:
        ValueError: If the network carries no such adapter, PEFT has no format for it, or a tensor is empty.

    >>> import tempfile
    >>> from lightning_peft import LoRA
    >>> net = add_adapter(nn.Sequential(nn.Linear(8, 8)), LoRA(rank=2))
    >>> sorted(file.name for file in save_adapter(net, tempfile.mkdtemp()).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    model = _adapted(module)
    attachment = required_attachment(model, "save_adapter")
    check_whole(model, attachment, "save_adapter")
    name = name or attachment.active or next(iter(attachment.adapters))
    check_known(attachment, [name], "save_adapter")
    adapter, folder = attachment.adapters[name], Path(path)
    if type(adapter) not in WRITERS:
        kinds = ", ".join(sorted(kind.__name__ for kind in WRITERS))
        raise ValueError(f"save_adapter: PEFT has no format for {adapter!r}; these can be written: {kinds}.")
    weights = {key: entry.read() for key, entry in entries(model, attachment, name).items()}
    if empty := [key for key, value in weights.items() if not value.numel()]:
        raise ValueError(f"save_adapter: {empty} are empty. Gather a sharded network before it is saved.")
    record = {"task_type": None, "base_model_name_or_path": base, "revision": None, "inference_mode": True}
    config = json.dumps({**record, **WRITERS[type(adapter)](model, attachment, name)}, indent=2, sort_keys=True)
    metadata = {"format": "pt", "config": config}
    write_atomic(folder / WEIGHTS, lambda draft: save_file(weights, draft, metadata=metadata))
    write_text(folder / CONFIG, config)
    return folder


def load_adapter(module: nn.Module, path: str | Path, *, name: str = "default") -> nn.Module:
    """Add the adapter that a PEFT folder holds to a network; every tensor must find its place.

    Args:
        module: A network without an adapter of that name, changed in place, or a module around one: then the names in the
            file choose the child that they belong to.
        path: The folder.
        name: Name for the adapter. If the network has others already, it waits for ``set_adapter``.

    Raises:
        ValueError: If the folder holds another method or an option we do not compute, or a tensor is missing, left
            over, or of another shape. The network is as it was then.
    """
    folder = Path(path)
    config, weights = _read_folder(folder)
    model = _network_of(module, weights)
    return _take(module, model, config, weights, name, source=str(folder), live=False)


def from_peft(peft_model: Any) -> nn.Module:
    """Take the adapters of a live ``peft.PeftModel`` over: return its base network with ours in their place.

    The ``PeftModel`` is taken apart. Adapters keep their names, and the active one stays active.

    Args:
        peft_model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned.

    Raises:
        ValueError: If it holds a method or an option that we do not compute.
        TypeError: If it is no ``PeftModel``.
    """
    if not hasattr(peft_model, "peft_config") or not hasattr(peft_model, "get_base_model"):
        raise TypeError(f"from_peft: {type(peft_model).__name__} is no peft.PeftModel.")
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - only who comes from there has it

    active = peft_model.active_adapter
    found = {
        name: (_plain(config.to_dict()), dict(get_peft_model_state_dict(peft_model, adapter_name=name)))
        for name, config in peft_model.peft_config.items()
    }
    unload = getattr(peft_model.base_model, "unload", None)
    model: nn.Module = unload() if callable(unload) else peft_model.get_base_model()
    for config, _ in found.values():
        adapter_from_config(
            config, model, live=True
        )  # all or none: what cannot be read is refused before anything is added
    for name, (config, weights) in found.items():
        values = {key: value.detach().clone() for key, value in weights.items()}
        _take(model, model, config, values, name, source="the PeftModel", live=True)
    return set_adapter(model, active)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _take(
    module: nn.Module,
    model: nn.Module,
    config: Mapping[str, Any],
    weights: dict[str, Tensor],
    name: str,
    *,
    source: str,
    live: bool,
) -> nn.Module:
    add_adapter(model, adapter_from_config(config, model, live=live), name)
    try:
        _fill(model, name, weights, source)
    except ValueError:
        remove_adapter(model, name)
        raise
    return module


def _adapted(module: nn.Module) -> nn.Module:
    """Return the adapted network that ``module`` is or holds."""
    inside = [child for child in module.modules() if attachment_of(child) is not None]
    return inside[0] if len(inside) == 1 else module


def _network_of(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the network that the names in a file belong to: ``module``, its adapted network, or the child that has them."""
    adapted = _adapted(module)
    if attachment_of(adapted) is not None:
        return adapted
    first = {key.removeprefix(PREFIX).partition(".")[0] for key in weights if key.startswith(PREFIX)}
    fits = [
        net
        for net in (module, *module.children())
        if first <= dict(net.named_children()).keys() | dict(net.named_parameters(recurse=False)).keys()
    ]
    if not first:
        fits = [net for net in (module, *module.children()) if hasattr(net, "config") and hasattr(net, "base_model")]
    return fits[0] if fits else module


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = (
        folder / WEIGHTS
        if (folder / WEIGHTS).is_file() or not (folder / OLD_WEIGHTS).is_file()
        else folder / OLD_WEIGHTS
    )
    for needed in (folder / CONFIG, file):
        if not needed.is_file():
            raise ValueError(
                f"load_adapter: {folder} has no {needed.name}. Give the folder that save_adapter or PEFT wrote; an adapter "
                "with another name than 'default' lies in a folder of that name within."
            )
    weights, written = _read_weights(file)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"load_adapter: {folder / CONFIG} is damaged ({error}). Copy it again.") from error
    changed = sorted(key for key in written.keys() | config.keys() if written.get(key) != config.get(key))
    if written and (changed := [key for key in changed if key not in DESCRIPTIVE]):
        raise ValueError(
            f"load_adapter: {CONFIG} is not the one that {file.name} was saved with: {changed} differ. A save was "
            "interrupted, or the file was edited. Save again."
        )
    # Adapters' names are no part of PEFT's keys; some writers leave "default" in.
    return config, {re.sub(r"\.default(?=\.|$)", "", key): value for key, value in weights.items()}


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True), {}
        with safe_open(file, framework="pt") as stream:
            written = json.loads((stream.metadata() or {}).get("config", "{}"))
            return {key: stream.get_tensor(key) for key in stream.keys()}, written  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"load_adapter: {file} is damaged ({error}). Copy or train it again.") from error


def _fill(model: nn.Module, name: str, weights: dict[str, Tensor], source: str) -> None:
    places = entries(model, required_attachment(model, "load_adapter"), name)
    wrong = [f"missing: {key}" for key in sorted(places.keys() - weights.keys())]
    wrong += [f"left over: {key}" for key in sorted(weights.keys() - places.keys())]
    wrong += [
        f"shape {tuple(weights[key].shape)} in the file, {place.shape} in the network: {key}"
        for key, place in places.items()
        if key in weights and tuple(weights[key].shape) != place.shape
    ]
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong[:_LISTED])
        raise ValueError(
            f"load_adapter: {source} does not fit this {type(model).__name__}, in {len(wrong)} keys:\n{listed}"
        )
    for key, place in places.items():
        place.write(weights[key])

"""Read and write adapters in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attach import add_adapter, remove_adapter
from lightning_peft.adapters.attachment import (
    attachment_of,
    check_whole,
    refresh_base,
    refuse_disabled,
    required_attachment,
)
from lightning_peft.adapters.fingerprint import Fingerprint, fingerprint_differences
from lightning_peft.adapters.peft_config import WRITERS, adapter_from_config
from lightning_peft.adapters.peft_folder import read_folder, write_folder
from lightning_peft.adapters.peft_tensors import PREFIX, PROMPT, entries
from lightning_peft.adapters.quantised import is_quantised
from lightning_peft.adapters.switch import check_known, set_adapter

_LISTED = 10


def save_adapter(module: nn.Module, path: str | Path, *, name: str | None = None, base: str | None = None) -> Path:
    """Write an adapter in PEFT's layout, so that PEFT, transformers and vLLM read it too.

    Each file is replaced in one step. Of a sharded network (FSDP2) every process must save: all gather, and each writes the
    whole adapter to the path that it gives. The weights carry a copy of the configuration, so that a run that was killed between
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
    refuse_disabled(attachment, "save_adapter")
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
    config = {**record, **WRITERS[type(adapter)](model, attachment, name)}
    refresh_base(model, attachment)
    write_folder(folder, config, weights, attachment.base)
    return folder


def load_adapter(module: nn.Module, path: str | Path, *, name: str = "default", check_base: bool = True) -> nn.Module:
    """Add the adapter that a PEFT folder holds to a network; every tensor must find its place.

    Args:
        module: A network without an adapter of that name, changed in place, or a module around one: then the names in the
            file choose the child that they belong to.
        path: The folder.
        name: Name for the adapter. If the network has others already, it waits for ``set_adapter``.
        check_base: Refuse a network whose frozen weights are not those that the adapter was trained on. Our files tell
            them, PEFT's do not. A copy in lower precision is accepted: of it only the shapes can be compared.

    Raises:
        ValueError: If the folder holds another method or an option we do not compute, a tensor is missing, left
            over, or of another shape, or the network is another one. The network is as it was then.
    """
    folder = Path(path)
    config, weights, base = read_folder(folder)
    model = _network_of(module, weights)
    adapter = adapter_from_config(config, model, live=False)
    _take(model, adapter, weights, name, source=str(folder), base=base if check_base else None)
    return module


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
    model = _unwrapped(peft_model)
    # All or none: what cannot be read is refused before anything is added.
    adapters = {name: adapter_from_config(config, model, live=True) for name, (config, _) in found.items()}
    for name, (_, weights) in found.items():
        values = {key: value.detach().clone() for key, value in weights.items()}
        _take(model, adapters[name], values, name, source="the PeftModel")
    return set_adapter(model, active)


def _unwrapped(peft_model: Any) -> nn.Module:
    from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: PLC0415 - only who comes from there has it

    unload = getattr(peft_model.base_model, "unload", None)
    model: nn.Module = unload() if callable(unload) else peft_model.get_base_model()
    for path, module in list(model.named_modules()):  # around prompts there is no unload, and heads stay wrapped
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(path, module.original_module)
    return model


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _take(
    model: nn.Module,
    adapter: Adapter,
    weights: dict[str, Tensor],
    name: str,
    *,
    source: str,
    base: Fingerprint | None = None,
) -> None:
    add_adapter(model, adapter, name)
    try:
        _check_base(model, name, base, source)
        _fill(model, name, weights, source)
    except BaseException:
        remove_adapter(model, name)
        raise


def _check_base(model: nn.Module, name: str, saved: Fingerprint | None, source: str) -> None:
    if saved is None:
        return
    attachment = required_attachment(model, "load_adapter")
    quantised = [f"{path}." for path, layer in model.named_modules() if is_quantised(layer)]
    here = {key: found for key, found in attachment.base.items() if not key.startswith(tuple(quantised))}
    there = {
        key: replace(found, digest="") if key in here and _narrower(here[key].dtype, found.dtype) else found
        for key, found in saved.items()
        if not key.startswith(tuple(quantised))
    }
    ignore = attachment.base_parameters(name)
    if wrong := fingerprint_differences(there, here, ignore=ignore, model=model):
        raise ValueError(
            f"load_adapter: {source} was trained on another network than this {type(model).__name__}, in {len(wrong)} tensors:\n"
            f"{_listing(wrong)}\nGive the network that it was trained on, or check_base=False if that is meant."
        )


def _narrower(one: str, other: str) -> bool:
    return bool(getattr(torch, one).itemsize < getattr(torch, other).itemsize)


def _listing(lines: Sequence[str]) -> str:
    more = [f"  ... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join([*(f"  {line}" for line in lines[:_LISTED]), *more])


def _adapted(module: nn.Module) -> nn.Module:
    """Return the adapted network that ``module`` is or holds."""
    inside = [child for child in module.modules() if attachment_of(child) is not None]
    return inside[0] if len(inside) == 1 else module


def _network_of(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the network that the names in a file belong to: ``module``, its adapted network, or the child that has them."""
    adapted = _adapted(module)
    if attachment_of(adapted) is not None:
        return adapted
    if PROMPT in weights:
        return _transformer_of(module)
    first = {key.removeprefix(PREFIX).partition(".")[0] for key in weights if key.startswith(PREFIX)}
    fits = [
        net
        for net in (module, *module.children())
        if first <= dict(net.named_children()).keys() | dict(net.named_parameters(recurse=False)).keys()
    ]
    return fits[0] if fits else module


def _transformer_of(module: nn.Module) -> nn.Module:
    """Return the network of transformers' that ``module`` is or has as its one child: a prompt does not tell its place."""
    found = [net for net in (module, *module.children()) if hasattr(net, "config") and hasattr(net, "base_model")]
    if module in found or not found:
        return module
    if len(found) > 1:
        names = [name for name, child in module.named_children() if child in found]
        raise ValueError(f"load_adapter: the prompt fits each of {names}. Pass the network that it was trained for.")
    return found[0]


def _fill(model: nn.Module, name: str, weights: dict[str, Tensor], source: str) -> None:
    places = entries(model, required_attachment(model, "load_adapter"), name)
    needed = {key for key, place in places.items() if not place.optional}
    wrong = [f"missing: {key}" for key in sorted(needed - weights.keys())]
    wrong += [f"left over: {key}" for key in sorted(weights.keys() - places.keys())]
    wrong += [
        f"shape {tuple(weights[key].shape)} in the file, {place.shape} in the network: {key}"
        for key, place in places.items()
        if key in weights and tuple(weights[key].shape) != place.shape
    ]
    wrong += [f"{weights[key].dtype}, no weights: {key}" for key in places if not _is_weights(weights.get(key))]
    wrong += [f"NaN or infinite: {key}" for key in places if key in weights and not weights[key].isfinite().all()]
    if wrong:
        raise ValueError(
            f"load_adapter: {source} does not fit this {type(model).__name__}, in {len(wrong)} keys:\n{_listing(wrong)}"
        )
    for key in places.keys() & weights.keys():
        places[key].write(weights[key])


def _is_weights(value: Tensor | None) -> bool:
    return value is None or value.is_floating_point()

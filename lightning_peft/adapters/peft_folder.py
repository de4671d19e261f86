"""The two files of an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``, whole or not there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.adapters.fingerprint import Fingerprint, fingerprint_from_plain, fingerprint_to_plain
from lightning_peft.adapters.peft_config import DESCRIPTIVE
from lightning_peft.adapters.peft_matching import CONFIG
from lightning_peft.files import write_atomic, write_text

WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
WRITTEN, BASE = "config", "lightning_peft_base"
"""What the tensors' metadata hold besides PEFT's own: a copy of the configuration, and the fingerprint of the base."""


def write_folder(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], base: Fingerprint) -> None:
    """Write both files, each in one step, so that a pair from two saves can be told.

    Args:
        folder: Where to; made if it is missing.
        config: The fields of the configuration.
        weights: The tensors by their keys.
        base: The network that the adapter belongs to.
    """
    text = json.dumps(config, indent=2, sort_keys=True)
    metadata = {"format": "pt", WRITTEN: text, BASE: json.dumps(fingerprint_to_plain(base))}
    write_atomic(folder / WEIGHTS, lambda draft: save_file(dict(weights), draft, metadata=metadata))
    write_text(folder / CONFIG, text)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Fingerprint | None]:
    """Return the configuration of an adapter, its tensors, and the base it was trained on if the file tells.

    Raises:
        ValueError: If a file is missing or damaged, or the two are not from one save.
    """
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
    weights, metadata = _read_weights(file)
    written = metadata.get(WRITTEN, {})
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
    tensors = {re.sub(r"\.default(?=\.|$)", "", key): value for key, value in weights.items()}
    base = metadata.get(BASE)
    return config, tensors, fingerprint_from_plain(base) if base is not None else None


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True), {}
        with safe_open(file, framework="pt") as stream:
            known = {key: json.loads(text) for key, text in (stream.metadata() or {}).items() if key in (WRITTEN, BASE)}
            return {key: stream.get_tensor(key) for key in stream.keys()}, known  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"load_adapter: {file} is damaged ({error}). Copy or train it again.") from error

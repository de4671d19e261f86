"""Recognise data by what it holds: plain data by a key, rows and batches by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def key_of(*parts: Any) -> str:
    """Return a key for plain data.

    >>> key_of(1, "a") == key_of(1, "a") != key_of("1", "a")
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_digest(value: Any, owner: str = "content_digest") -> str:
    """Return a hash of a row or batch: of tensors, arrays, texts, numbers, and mappings, lists and tuples of them.

    Args:
        value: What to hash.
        owner: Whose name an error begins with.

    Raises:
        ValueError: For anything else.

    >>> content_digest({"x": torch.ones(2), "y": "a"}) == content_digest({"y": "a", "x": torch.ones(2)})
    True
    """
    return hashlib.sha256(_bytes_of(value, owner)).hexdigest()


def _bytes_of(value: Any, owner: str) -> bytes:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        raw = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {flat.dtype} {tuple(flat.shape)}".encode() + hashlib.sha256(raw).digest()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"array {value.dtype} {value.shape}".encode() + hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, Mapping):
        parts = sorted((str(name), _bytes_of(part, owner)) for name, part in value.items())
        return b"mapping" + b"".join(hashlib.sha256(name.encode()).digest() + part for name, part in parts)
    if isinstance(value, list | tuple):
        return b"list" + b"".join(hashlib.sha256(_bytes_of(part, owner)).digest() for part in value)
    if value is None or isinstance(value, str | bytes | bool | int | float | np.generic):
        return repr(value).encode()
    raise ValueError(
        f"{owner}: a batch holds a {type(value).__name__}, whose content cannot be hashed. Collate it to tensors or texts, or say "
        "by data_key= when the data has changed."
    )

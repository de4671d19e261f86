"""Recognise a pretrained network by its names, shapes and values, without storing it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorPrint:
    """Shape, dtype and digest of one tensor; the digest is empty where the values cannot be read (meta, sharded)."""

    shape: tuple[int, ...]
    dtype: str
    digest: str


Fingerprint = dict[str, TensorPrint]


def _values_readable(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor.data) is Tensor


def print_tensor(tensor: Tensor) -> TensorPrint:
    """Digest one tensor: BLAKE2b over its bytes.

    >>> print_tensor(torch.zeros(2, 3)).shape
    (2, 3)
    """
    digest = ""
    if _values_readable(tensor):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.blake2b(flat.numpy().data, digest_size=8).hexdigest()
    return TensorPrint(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest)


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that a ``state_dict`` of the model holds."""
    yield from model.state_dict(keep_vars=True).items()


def fingerprint(model: nn.Module) -> Fingerprint:
    """Digest every parameter and persistent buffer of a network (about a second per gigabyte and core)."""
    state = [(name, value) for name, value in named_state(model) if isinstance(value, Tensor)]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return dict(
            zip((name for name, _ in state), pool.map(print_tensor, (value for _, value in state)), strict=True)
        )


def fingerprint_to_plain(prints: Fingerprint) -> dict[str, list[Any]]:
    """Turn a fingerprint into plain lists that a ``weights_only`` checkpoint may hold."""
    return {name: [list(p.shape), p.dtype, p.digest] for name, p in prints.items()}


def fingerprint_from_plain(plain: dict[str, list[Any]]) -> Fingerprint:
    """Read back what :func:`fingerprint_to_plain` wrote."""
    return {name: TensorPrint(tuple(shape), dtype, digest) for name, (shape, dtype, digest) in plain.items()}


def fingerprint_differences(
    saved: Fingerprint, here: Fingerprint, *, ignore: Collection[str] = (), model: nn.Module | None = None
) -> list[str]:
    """Say, a line per tensor, in what two networks differ; empty if they are the same.

    A network that is held here in a wider dtype than when it was saved (float32 against the bfloat16 of a
    ``bf16-true`` run) is rounded before the comparison, if ``model`` is given to read it from.

    Args:
        saved: The expected network.
        here: The network at hand.
        ignore: Names that do not count: a checkpoint that brings its own values for them.
        model: The network at hand itself.
    """
    lines = []
    tensors = dict(named_state(model)) if model is not None else {}
    for name in sorted((saved.keys() | here.keys()) - set(ignore)):
        if name not in here:
            lines.append(f"{name}: not in the base at hand")
        elif name not in saved:
            lines.append(f"{name}: not in the base it was trained on")
        elif (line := _difference(saved[name], here[name], tensors.get(name))) is not None:
            lines.append(f"{name}: {line}")
    return lines


def _difference(saved: TensorPrint, here: TensorPrint, tensor: Tensor | None) -> str | None:
    if saved.shape != here.shape:
        return f"shape {saved.shape} expected, {here.shape} at hand"
    if saved.dtype != here.dtype and tensor is not None and _values_readable(tensor):
        here = print_tensor(tensor.detach().to(getattr(torch, saved.dtype)))
    if saved.digest and here.digest and saved.digest != here.digest:
        return "other values"
    return None

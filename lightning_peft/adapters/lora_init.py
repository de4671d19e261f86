"""Where the matrices of a LoRA on a linear layer start."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.adapters.lora_update import LoRAUpdate


def initialise(update: LoRAUpdate, layer: object, init: str) -> None:
    """Let an update start as asked; the base weight is read, not changed.

    Args:
        update: The update, at its default start.
        layer: Its layer.
        init: ``"default"``, ``"pissa"``, ``"olora"``, ``"orthogonal"`` or ``"eva"``, which waits for its batches.
    """
    if init in ("default", "eva"):
        return
    matrix = layer.matrix().detach().to(update.lora_A.dtype)  # type: ignore[attr-defined]
    match init:
        case "pissa":
            update.start_at(*pissa(matrix, update.rank, update.scale))
        case "olora":
            update.start_at(*olora(matrix, update.rank))
        case _:
            update.start_at(*orthogonal(matrix, update.rank))


def pissa(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``sqrt(S) V^T`` and ``U sqrt(S)`` of the largest singular values, over the scale (Meng et al. 2024, equation 2)."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / abs(scale)).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def olora(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first rows of ``R`` and columns of ``Q`` of ``W = QR`` (Büyükakyüz 2024, algorithm 1)."""
    q, r = torch.linalg.qr(matrix)
    return r[:rank], q[:, :rank]


def orthogonal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return random ``A`` and ``B`` with ``B A = 0``: they use halves of one orthogonal basis of the (even) rank."""
    out, width = matrix.shape
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=matrix.dtype))
    down = basis[0::2].T @ torch.randn(rank // 2, width, dtype=matrix.dtype) / 10
    up = torch.randn(out, rank // 2, dtype=matrix.dtype) @ basis[1::2] / 10
    return down.to(matrix.device), up.to(matrix.device)

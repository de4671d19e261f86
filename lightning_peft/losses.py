"""Losses that are right over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from lightning_peft.distributed import gather_rows


def in_batch_contrastive(queries: Tensor, documents: Tensor, scale: float = 20.0) -> Tensor:
    """Pull each query to its own document and away from the other documents of the step, those of all ranks.

    ``mean_i -log softmax_j(scale * cos(q_i, d_j))[i]``, with ``j`` over the documents of every process. They are
    gathered with gradient, so that two ranks have the loss and the gradient of one process on the joint batch.
    van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE); Henderson et al. 2017, arXiv:1705.00652 (in-batch negatives).

    Args:
        queries: ``(pairs, width)``; need not be normalised.
        documents: ``(pairs, width)``; row ``i`` belongs to query ``i``.
        scale: Inverse temperature.

    >>> float(in_batch_contrastive(torch.eye(3), torch.eye(3))) < 1e-6
    True
    """
    candidates, first = gather_rows(F.normalize(documents, dim=-1))
    logits = scale * F.normalize(queries, dim=-1) @ candidates.T
    return F.cross_entropy(logits, first + torch.arange(len(queries), device=logits.device))

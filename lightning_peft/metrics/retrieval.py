"""Retrieval as a torchmetrics class."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override


class RecallAtOne(Metric):
    """Share of queries whose own document is the nearest of all documents, by cosine similarity.

    Rows are pairs: query ``i`` belongs to document ``i``. Right over ranks: every query meets every rank's documents.

    >>> metric = RecallAtOne()
    >>> metric.update(torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]))
    >>> metric.compute()
    tensor(0.3333)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    queries: list[Tensor]
    documents: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("queries", default=[], dist_reduce_fx="cat")
        self.add_state("documents", default=[], dist_reduce_fx="cat")

    @override
    def update(self, queries: Tensor, documents: Tensor) -> None:
        """Add pairs of embeddings.

        Args:
            queries: ``(pairs, width)``.
            documents: ``(pairs, width)``; row ``i`` is what query ``i`` should find.

        Raises:
            ValueError: If the shapes differ.
        """
        if queries.shape != documents.shape:
            raise ValueError(
                f"RecallAtOne: queries {tuple(queries.shape)} and documents {tuple(documents.shape)} differ."
            )
        self.queries.append(F.normalize(queries.detach().float(), dim=-1))
        self.documents.append(F.normalize(documents.detach().float(), dim=-1))

    @override
    def compute(self) -> Tensor:
        similarity = dim_zero_cat(self.queries) @ dim_zero_cat(self.documents).T
        own = torch.arange(len(similarity), device=similarity.device)
        return (similarity.argmax(dim=1) == own).float().mean()

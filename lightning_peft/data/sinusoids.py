"""Regression tasks: sine waves of random amplitude and phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_peft.data.episode_loader import EpisodeLoader
from lightning_peft.data.episode_sampler import EpisodeKey, TaskSampler
from lightning_peft.meta.episode import Episode


class Sinusoids(Dataset[Any]):
    """Tasks ``y = A sin(x - phase)`` with ``A ~ U[0.1, 5]``, ``phase ~ U[0, pi]``, ``x ~ U[-5, 5]``.

    Finn et al. 2017, arXiv:1703.03400, section 5.1, with the ranges of the authors' code.

    Args:
        k_shot: Support points of a task.
        n_query: Query points.

    Raises:
        ValueError: For numbers of points below 1.
    """

    def __init__(self, k_shot: int = 10, n_query: int = 10) -> None:
        if min(k_shot, n_query) < 1:
            raise ValueError(f"Sinusoids: k_shot={k_shot!r} and n_query={n_query!r} must be at least 1.")
        self.k_shot, self.n_query = k_shot, n_query

    @override
    def __getitem__(self, key: EpisodeKey) -> tuple[Tensor, Tensor]:
        """Return inputs and outputs of one task, ``(points, 1)``, support before query."""
        draws = key.generator().random(2 + self.k_shot + self.n_query)
        amplitude, phase = 0.1 + 4.9 * draws[0], math.pi * draws[1]
        x = 10 * draws[2:, None] - 5
        y = amplitude * np.sin(x - phase)
        return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.float32))

    def collate(self, tasks: Sequence[tuple[Tensor, Tensor]]) -> Episode:
        """Stack tasks to an episode."""
        x, y = (torch.stack(parts) for parts in zip(*tasks, strict=True))
        k = self.k_shot
        return Episode((x[:, :k], y[:, :k]), (x[:, k:], y[:, k:]))

    def loader(self, tasks: int, meta_batch: int, *, seed: int = 0, fixed: bool = False) -> EpisodeLoader:
        """Return a loader of so many tasks an epoch, over all processes; ``meta_batch`` is this process's share.

        >>> batch = next(iter(Sinusoids(k_shot=5).loader(8, 4)))
        >>> batch.support[0].shape, batch.query[1].shape
        (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))
        """
        sampler = TaskSampler(tasks, seed=seed, fixed=fixed)
        # Lightning reads the sampler's length, never the data set's.
        return EpisodeLoader(self, batch_size=meta_batch, sampler=sampler, collate_fn=self.collate)

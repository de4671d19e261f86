"""Episodes for fit, validation and test, from labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import default_collate
from typing_extensions import override

from lightning_peft.counts import check_counts
from lightning_peft.data.episode_loader import EpisodeCollate, EpisodeDataset, EpisodeLoader
from lightning_peft.data.episode_sampler import EpisodeSampler
from lightning_peft.distributed import world_size


class EpisodicDataModule(pl.LightningDataModule):
    """N-way K-shot episodes from data sets whose classes do not overlap.

    Training draws new episodes in every epoch; validation and test have fixed lists. Every episode is a pure function of the seed,
    the epoch and its number, on any number of processes.

    Args:
        train: Rows of the classes to learn from, as ``(inputs, label)`` or mappings.
        validation: Rows of other classes, for validation; None for no validation.
        test: Rows of still other classes.
        n_way: Classes of an episode.
        k_shot: Support rows of each class.
        n_query: Query rows of each class.
        meta_batch: Episodes of a meta-step, of all processes together.
        episodes: Training episodes of an epoch.
        eval_episodes: Episodes of validation, and of test.
        seed: Another seed gives other episodes.
        label: Key of the label in rows that are mappings.
        collate: Makes a batch of rows.
        num_workers: Processes that load rows.

    Raises:
        ValueError: For counts below 1, a meta-batch that the processes cannot share, and where an :class:`EpisodeSampler` cannot
            draw.

    >>> rows = [(float(i), i % 6) for i in range(60)]
    >>> data = EpisodicDataModule(rows, n_way=3, n_query=2, meta_batch=4, episodes=8)
    >>> next(iter(data.train_dataloader())).support[0].shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        train: Any,
        validation: Any = None,
        test: Any = None,
        *,
        n_way: int = 5,
        k_shot: int = 1,
        n_query: int = 15,
        meta_batch: int = 4,
        episodes: int = 1000,
        eval_episodes: int = 600,
        seed: int = 0,
        label: str = "label",
        collate: Callable[[list[Any]], Any] = default_collate,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.rows = {"train": train, "validation": validation, "test": test}
        self.sizes = {"n_way": n_way, "k_shot": k_shot, "n_query": n_query}
        self.meta_batch, self.episodes, self.eval_episodes, self.seed = meta_batch, episodes, eval_episodes, seed
        self.collate, self.num_workers = EpisodeCollate(label, collate), num_workers
        check_counts(self, "meta_batch", "episodes", "eval_episodes")
        if episodes % meta_batch:
            raise ValueError(
                f"EpisodicDataModule: episodes={episodes} is no multiple of meta_batch={meta_batch}: the last step of an epoch "
                f"would count fewer tasks. Use {max(episodes // meta_batch, 1) * meta_batch}."
            )

    def loader(self, stage: str) -> EpisodeLoader:
        """Return the loader of ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            ValueError: If there are no rows for it.
        """
        rows = self.rows[stage]
        if rows is None:
            raise ValueError(f"EpisodicDataModule: {stage}=None: no rows were given for it.")
        if self.meta_batch % world_size():
            raise ValueError(
                f"EpisodicDataModule: meta_batch={self.meta_batch} cannot be shared equally by {world_size()} processes. "
                "Use a multiple."
            )
        training = stage == "train"
        # Validation and test have seeds of their own: the same numbers would be the same draws.
        number = ("train", "validation", "test").index(stage)
        sampler = EpisodeSampler(
            self._labels(rows),
            **self.sizes,
            episodes=self.episodes if training else self.eval_episodes,
            seed=3 * self.seed + number,
            fixed=not training,
        )
        return EpisodeLoader(
            EpisodeDataset(rows),
            batch_size=self.meta_batch // world_size(),
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _labels(self, rows: Any) -> Sequence[Hashable]:
        found = getattr(rows, "labels", None)  # without reading the rows, where they know
        return [self.collate.label_of(row) for row in rows] if found is None else found

    @override
    def train_dataloader(self) -> EpisodeLoader:
        return self.loader("train")

    @override
    def val_dataloader(self) -> Any:
        return [] if self.rows["validation"] is None else self.loader("validation")

    @override
    def test_dataloader(self) -> EpisodeLoader:
        return self.loader("test")

    @override
    def predict_dataloader(self) -> EpisodeLoader:
        return self.loader("test")

"""Replay: keep an exact share of old rows in every training run, mixed in or beside, exact over ranks and resumes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_peft.data.mix_loader import BesideSampler, MixLoader, Rows, carried_options, row_count, shuffles
from lightning_peft.data.mix_plan import BesidePlan, MemoryStream, MixPlan, exact
from lightning_peft.logging import log_values, register_chart
from lightning_peft.mixins import ReplayMixin
from lightning_peft.one_lightning import refuse_pytorch_lightning
from lightning_peft.train_loader import change_train_loader, leave_train_loader

_OWNER = "ReplayMixing"


class ReplayMixing(pl.Callback):
    """Rehearse old rows while new ones are learned.

    A module without ``replay_step`` gets old rows inside its batches, whose size stays the loader's; they must look
    like its training rows. A module with ``replay_step`` (and :class:`~lightning_peft.ReplayMixin`) keeps its batches
    unchanged and gets a batch of old rows beside each: ``ratio / (1 - ratio)`` times as many rows.

    After every step, ``|old rows - ratio * all rows| < 1``, counted over the whole run and all processes. Which rows
    come when depends on the seed and the step alone.

    Scialom et al. 2022, arXiv:2205.12393: 1 % of rehearsal kept about all earlier skills over 8 tasks.

    **The trap:** replay practises what it replays. Measure a skill that is never replayed too.

    Args:
        memory: Old rows: a map-style dataset, or a loader, whose dataset, collate function and workers are then used.
            A dataset is collated like the training rows.
        ratio: Share of old rows among all rows of a step, inside (0, 1).
        weight: Factor of the loss that ``replay_step`` returns.
        seed: Seed of the order of old (and, where they are mixed, new) rows.

    Raises:
        ValueError: For a ratio outside (0, 1), a weight that is not positive, an empty memory; before training, for a
            module with ``replay_step`` but without ``ReplayMixin``, for rows that do not collate, and for a loader
            whose order mixing would silently replace.

    >>> ReplayMixing(memory=[("old text", 0)] * 50, ratio=0.1).ratio
    Fraction(1, 10)
    """

    def __init__(self, memory: Rows, ratio: float = 0.2, weight: float = 1.0, *, seed: int = 0) -> None:
        self.ratio = exact(ratio, _OWNER)
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{_OWNER}: weight={weight!r} must be above 0; leave the callback out for no replay.")
        self.weight, self.seed = weight, seed
        self.loader = memory if isinstance(memory, DataLoader) else None
        self.rows = cast("Dataset[Any]", memory.dataset if isinstance(memory, DataLoader) else memory)
        self.memory = MemoryStream(row_count(self.rows, f"{_OWNER}: memory"), seed)
        self.epoch, self.step = 0, 0
        self._mixed: MixLoader | None = None
        self._beside: tuple[BesidePlan, Iterator[Any]] | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return self._generate_state_key(seed=self.seed)

    def _mix(self, loader: DataLoader[Any]) -> MixLoader:
        plan = MixPlan(
            new=row_count(loader.dataset, f"{_OWNER}: training data"),
            memory=self.memory,
            ratio=self.ratio,
            batch=loader.batch_size or 1,
            seed=self.seed,
            shuffle=shuffles(loader, _OWNER),
            drop_last=loader.drop_last,
        )
        if plan.steps == 0:
            raise ValueError(f"{_OWNER}: {plan.new} rows fill no batch of {plan.batch} under drop_last=True.")
        new = cast("Any", loader.dataset)[0]
        if error := _collate_error(loader, [new]):
            raise ValueError(
                f"{_OWNER}: the training loader cannot put its own rows into a batch ({error}). Give it the collate_fn "
                "that they need."
            )
        self._try_memory(loader, [new])
        return MixLoader(loader, self.rows, plan)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage != "fit":
            return
        self.epoch, self.step = trainer.current_epoch, 0
        register_chart(trainer, "Replay", "share of old rows", ["replay/ratio"])
        if sum(isinstance(callback, ReplayMixing) for callback in cast("Any", trainer).callbacks) > 1:
            raise ValueError(
                f"{_OWNER}: stands twice among the callbacks; only one memory would be replayed. Join them by "
                "torch.utils.data.ConcatDataset."
            )
        if self._goes_beside(pl_module):
            register_chart(trainer, "Replay", "loss on old rows", ["replay/loss"])
            return
        if (share := cast("Any", trainer).overfit_batches) > 0:
            raise ValueError(
                f"{_OWNER}: overfit_batches={share!r} replaces the sampler that mixes. Use "
                "limit_train_batches, or leave the callback out of that run."
            )
        change_train_loader(trainer, _OWNER, functools.partial(self._mixed_in, trainer), rows=True)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._let_go(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go(trainer)  # there is no teardown then

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._goes_beside(pl_module):
            plan = self._beside_plan(trainer)
            self._beside = plan, iter(self._beside_loader(trainer, plan))
        rank_zero_info(
            f"{_OWNER}: {float(self.ratio):.1%} old rows from a memory of {self.memory.rows}; "
            f"an epoch is {self._plan().steps} steps."
        )

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not called when a run resumes in mid-epoch: the position from the checkpoint stays then.
        if trainer.current_epoch != self.epoch:
            self.epoch, self.step = trainer.current_epoch, 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._beside is None:
            return
        plan, batches = self._beside
        rows, scale = plan.share(self.epoch, self.step, trainer.global_rank)
        if rows:
            assert isinstance(pl_module, ReplayMixin)
            old = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(next(batches)))
            pl_module.replay = old, self.weight * scale

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step += 1
        pl_module.log_dict(self._values(pl_module), on_step=True, on_epoch=False)
        if self.step == self._plan().steps:
            self.epoch, self.step = self.epoch + 1, 0

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Past log_every_n_steps, so that a short run has a curve too.
        log_values(trainer, {key: float(value) for key, value in self._values(pl_module).items()})

    def _values(self, pl_module: pl.LightningModule) -> dict[str, float | Tensor]:
        old, total = self.drawn()
        values: dict[str, float | Tensor] = {"replay/ratio": old / total}
        if isinstance(pl_module, ReplayMixin) and pl_module.replay_loss is not None:
            values["replay/loss"] = pl_module.replay_loss
        return values

    def drawn(self) -> tuple[int, int]:
        """Return how many old rows, and how many rows in all, the run has drawn so far over all processes."""
        plan = self._plan()
        if isinstance(plan, MixPlan):
            total = self.epoch * plan.rows + min(self.step * plan.batch, plan.rows)
            return plan.old_before(total), total
        old = plan.bounds(self.epoch, self.step)[0]
        return old, old + self.epoch * plan.new + min(self.step * plan.batch, plan.new)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.step = state_dict["epoch"], state_dict["step"]
        if self._mixed is not None:
            self._mixed.mix_sampler.go_to(self.epoch, self.step)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the loaders of a run: they can be neither copied nor sent to a process."""
        return {**vars(self), "_mixed": None, "_beside": None}

    def _let_go(self, trainer: pl.Trainer) -> None:
        """Drop the loaders of the run."""
        leave_train_loader(trainer, _OWNER)
        self._mixed = self._beside = None

    def _goes_beside(self, pl_module: pl.LightningModule) -> bool:
        name = type(pl_module).__name__
        if not hasattr(pl_module, "replay_step"):
            if isinstance(pl_module, ReplayMixin):
                raise ValueError(
                    f"{_OWNER}: {name} has ReplayMixin but no replay_step. Define replay_step(self, batch)."
                )
            return False
        if not isinstance(pl_module, ReplayMixin):
            raise ValueError(
                f"{_OWNER}: {name} has a replay_step, but nothing would call it. Write class {name}(ReplayMixin, ...)."
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{_OWNER}: {name} optimizes by hand, so a loss added to what training_step returns would be ignored. "
                "Remove replay_step to have old rows mixed into its batches."
            )
        return True

    def _plan(self) -> MixPlan | BesidePlan:
        if self._beside is not None:
            return self._beside[0]
        assert self._mixed is not None
        return self._mixed.mix_sampler.plan

    def _mixed_in(self, trainer: pl.Trainer, loader: Any) -> MixLoader:
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"{_OWNER}: train_dataloader returned a {type(loader).__name__}; rows can be mixed into a single torch DataLoader "
                "only."
            )
        return self._place(trainer, self._mix(loader))

    def _place(self, trainer: pl.Trainer, mixed: MixLoader) -> MixLoader:
        """Tell a mixed loader its process, how many there are, and where a resumed run goes on."""
        self._mixed, sampler, world = mixed, mixed.mix_sampler, trainer.world_size
        whole = sampler.plan.for_world(world, mixed.batch_size or 1)
        limit = trainer.limit_train_batches
        limited = min(limit, whole.steps) if isinstance(limit, int) else int(limit * whole.steps)
        sampler.plan = whole if limited == whole.steps else whole.cut_to(limited)
        sampler.rank, sampler.num_replicas = trainer.global_rank, world
        sampler.go_to(self.epoch, self.step)
        return mixed

    def _beside_plan(self, trainer: pl.Trainer) -> BesidePlan:
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            raise ValueError(
                f"{_OWNER}: the training loader is a {type(loader).__name__} without a fixed batch_size, so the number "
                "of its rows is not known. Use one torch DataLoader with a batch_size."
            )
        row_count(loader.dataset, f"{_OWNER}: training data")
        own = min(len(cast("Any", loader.sampler)), int(trainer.num_training_batches) * loader.batch_size)
        if loader.drop_last:
            own = own // loader.batch_size * loader.batch_size
        world = trainer.world_size
        return BesidePlan(own * world, self.memory, self.ratio, loader.batch_size * world, world, self.seed)

    def _beside_loader(self, trainer: pl.Trainer, plan: BesidePlan) -> DataLoader[Any]:
        loader = self.loader or cast("DataLoader[Any]", trainer.train_dataloader)
        options = carried_options(loader) if self.loader else {"collate_fn": loader.collate_fn}
        self._try_memory(loader, [])
        return DataLoader(
            self.rows,
            batch_sampler=BesideSampler(plan, self.epoch, self.step, trainer.global_rank),
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )

    def _try_memory(self, loader: DataLoader[Any], beside: list[Any]) -> None:
        old = cast("Any", self.rows)[0]
        if error := _collate_error(loader, [*beside, old]):
            raise ValueError(
                f"{_OWNER}: the first row of the memory, {old!r:.200}, cannot be put into a batch by the collate function "
                f"({error}). Old rows must look like the training rows, or come as a loader with a collate_fn of its own "
                "for replay_step."
            ) from error


def _collate_error(loader: DataLoader[Any], rows: list[Any]) -> Exception | None:
    with torch.random.fork_rng(devices=[]):
        try:
            loader.collate_fn(rows)
        except Exception as error:
            return error
    return None

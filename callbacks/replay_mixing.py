"""Replay: keep an exact share of old rows in every training run, mixed in or beside, exact over ranks and resumes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override

from lightning_peft.callbacks.replay_tokens import TokenCount
from lightning_peft.callbacks.replay_ways import Beside, Mixed, Streamed, Way
from lightning_peft.data.beside_plan import BesidePlan
from lightning_peft.data.collating import collate_error, try_memory
from lightning_peft.data.mix_loader import BesideSampler, MixLoader, Rows, carried_options, row_count, shuffles
from lightning_peft.data.mix_plan import MixPlan
from lightning_peft.data.mix_stream import MixStreamLoader
from lightning_peft.data.ratio import Curve, SteeredCurve, exact
from lightning_peft.data.streams import Stream
from lightning_peft.logging import log_values, register_chart
from lightning_peft.mixins import MAMLMixin, ReplayMixin
from lightning_peft.one_lightning import refuse_pytorch_lightning
from lightning_peft.train_loader import change_train_loader, leave_loaders

_OWNER = "ReplayMixing"
Unit = Literal["rows", "tokens", "loss"]


class ReplayMixing(pl.Callback):
    """Rehearse old rows while new ones are learned.

    A module without ``replay_step`` gets old rows inside its batches, whose size stays the loader's; they must look
    like its training rows. A module with ``replay_step`` (and :class:`~lightning_peft.ReplayMixin`) keeps its batches
    unchanged and gets a batch of old rows beside each: ``ratio / (1 - ratio)`` times as many rows.

    After every step, ``|old rows - ratio * all rows| < 1``, counted over the whole run and all processes. Which rows
    come when depends on the seed and the step alone. A ratio that changes from step to step is summed; an epoch then has as
    many steps as without replay, and the next one goes on with the new rows that are left.

    Scialom et al. 2022, arXiv:2205.12393: 1 % of rehearsal kept about all earlier skills over 8 tasks.

    **The trap:** replay practises what it replays. Measure a skill that is never replayed too.

    Args:
        memory: Old rows: a map-style dataset, or a loader, whose dataset, collate function and workers are then used.
            A dataset is collated like the training rows. A buffer may grow between fits.
        ratio: Share of old rows, inside (0, 1); or a function that takes the number of the step, from 0, and returns a
            share in [0, 1), such as :class:`~lightning_peft.data.LinearRatio`.
        weight: Factor of the loss that ``replay_step`` returns.
        unit: What the ratio is a share of. ``"rows"``; ``"tokens"``: rows are drawn in the share that makes up this share
            of tokens, by the mean lengths; ``"loss"``: with ``replay_step``, the training loss is
            ``(1 - ratio) * new + ratio * old``, with at least one old row beside each step.
        tokens: For ``unit="tokens"``: takes a row and returns how many tokens it has.
        seed: Seed of the order of old (and, where they are mixed, new) rows.

    Raises:
        ValueError: For a ratio outside (0, 1), a weight that is not positive, an empty memory, a unit that lacks what it
            needs; before training, for a module with ``replay_step`` but without ``ReplayMixin``, for rows that do not
            collate, and for a loader whose order mixing would silently replace.

    >>> ReplayMixing(memory=[("old text", 0)] * 50, ratio=0.1).ratio
    Fraction(1, 10)
    """

    def __init__(
        self,
        memory: Rows,
        ratio: float | Callable[[int], float] = 0.2,
        weight: float = 1.0,
        *,
        unit: Unit = "rows",
        tokens: Callable[[Any], int] | None = None,
        seed: int = 0,
    ) -> None:
        self.ratio: Fraction | Curve = Curve(ratio, _OWNER) if callable(ratio) else exact(ratio, _OWNER)
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{_OWNER}: weight={weight!r} must be above 0; leave the callback out for no replay.")
        if unit not in get_args(Unit):
            raise ValueError(f"{_OWNER}: unit={unit!r} must be one of {', '.join(map(repr, get_args(Unit)))}.")
        if (tokens is not None) != (unit == "tokens"):
            raise ValueError(
                f"{_OWNER}: unit={unit!r} with tokens={tokens!r}: a function that counts goes with 'tokens'."
            )
        if unit == "loss" and weight != 1:
            raise ValueError(
                f"{_OWNER}: weight={weight!r} with unit='loss': the ratio is the weight already. Leave it out."
            )
        self.weight, self.unit, self.seed = weight, unit, seed
        self.tokens = None if tokens is None else TokenCount(tokens, _OWNER)
        self.loader = memory if isinstance(memory, DataLoader) else None
        self.rows = cast("Dataset[Any]", memory.dataset if isinstance(memory, DataLoader) else memory)
        row_count(self.rows, f"{_OWNER}: memory")
        self.epoch, self.step = 0, 0
        self._coming, self._share = 0, 0.0
        self._way: Way | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return self._generate_state_key(seed=self.seed)

    @property
    def memory(self) -> Stream:
        """The endless draws from the old rows."""
        return Stream(row_count(self.rows, f"{_OWNER}: memory"), self.seed)

    def steer(self, ratio: float) -> None:
        """Begin with a share that may be changed while training; call it before the fit's ``setup``.

        Args:
            ratio: In [0, 1).
        """
        self.ratio = SteeredCurve(ratio, _OWNER)

    def change_ratio(self, ratio: float) -> int:
        """Let the share of old rows be another one, from the first step whose rows are not chosen yet.

        Args:
            ratio: In [0, 1).

        Returns:
            That step, counted from 0 over the run.

        Raises:
            ValueError: If the share is not steered.
        """
        if not isinstance(self.ratio, SteeredCurve) or self._way is None or self._way.steps is None:
            raise ValueError(
                f"{_OWNER}: the ratio is {_told(self.ratio)}; call steer() before the fit to change it while training."
            )
        step = self._coming + self._way.ahead
        self.ratio.change(step, ratio)
        return step

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage != "fit":
            return
        self.epoch, self.step = trainer.current_epoch, 0
        charts = {"share of old rows": ["replay/ratio"]}
        if sum(isinstance(callback, ReplayMixing) for callback in cast("Any", trainer).callbacks) > 1:
            raise ValueError(
                f"{_OWNER}: stands twice among the callbacks; only one memory would be replayed. Join them by "
                "torch.utils.data.ConcatDataset."
            )
        if self._goes_beside(pl_module):
            charts["losses"] = ["replay/loss", "replay/loss_new"]
        else:
            change_train_loader(trainer, _OWNER, functools.partial(self._mixed_in, trainer), rows=True)
        if isinstance(self.ratio, Curve):
            charts["share of old rows"].append("replay/ratio_now")
        if self.tokens is not None:
            charts["share of old tokens"] = ["replay/tokens"]
        for title, keys in charts.items():
            register_chart(trainer, "Replay", title, keys)

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
            self._way = Beside(plan, iter(self._beside_loader(trainer, plan)))
        steps = self._present.steps
        self._coming = self.epoch * (steps or 0) + self.step
        rank_zero_info(
            f"{_OWNER}: {_told(self.ratio)} old {self.unit} from a memory of {self.memory.rows}"
            + ("." if steps is None else f"; an epoch is {steps} steps.")
        )

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not called when a run resumes in mid-epoch: the position from the checkpoint stays then.
        if trainer.current_epoch != self.epoch:
            self.epoch, self.step = trainer.current_epoch, self.step if self._present.steps is None else 0
        if self._present.steps is None:
            self._present.go_to(self.epoch, self.step)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._coming = self.epoch * (self._present.steps or 0) + self.step + 1
        if not isinstance(self._way, Beside):
            return
        rows, scale = self._way.plan.share(self.epoch, self.step, trainer.global_rank)
        if rows:
            assert isinstance(pl_module, ReplayMixin)
            old = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(next(self._way.batches)))
            share = self._now() if self.unit == "loss" else None
            pl_module.replay = old, scale * (self.weight if share is None else share), 1 - (share or 0)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.tokens is not None and isinstance(self._way, Mixed):
            self.tokens.count(self._way.loader.mix_sampler.plan, self.epoch, self.step)
        self.step += 1
        pl_module.log_dict(self._values(pl_module), on_step=True, on_epoch=False)
        if self.step == self._present.steps:
            self.epoch, self.step = self.epoch + 1, 0

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Past log_every_n_steps, so that a short run has a curve too.
        log_values(trainer, {key: float(value) for key, value in self._values(pl_module).items()})

    def _values(self, pl_module: pl.LightningModule) -> dict[str, float | Tensor]:
        old, total = self.drawn()
        self._share = old / total
        values: dict[str, float | Tensor] = {"replay/ratio": self._share}
        if isinstance(self.ratio, Curve):
            values["replay/ratio_now"] = self._now()
        if self.tokens is not None and self.tokens.all:
            values["replay/tokens"] = self.tokens.old / self.tokens.all
        if isinstance(pl_module, ReplayMixin) and pl_module.replay_loss is not None:
            assert pl_module.new_loss is not None
            values |= {"replay/loss": pl_module.replay_loss, "replay/loss_new": pl_module.new_loss}
        return values

    def _now(self) -> float:
        """Return the share at the coming step."""
        if isinstance(self.ratio, Fraction):
            return float(self.ratio)
        return self.ratio.ratio(self.epoch * (self._present.steps or 0) + self.step)

    def drawn(self) -> tuple[int, int]:
        """Return how many old rows, and how many rows in all, the run has drawn so far over all processes."""
        return self._present.drawn(self.epoch, self.step)

    @property
    def share(self) -> float:
        """The share of old rows so far, also after the fit."""
        return self._share

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"epoch": self.epoch, "step": self.step}
        if isinstance(self.ratio, SteeredCurve):
            state["steered"] = self.ratio.state_dict()
        if self.tokens is not None:
            state["tokens"] = [self.tokens.old, self.tokens.all]
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.step = state_dict["epoch"], state_dict["step"]
        if isinstance(self.ratio, SteeredCurve) and "steered" in state_dict:
            self.ratio.load_state_dict(state_dict["steered"])
        if self.tokens is not None and "tokens" in state_dict:
            self.tokens.old, self.tokens.all = state_dict["tokens"]
        if self._way is not None:
            self._way.go_to(self.epoch, self.step)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the loaders of a run: they can be neither copied nor sent to a process."""
        return {**vars(self), "_way": None}

    def _let_go(self, trainer: pl.Trainer) -> None:
        """Drop the loaders of the run."""
        leave_loaders(trainer, _OWNER)
        self._way = None

    @property
    def _present(self) -> Way:
        assert self._way is not None
        return self._way

    def _goes_beside(self, pl_module: pl.LightningModule) -> bool:
        name = type(pl_module).__name__
        if not hasattr(pl_module, "replay_step"):
            if isinstance(pl_module, ReplayMixin):
                raise ValueError(
                    f"{_OWNER}: {name} has ReplayMixin but no replay_step. Define replay_step(self, batch)."
                )
            if isinstance(pl_module, MAMLMixin):
                raise ValueError(
                    f"{_OWNER}: {name} learns from episodes, and old rows among them would be part of a task. Let them come "
                    f"beside: class {name}(ReplayMixin, MAMLMixin, ...) with a replay_step."
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

    def _mixed_in(self, trainer: pl.Trainer, loader: Any) -> DataLoader[Any]:
        """Return a loader that mixes old rows in, for this process and from where a resumed run goes on."""
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"{_OWNER}: train_dataloader returned a {type(loader).__name__}; rows can be mixed into a single torch DataLoader "
                "only."
            )
        if self.unit == "loss":
            raise ValueError(
                f"{_OWNER}: unit='loss' needs a loss on old rows. Define replay_step, and write ReplayMixin."
            )
        made = (
            self._stream(trainer, loader) if isinstance(loader.dataset, IterableDataset) else self._mix(trainer, loader)
        )
        self._way = made
        made.go_to(self.epoch, self.step)
        return made.loader

    def _mix(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> Mixed:
        new_rows, world = row_count(loader.dataset, f"{_OWNER}: training data"), trainer.world_size
        plan = MixPlan(
            new=new_rows,
            memory=self.memory,
            ratio=self._of_rows(loader.dataset),
            batch=(loader.batch_size or 1) * world,
            world=world,
            seed=self.seed,
            shuffle=shuffles(loader, _OWNER),
            drop_last=loader.drop_last,
        )
        if plan.steps == 0:
            raise ValueError(f"{_OWNER}: {plan.new} rows fill no batch of {plan.batch} under drop_last=True.")
        self._try_rows(loader, cast("Any", loader.dataset)[0])
        limit = trainer.limit_train_batches
        limited = min(limit, plan.steps) if isinstance(limit, int) else int(limit * plan.steps)
        plan = plan if limited == plan.steps else plan.cut_to(limited)
        same = bool(cast("Any", trainer).overfit_batches)
        return Mixed(MixLoader(loader, self.rows, plan, trainer.global_rank, same=same))

    def _stream(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> Streamed:
        if loader.batch_size is None or isinstance(self.ratio, SteeredCurve) or self.tokens is not None:
            what = "a batch_size" if loader.batch_size is None else "a ratio of rows that is known from the start"
            raise ValueError(f"{_OWNER}: rows of a {type(loader.dataset).__name__}, which has no length, need {what}.")
        try_memory(loader, [], self.rows, _OWNER)
        world = trainer.world_size
        plan = MixPlan(2**40, self.memory, self.ratio, loader.batch_size * world, world, self.seed, shuffle=False)
        return Streamed(MixStreamLoader(loader, self.rows, plan, trainer.global_rank))

    def _of_rows(self, new: Any) -> Fraction | Curve:
        """Return the share of rows that makes up the ratio in its unit."""
        if self.tokens is None:
            return self.ratio
        self.tokens.measure(new, self.rows)
        return self.tokens.of_rows(self.ratio)

    def _try_rows(self, loader: DataLoader[Any], new: Any) -> None:
        if error := collate_error(loader, [new]):
            raise ValueError(
                f"{_OWNER}: the training loader cannot put its own rows into a batch ({error}). Give it the collate_fn "
                "that they need."
            )
        try_memory(loader, [new], self.rows, _OWNER)

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
        ratio = self._of_rows(loader.dataset)
        if self.unit == "loss":
            ratio = _at_least(ratio, Fraction(1, loader.batch_size * world + 1))
        return BesidePlan(own * world, self.memory, ratio, loader.batch_size * world, world, self.seed)

    def _beside_loader(self, trainer: pl.Trainer, plan: BesidePlan) -> DataLoader[Any]:
        loader = self.loader or cast("DataLoader[Any]", trainer.train_dataloader)
        options = carried_options(loader) if self.loader else {"collate_fn": loader.collate_fn}
        if isinstance(plan.ratio, Curve):  # workers would have to know the coming ratios
            options = {"collate_fn": loader.collate_fn}
        try_memory(loader, [], self.rows, _OWNER)
        return DataLoader(
            self.rows,
            batch_sampler=BesideSampler(plan, self.epoch, self.step, trainer.global_rank),
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )


def _told(ratio: Fraction | Curve) -> str:
    return f"{float(ratio):.1%}" if isinstance(ratio, Fraction) else "a changing share of"


def _at_least(ratio: Fraction | Curve, least: Fraction) -> Fraction | Curve:
    """Raise a share to one that gives a row in every step, where it is above zero."""
    if isinstance(ratio, Fraction):
        return max(ratio, least)
    return Curve(lambda step: max(share, float(least)) if (share := ratio.ratio(step)) else 0.0, _OWNER)

"""Fill a memory with rows of the task that is being learned, for the tasks after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from typing_extensions import override

from lightning_peft.callbacks.measuring import forward_context
from lightning_peft.callbacks.replay_mixing import ReplayMixing
from lightning_peft.data.batch_rows import batch_rows
from lightning_peft.data.buffers import MemoryBuffer, StoredRow
from lightning_peft.data.mix_loader import MixLoader, Rows, row_count
from lightning_peft.distributed import gather_objects, rank, world_size
from lightning_peft.old_task import untouched
from lightning_peft.one_lightning import refuse_pytorch_lightning

_OWNER = "MemoryFill"

# What a user may pass to tell the label of a row: its place in the row, or a function of the row.
RowLabel: TypeAlias = int | str | Callable[[Any], Any]
# What a user may pass to have the network look at a batch: a function of the module and the batch.
Look: TypeAlias = Callable[[Any, Any], Tensor]


class MemoryFill(pl.Callback):
    """Fill a buffer with rows of this fit's task, to be replayed in the fits after it.

    ``during="end"`` offers every row of the task's dataset once, in its order, when training ends; rows are what the
    dataset gives. ``during="batches"`` offers the rows of each training batch of the fit's first epoch, after the batch's
    step; rows are then what the collate function made of them. Under DDP every rank holds the same buffer: the rows of a
    step come in the order of the ranks. The buffer is in the checkpoint, with the place of its last batch, so a resumed run
    counts no row twice. Training is bit-identical with and without it.

    Replayed rows are never put back. At the end, the rows of a ``ReplayMixing`` are left out; in batches, old and new rows
    cannot be told apart, so ``during="batches"`` is refused where old rows are mixed in. Beside a ``replay_step`` it is
    allowed, as the batches hold new rows only, but not into the very buffer that is being replayed.

    **The trap:** a process that begins anew has an empty buffer. Keep ``buffer.state_dict()`` after each task.

    Args:
        buffer: Gets the rows.
        rows: The task's rows, a map-style dataset or a loader, whose dataset, collate function and batch size are then used; by
            default those of the training loader. For ``during="end"``.
        during: When to take them.
        label: The class of a row: an index or key into it, or a function of it.
        feature: ``feature(module, batch)`` returns the features of a batch, ``(rows, ...)``, for herding.
        logits: ``logits(module, batch)`` returns what is stored for distillation, ``(rows, ...)``, with the number of
            optimizer steps that were done. Both run without gradient, in eval mode, on the module's device.

    Raises:
        ValueError: For arguments that do not fit together or lack what the buffer needs; before training, where replayed rows would
            be put back, and for rows that the buffer cannot take; at the first batch, if it cannot be taken apart into rows.

    >>> from lightning_peft.data.reservoir_buffer import ReservoirBuffer
    >>> MemoryFill(ReservoirBuffer(200), label=1).during
    'end'
    """

    def __init__(
        self,
        buffer: MemoryBuffer,
        rows: Rows | None = None,
        *,
        during: Literal["end", "batches"] = "end",
        label: RowLabel | None = None,
        feature: Look | None = None,
        logits: Look | None = None,
    ) -> None:
        if not isinstance(buffer, MemoryBuffer):
            raise ValueError(
                f"{_OWNER}: buffer={buffer!r:.200} must be a buffer, such as ReservoirBuffer(capacity=200)."
            )
        if during not in {"end", "batches"}:
            raise ValueError(f"{_OWNER}: during={during!r} must be 'end' or 'batches'.")
        if rows is not None and during == "batches":
            raise ValueError(f"{_OWNER}: rows= are not read during='batches'. Leave them out, or pass during='end'.")
        if label is not None and not callable(label) and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise ValueError(f"{_OWNER}: label={label!r} must be an index or key into a row, or a function of it.")
        given = {"label": label, "feature": feature, "logits": logits}
        for name in ("feature", "logits"):
            if given[name] is not None and not callable(given[name]):
                raise ValueError(f"{_OWNER}: {name}={given[name]!r} must be a function of (module, batch).")
        for name in buffer.needs:
            if given[name] is None:
                raise ValueError(f"{_OWNER}: {type(buffer).__name__} needs the {name} of each row. Pass {name}=.")
        if rows is not None:
            row_count(rows.dataset if isinstance(rows, DataLoader) else rows, f"{_OWNER}: rows")
        self.buffer, self.rows, self.during = buffer, rows, during
        self.label, self.feature, self.logits = label, feature, logits
        self._first_epoch, self._taken, self._done = 0, 0, False

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return self._generate_state_key(buffer=type(self.buffer).__name__, capacity=self.buffer.capacity)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_pytorch_lightning(type(trainer), _OWNER)
        if stage == "fit":  # a checkpoint is restored later
            self._first_epoch, self._taken, self._done = trainer.current_epoch, 0, False
            if self.during == "batches":
                self._refuse_replayed(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.during == "end":
            self._try_first_row(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.during == "end" or trainer.current_epoch != self._first_epoch or batch_idx < self._taken:
            return
        with self._unseen(trainer, pl_module):
            rows = batch_rows(apply_to_collection(batch, Tensor, Tensor.cpu), _OWNER)
            own = self._described(trainer, pl_module, batch, rows)
        self._give(own)
        self._taken = batch_idx + 1

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module)  # a run that resumes after its last step has no end of training

    @override
    def state_dict(self) -> dict[str, Any]:
        place = {"first_epoch": self._first_epoch, "taken": self._taken, "done": self._done}
        return {"buffer": self.buffer.state_dict(), **place}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict["buffer"])
        self._first_epoch, self._taken = state_dict["first_epoch"], state_dict["taken"]
        self._done = state_dict["done"]

    def _refuse_replayed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mixings = [callback for callback in cast("Any", trainer).callbacks if isinstance(callback, ReplayMixing)]
        if mixings and not hasattr(pl_module, "replay_step"):
            raise ValueError(
                f"{_OWNER}: old rows are mixed into the training batches, and during='batches' would put them into the buffer "
                "again. Pass during='end', or give the module a replay_step, which gets old rows beside the batches."
            )
        if any(getattr(mixing.rows, "buffer", mixing.rows) is self.buffer for mixing in mixings):
            raise ValueError(
                f"{_OWNER}: ReplayMixing replays from the buffer that during='batches' would change under it; it plans with the "
                "rows it began with. Pass during='end', or fill another buffer."
            )

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._done:
            return
        if self.during == "end":
            self._take_dataset(trainer, pl_module)
        self.buffer.end_task()
        self._done = True
        rank_zero_info(f"{_OWNER}: the buffer holds {len(self.buffer)} of {self.buffer.seen} rows.")

    def _take_dataset(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Offer every row; each process reads every ``world``-th chunk, so that the chunks do not depend on their number."""
        dataset, collate, size = self._source(trainer)
        chunks = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
        world = world_size()
        for turn in range(0, len(chunks), world):
            number = turn + rank()
            # One without a chunk of its own looks too: sharded modules communicate in every forward.
            chunk = chunks[min(number, len(chunks) - 1)]
            with self._unseen(trainer, pl_module):
                own = self._read(trainer, pl_module, [dataset[index] for index in chunk], collate)
            self._give(own if number < len(chunks) else [])

    def _source(self, trainer: pl.Trainer) -> tuple[Any, Callable[[Any], Any], int]:
        """Return the dataset, and how to put its rows into batches of which size."""
        loader: Any = trainer.train_dataloader if self.rows is None else self.rows
        if not isinstance(loader, DataLoader) and self.rows is None:
            raise ValueError(
                f"{_OWNER}: train_dataloader returned a {type(loader).__name__}, whose rows are not known. Pass rows=, a map-style "
                "dataset."
            )
        dataset: Any = loader.dataset if isinstance(loader, DataLoader) else loader
        new = dataset.new if isinstance(loader, MixLoader) else dataset
        row_count(new, f"{_OWNER}: rows")
        own = loader if isinstance(loader, DataLoader) else trainer.train_dataloader
        collate = own.collate_fn if isinstance(own, DataLoader) else default_collate
        size = own.batch_size if isinstance(own, DataLoader) else None
        return new, collate, size or 32

    def _try_first_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before training rather than after it, if the rows cannot be taken."""
        dataset, collate, _ = self._source(trainer)
        with self._unseen(trainer, pl_module):
            self._read(trainer, pl_module, [dataset[0]], collate)

    def _read(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[Any], collate: Callable[[Any], Any]
    ) -> list[StoredRow]:
        batch = None
        if self._looks:
            batch = trainer.precision_plugin.convert_input(collate(rows))
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
        return self._described(trainer, pl_module, batch, rows)

    def _described(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, rows: list[Any]
    ) -> list[StoredRow]:
        seen = {name: _look(look, name, pl_module, batch, len(rows)) for name, look in self._looks.items()}
        step = None if self.logits is None else trainer.global_step
        return [
            self.buffer.describe(
                row, label=self._label(row), step=step, **{name: values[number] for name, values in seen.items()}
            )
            for number, row in enumerate(rows)
        ]

    @property
    def _looks(self) -> dict[str, Look]:
        looks = {"feature": self.feature, "logits": self.logits}
        return {name: look for name, look in looks.items() if look is not None}

    def _label(self, row: Any) -> Any:
        if self.label is None:
            return None
        if callable(self.label):
            return self.label(row)
        try:
            return row[self.label]
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{_OWNER}: label={self.label!r} is no part of the row {row!r:.200}. Pass an index or key into a row, or a "
                "function of it."
            ) from error

    def _give(self, own: list[StoredRow]) -> None:
        for stored in (stored for rows in gather_objects(own) for stored in rows):
            self.buffer.take(stored)

    def _unseen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> AbstractContextManager[None]:
        return _unseen(trainer, pl_module if self._looks else None)


def _look(look: Look, name: str, pl_module: pl.LightningModule, batch: Any, rows: int) -> Tensor:
    values = look(pl_module, batch)
    if not isinstance(values, Tensor) or values.dim() == 0 or len(values) != rows:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{_OWNER}: {name} returned {found} for a batch of {rows} rows; it must return ({rows}, ...).")
    return values.cpu()


@contextmanager
def _unseen(trainer: pl.Trainer, module: nn.Module | None) -> Iterator[None]:
    """Let rows be read, and a module look at them, without a trace in generators, gradients, modes and statistics."""
    if module is None:
        with isolate_rng(include_cuda=torch.cuda.is_available()):
            yield
        return
    with untouched(module, trainer.strategy.root_device), torch.no_grad(), forward_context(trainer):
        yield

"""Dark experience replay: old rows come back with the logits that the module once gave them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_peft.data.mix_loader import Rows, row_count
from lightning_peft.distillation import IGNORED, der_loss
from lightning_peft.distributed import rank
from lightning_peft.mixins.distill_mixin import refuse_two_replays
from lightning_peft.mixins.order import refuse_order
from lightning_peft.mixins.replay_mixin import ReplayMixin
from lightning_peft.old_task import untouched


class LogitMemory(Dataset[tuple[Any, Tensor, int]]):
    """Old rows, each with the logits that a module gave it, and the step at which it did: ``(row, logits, step)``.

    Args:
        rows: A map-style dataset.
        logits: ``(rows, ..., classes)``, in its order.
        step: The optimizer step at which they were taken.
        collate: Puts rows, without their logits, into a batch.

    Raises:
        ValueError: If there are not as many logits as rows.

    >>> memory = LogitMemory(["a", "b"], torch.zeros(2, 3), step=7)
    >>> memory[1]
    ('b', tensor([0., 0., 0.]), 7)
    """

    def __init__(
        self, rows: Any, logits: Tensor, step: int, collate: Callable[[list[Any]], Any] = default_collate
    ) -> None:
        count = row_count(rows, "LogitMemory: rows")
        if len(logits) != count:
            raise ValueError(f"LogitMemory: {len(logits)} logits for {count} rows; it needs those of each row.")
        self.rows, self.logits, self.step, self.collate = rows, logits, step, collate

    def __len__(self) -> int:
        return len(self.logits)

    @override
    def __getitem__(self, index: int) -> tuple[Any, Tensor, int]:
        return self.rows[index], self.logits[index], self.step

    def loader(self) -> DataLoader[Any]:
        """Return a loader for ``ReplayMixing``: batches of ``(batch of rows, logits, steps)``."""
        return DataLoader(self, collate_fn=functools.partial(_collate, self.collate))


class DERMixin(ReplayMixin):
    """Let a module learn its task while its logits on old rows, and their labels, are rehearsed: DER++.

    Define ``distill_outputs(self, batch)``, which returns logits. :func:`store_logits` makes the memory, and
    ``ReplayMixing(memory.loader())`` brings it; in the same forward the training loss gets
    ``weight * (der_alpha * MSE(logits, stored logits) + der_beta * CE(logits, labels))``,
    :func:`~lightning_peft.distillation.der_loss`. Labels are the batch's ``"labels"``, or its second entry;
    ``distill_targets(self, batch)``, if there is one, returns others. ``distill_mask(self, batch)`` says which rows or tokens
    have logits that count.

    Buzzega et al. 2020, arXiv:2004.07211.

    **The trap:** logits are as many as the classes: for text, a whole vocabulary per token. There hold the module to its
    reference instead, which stores no logits (:class:`~lightning_peft.mixins.distill_mixin.DistillMixin`).

    Raises:
        TypeError: When a class is made, for an order of bases in which the mixin, or another ``replay_step``, would be
            skipped.
        ValueError: When a class is made, or a fit begins, for weights out of range, or without ``distill_outputs``; in
            training, for batches that hold no stored logits, or no labels.
    """

    der_alpha: float = 0.5
    """Weight of the stored logits."""
    der_beta: float = 0.5
    """Weight of the labels; 0 is DER, for rows without labels."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which something would be skipped, and weights out of range."""
        refuse_order(cls, DERMixin)
        refuse_two_replays(cls, DERMixin)
        super().__init_subclass__(**kwargs)
        _check_weights(cls.__name__, cls)

    if TYPE_CHECKING:  # at run time it is the module's, which may stand behind the mixin

        def distill_outputs(self, batch: Any) -> Tensor:
            """Return logits, ``(rows, ..., classes)``; yours to define."""

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            _check_weights(type(self).__name__, self)
            if not hasattr(self, "distill_outputs"):
                raise ValueError(
                    f"{type(self).__name__}: has DERMixin but no distill_outputs. Define distill_outputs(self, batch)."
                )

    @override
    def replay_step(self, batch: Any) -> Tensor:
        """Return the loss of DER++ on a batch of old rows."""
        if not isinstance(batch, Sequence) or len(batch) != 3 or not isinstance(batch[1], Tensor):
            raise ValueError(
                f"{type(self).__name__}: the memory's batch is no (rows, logits, steps). Make the memory with "
                "store_logits, and hand ReplayMixing its loader()."
            )
        rows, stored, _ = batch
        which: Any = getattr(self, "distill_mask", None)
        logits = self.distill_outputs(rows)
        unlabelled = torch.full(logits.shape[:-1], IGNORED, device=logits.device)
        labels = self._labels(rows) if self.der_beta else unlabelled
        mask = None if which is None else which(rows)
        return der_loss(logits, stored, labels, alpha=self.der_alpha, beta=self.der_beta, mask=mask)

    def _labels(self, rows: Any) -> Tensor:
        found: Any = None
        own: Any = getattr(self, "distill_targets", None)
        if own is not None:
            found = own(rows)
        elif isinstance(rows, Mapping):
            found = rows.get("labels")
        elif isinstance(rows, Sequence) and len(rows) > 1:
            found = rows[1]
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{type(self).__name__}: a {type(rows).__name__} of old rows has no labels. Define distill_targets(self, "
                "batch), or set der_beta = 0 to rehearse logits alone."
            )
        return found


def store_logits(
    rows: Rows,
    module: pl.LightningModule,
    outputs: Callable[[Any, Any], Tensor] | None = None,
    *,
    batch_size: int = 32,
    step: int | None = None,
) -> LogitMemory:
    """Run a module, as it is now, over old rows and keep its logits beside them: the memory of :class:`DERMixin`.

    In eval mode; the mode of every single module and the generators of random numbers are as before.

    Args:
        rows: A map-style dataset, or a loader, whose dataset and collate function are then used.
        module: Its adapter acts, as in any forward.
        outputs: ``outputs(module, batch)`` returns logits, ``(rows, ..., classes)``; unset, the module's ``distill_outputs``.
        batch_size: Rows of a forward.
        step: The optimizer step that is noted; unset, the module's ``global_step``.

    Raises:
        ValueError: If there are no rows, nothing that gives logits, or not one entry of logits for each row, all of one shape.
    """
    collate = rows.collate_fn if isinstance(rows, DataLoader) else default_collate
    dataset = rows.dataset if isinstance(rows, DataLoader) else rows
    count = row_count(dataset, "store_logits: rows")
    if batch_size < 1:
        raise ValueError(f"store_logits: batch_size={batch_size!r} must be at least 1.")
    if outputs is None and not hasattr(module, "distill_outputs"):
        raise ValueError(
            f"store_logits: {type(module).__name__} has no distill_outputs. Define it, or pass outputs=, a function of "
            "(module, batch) that returns logits."
        )
    found = _logits(DataLoader(dataset, batch_size, collate_fn=collate, generator=torch.Generator()), module, outputs)
    taken = module.global_step if step is None else step
    shapes = {tuple(logits.shape[1:]) for logits in found}
    if len(shapes) > 1 or sum(map(len, found)) != count:
        raise ValueError(
            f"store_logits: {sum(map(len, found))} logits of shapes {sorted(shapes)} for {count} rows. It needs one entry for "
            "each row, all of one shape: pad rows to one length."
        )
    return LogitMemory(dataset, torch.cat(found), taken, collate)


@torch.no_grad()
def _logits(
    loader: DataLoader[Any], module: pl.LightningModule, outputs: Callable[[Any, Any], Tensor] | None
) -> list[Tensor]:
    found: list[Tensor] = []
    with untouched(module, module.device):
        for batch in tqdm(loader, desc="logits", delay=2, leave=False, disable=rank() > 0):
            moved = move_data_to_device(batch, module.device)
            logits = cast("Any", module).distill_outputs(moved) if outputs is None else outputs(module, moved)
            found.append(logits.cpu())
    return found


def _collate(
    collate: Callable[[list[Any]], Any], items: Sequence[tuple[Any, Tensor, int]]
) -> tuple[Any, Tensor, Tensor]:
    rows, logits, steps = zip(*items, strict=True)
    return collate(list(rows)), torch.stack(logits), torch.tensor(steps)


def _check_weights(name: str, found: type[DERMixin] | DERMixin) -> None:
    weights = {"der_alpha": found.der_alpha, "der_beta": found.der_beta}
    for key, value in weights.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: {key}={value!r} must be a number of at least 0.")
    if not any(weights.values()):
        raise ValueError(f"{name}: der_alpha=0 and der_beta=0 rehearse nothing. Leave DERMixin out for that.")

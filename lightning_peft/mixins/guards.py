"""What a run with an adapter is stopped or warned for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.adapters.attachment import Attachment, moved_flags
from lightning_peft.adapters.layer import is_merged
from lightning_peft.adapters.updates import ATTRIBUTE
from lightning_peft.freezing import trainable_names

if TYPE_CHECKING:
    from lightning_peft.mixins.adapter_mixin import AdapterMixin


def refuse_fit(trainer: pl.Trainer, module: AdapterMixin, *, attached: bool) -> None:
    """Stop a run that could not end well.

    Raises:
        ValueError: For a merged adapter, a resume under FSDP2, and weight averaging that copies the module too early.
    """
    name = type(module).__name__
    if is_merged(module):
        raise ValueError(f"{name}: the adapter is merged, so nothing of it would train. Call unmerge_adapter first.")
    if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.ckpt_path is not None:
        raise ValueError(
            f"{name}: ckpt_path={str(trainer.ckpt_path)!r}: under FSDP2 a checkpoint of what trains cannot be resumed "
            "yet. Resume with strategy='ddp'."
        )
    if not attached and any(
        isinstance(callback, StochasticWeightAveraging) for callback in cast("Any", trainer).callbacks
    ):
        raise ValueError(
            f"{name}: StochasticWeightAveraging copies the module before the adapter comes. Call attach_adapter() on "
            "the module before fit, or use WeightAveraging."
        )


def refuse_dead_adapters(trainer: pl.Trainer, module: AdapterMixin, attachment: Attachment) -> None:
    """Stop a run some of whose adapters got no gradient from its first batch: they would never train.

    Under DDP such parameters end the run at its second batch, with a message that knows only their numbers.

    Raises:
        ValueError: With the layers and the ``exclude=`` that leaves them out.
    """
    if getattr(trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters"):
        return
    added = attachment.trained.get(attachment.active or "", set()) - attachment.flags.keys()
    parameters = dict(module.adapted_network.named_parameters())
    dead = sorted(name for name in added if parameters[name].requires_grad and parameters[name].grad is None)
    if dead:
        layers = list(dict.fromkeys(name.partition(f".{ATTRIBUTE}.")[0] for name in dead))
        raise ValueError(
            f"{type(module).__name__}: {len(dead)} adapter parameters got no gradient from the first batch: the loss does "
            f"not depend on {len(layers)} of the adapted layers, or they run under no_grad, or in re-entrant gradient "
            f"checkpointing without an input that requires a gradient. Leave them out with exclude={layers}; where other "
            "batches use them, set conditional_adapters = True in the module (and find_unused_parameters=True under DDP)."
        )


def warn_of_moved_flags(trainer: pl.Trainer, module: AdapterMixin, attachment: Attachment) -> None:
    """Say which parameters somebody else froze or freed since the adapter, or a schedule of ours, set what trains."""
    freed, frozen = moved_flags(module.adapted_network, attachment)
    if not freed and not frozen:
        return
    attachment.expected = set(trainable_names(module.adapted_network))
    others = [type(c).__name__ for c in cast("Any", trainer).callbacks if isinstance(c, BaseFinetuning)]
    suspects = (
        f"{', '.join(others)} among the trainer's callbacks does that"
        if others
        else "a callback or a call of your own did that"
    )
    listed = "; ".join(
        f"{len(names)} {what} (first {', '.join(names[:3])})"
        for what, names in (("freed", freed), ("frozen", frozen))
        if names
    )
    rank_zero_warn(
        f"{type(module).__name__}: what trains in backbone={module.backbone_name!r} was changed behind its adapter: "
        f"{listed}; {suspects}. Base weights that trained are kept in checkpoints from now on. Use FreezeSchedule, or "
        "train_also= of the adapter."
    )

"""Hold a module to what it was: on rows beside the training batch, its outputs stay near those before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_peft.distillation import Reference, kl_to_reference, mse_to_reference
from lightning_peft.mixins.order import refuse_order
from lightning_peft.mixins.replay_mixin import ReplayMixin

_KEY = "lightning_peft_distill"


class DistillMixin(ReplayMixin):
    """Let a module learn its task while its outputs on other rows stay what they were; those rows need no labels.

    Define ``distill_outputs(self, batch)``, which returns logits or features. On the rows that
    :class:`~lightning_peft.callbacks.ReplayMixing` brings, the training loss gets ``weight * KL(reference || model)`` (or the mean
    squared difference), :func:`~lightning_peft.distillation.kl_to_reference`, in the same forward.

    The reference is the module before its first step. What an adapter adds is switched off for it, so no second network is
    needed; of what trains besides (a head, all weights under full fine-tuning) and of running statistics a copy is kept, in
    no optimizer and not in ``state_dict``. The copy is in the checkpoint, under its own key, so that a resumed run goes on with it.
    A new fit, from step 0, begins with a new copy. The reference pass runs in eval mode, and leaves dropout's generators and
    running statistics alone.

    In a sequence of tasks the adapter holds what earlier fits have taught: with ``distill_from="start"`` the reference is the
    module as the fit found it, adapters on, and the copy holds the adapter too.

    ``distill_mask(self, batch)``, if there is one, says which rows or tokens count (``attention_mask``, say), and the mean is over
    these, of all processes. ``distill_targets(self, batch)`` returns the classes that ``exclude_target`` leaves out.

    Li & Hoiem 2017, arXiv:1606.09282 (LwF); Hinton et al. 2015, arXiv:1503.02531.

    **The trap:** the rows decide. Like the old ones: about as good as labelled replay. Unlike them: weak. The new task's own: the
    new task is starved. And a fresh head is part of the reference: hold features then, or an old head.

    Raises:
        TypeError: When a class is made, for an order of bases in which the mixin, or another ``replay_step``, would be skipped.
        ValueError: When a class is made, or a fit begins, for settings that do not fit, or a method that is missing; when
            training begins, for sharded weights.
    """

    distill: Literal["kl", "mse"] = "kl"
    """What to hold: the distributions of logits, or features."""
    distill_from: Literal["pretrained", "start"] = "pretrained"
    """What to hold to: the module without its adapters, or as the fit found it."""
    distill_temperature: float = 1.0
    """Divides the logits of both; above 1, improbable classes count more."""
    exclude_target: bool = False
    """Leave the class of ``distill_targets`` out of both distributions, so that the new task may move it freely."""
    distill_reference: Reference | None = None
    """What is kept of the module as it was; taken when training begins."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which something would be skipped, and settings that do not fit."""
        refuse_order(cls, DistillMixin)
        refuse_two_replays(cls, DistillMixin)
        super().__init_subclass__(**kwargs)
        _check_settings(cls.__name__, cls)

    if TYPE_CHECKING:  # at run time they are the module's, which may stand behind the mixin

        def distill_outputs(self, batch: Any) -> Tensor:
            """Return logits or features, ``(rows, ..., classes)``; yours to define."""

    @override
    def replay_step(self, batch: Any) -> Tensor:
        """Return how far the outputs on a batch are from the reference's."""
        reference = self.reference_outputs(batch)
        outputs, mask = self.distill_outputs(batch), self._asked("distill_mask", batch)
        if self.distill == "mse":
            return mse_to_reference(outputs, reference, mask=mask)
        excluded = self._asked("distill_targets", batch) if self.exclude_target else None
        return kl_to_reference(outputs, reference, temperature=self.distill_temperature, mask=mask, excluded=excluded)

    @override
    def replay_units(self, batch: Any) -> Tensor | float | None:
        """Return how much of a batch ``distill_mask`` lets count."""
        mask = self._asked("distill_mask", batch)
        return super().replay_units(batch) if mask is None else mask.sum()

    # A compiled step would take the exchange of values for a change in place.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def reference_outputs(self, batch: Any) -> Tensor:
        """Return ``distill_outputs`` of the reference, without gradient; nothing of the module or of its generators changes.

        Raises:
            ValueError: Before ``keep_reference``, which is called when training begins.
        """
        if self.distill_reference is None:
            raise ValueError(
                f"{type(self).__name__}: there is no reference yet; it is taken when training begins. Call keep_reference() to "
                "take the module as it is now."
            )
        with self.distill_reference.acting(self):
            return self.distill_outputs(batch)

    def keep_reference(self) -> None:
        """Take the module as it is now for its reference, its adapters as ``distill_from`` says; each fit begins so."""
        self.distill_reference = Reference(adapters_on=self.distill_from == "start")
        self.distill_reference.keep(self)

    def _asked(self, method: str, batch: Any) -> Tensor | None:
        found = getattr(self, method, None)
        return None if found is None else found(batch)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        name = type(self).__name__
        _check_settings(name, self)
        needed = ["distill_outputs", *(["distill_targets"] if self.exclude_target else [])]
        if missing := [method for method in needed if not hasattr(self, method)]:
            raise ValueError(f"{name}: has DistillMixin but no {missing[0]}. Define {missing[0]}(self, batch).")

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if any(hasattr(parameter, "device_mesh") for parameter in self.parameters()):
            raise ValueError(
                f"{type(self).__name__}: DistillMixin cannot hold sharded weights (FSDP2) to their reference yet. Use a single "
                "device or strategy='ddp'."
            )
        if self.distill_reference is not None and self.trainer.global_step > 0:
            self.distill_reference.place(self)
            return
        if self.trainer.global_step > 0:
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint has no reference of DistillMixin, so what trains besides an adapter is "
                "held to what it is now, in the middle of a run. Begin the run with the mixin."
            )
        self.keep_reference()

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.distill_reference is not None:
            self.distill_reference.keep(self)  # what a schedule has freed since

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.distill_reference is not None:
            checkpoint[_KEY] = self.distill_reference.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get(_KEY)
        self.distill_reference = None if found is None else Reference(**found)


def refuse_two_replays(cls: type, mixin: type) -> None:
    """Stop a class in which a mixin's ``replay_step`` would hide another one.

    Raises:
        TypeError: With what works.
    """
    behind = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    hidden = next((base.__name__ for base in behind if "replay_step" in vars(base)), None)
    if hidden is not None:
        raise TypeError(
            f"{cls.__name__}: {mixin.__name__} would hide the replay_step of {hidden}. Use one of the two, or add both losses "
            f"in a replay_step of {cls.__name__} itself, under ReplayMixin."
        )


def _check_settings(name: str, found: type[DistillMixin] | DistillMixin) -> None:
    kind, temperature = found.distill, found.distill_temperature
    if found.distill_from not in ("pretrained", "start"):
        raise ValueError(f"{name}: distill_from={found.distill_from!r} must be 'pretrained' or 'start'.")
    if kind not in ("kl", "mse"):
        raise ValueError(f"{name}: distill={kind!r} must be 'kl', for logits, or 'mse', for features.")
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise ValueError(f"{name}: distill_temperature={temperature!r} must be a number above 0; 1 changes nothing.")
    if kind == "mse" and (found.exclude_target or temperature != 1):
        raise ValueError(
            f"{name}: distill='mse' has no temperature and no target to leave out. Leave distill_temperature and "
            "exclude_target unset, or hold logits with distill='kl'."
        )

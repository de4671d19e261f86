"""Learning rates that are scaled while the optimizer steps, and only then: no LR scheduler can notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle

from lightning_peft.blocks import block_of

Factor = Callable[[Tensor], float]
Group = dict[str, Any]


class StepRates:
    """Multiply each parameter's learning rate by a factor for the length of every optimizer step.

    Schedulers compute the next rate from the present one (``StepLR``), from the first one (``LambdaLR``) or from numbers of
    their own (``OneCycleLR``): none sees a factor that is gone before it looks. A group in which factors differ is split for the
    length of the step.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._factor: Factor | None = None
        self._depth: dict[torch.optim.Optimizer, int] = {}
        self._kept: dict[torch.optim.Optimizer, list[tuple[Group, list[Group]]]] = {}

    def attach(self, optimizers: Iterable[torch.optim.Optimizer], factor: Factor) -> None:
        """Scale from now on.

        Args:
            optimizers: Whose rates are meant.
            factor: Asked for every parameter with a gradient, before each step.
        """
        self.detach()
        self._factor = factor
        for optimizer in optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._begin),
                optimizer.register_step_post_hook(self._restore),
            ]

    def detach(self) -> None:
        """Scale no more; also after a step that an exception cut short."""
        for handle in self._handles:
            handle.remove()
        self.give_back()
        self._handles, self._factor = [], None

    def give_back(self) -> None:
        """Give every optimizer its own rates, outside of its steps."""
        for optimizer in list(self._kept):
            self._give_back(optimizer)
        self._depth = {}

    @property
    def attached(self) -> bool:
        """Whether rates are scaled at all."""
        return self._factor is not None

    def present(self, optimizers: Iterable[torch.optim.Optimizer], module: nn.Module) -> dict[str, float]:
        """Return the rate that a step would take now, by block: the highest of its parameters."""
        assert self._factor is not None
        blocks = {id(parameter): block_of(name) for name, parameter in module.named_parameters()}
        rates: dict[str, float] = {}
        for optimizer in optimizers:
            for part in (part for group in optimizer.param_groups for part in _parts(group, self._factor)):
                for block in {blocks[id(parameter)] for parameter in part["params"] if id(parameter) in blocks}:
                    rates[block] = max(rates.get(block, 0.0), float(part["lr"]))
        return rates

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: it can be neither copied nor sent to a process."""
        return {**vars(self), "_handles": [], "_factor": None, "_depth": {}, "_kept": {}}

    def _begin(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Split the groups before the update, but after the closure: a ``training_step`` sees them as they are."""
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1  # a step that calls super().step() comes here twice
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is None or isinstance(optimizer, LBFGS):  # which reads its rate before it calls the closure
            self._split(optimizer)
            return None

        def then_split() -> Any:
            loss = closure()
            self._split(optimizer)
            return loss

        return (args[0], then_split), {key: value for key, value in kwargs.items() if key != "closure"}

    def _split(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer not in self._kept:
            assert self._factor is not None
            self._kept[optimizer] = [(group, _parts(group, self._factor)) for group in optimizer.param_groups]
            optimizer.param_groups = [part for _, parts in self._kept[optimizer] for part in parts]

    def _restore(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._depth[optimizer] -= 1
        if self._depth[optimizer] == 0 and optimizer in self._kept:
            self._give_back(optimizer)

    def _give_back(self, optimizer: torch.optim.Optimizer) -> None:
        kept = self._kept.pop(optimizer)
        for group, parts in kept:
            for part in parts:  # some optimizers count in their groups
                group.update({key: value for key, value in part.items() if key not in ("params", "lr")})
        optimizer.param_groups = [group for group, _ in kept]


def _parts(group: Group, factor: Factor) -> list[Group]:
    """Split a group by factor; the rest of its settings is shared."""
    parameters: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        if parameter.requires_grad:
            parameters.setdefault(factor(parameter), []).append(parameter)
    return [{**group, "params": found, "lr": group["lr"] * scale} for scale, found in parameters.items()]

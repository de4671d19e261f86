"""Where a layer keeps what adapters add to it: one update per adapter name, of which one acts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

HALF = (torch.float16, torch.bfloat16)
ATTRIBUTE = "adapters"
"""Under this name a module holds its :class:`Updates`; it is part of the keys of what an adapter adds."""


def held(module: nn.Module, name: str) -> Any:
    """Return ``module.name``, a parameter, buffer or submodule, without the microsecond that ``nn.Module`` takes to find it.

    >>> linear = nn.Linear(2, 2)
    >>> held(linear, "weight") is linear.weight
    True
    """
    for found in (module._parameters, module._modules, module._buffers):
        if name in found and name not in module.__dict__:
            return found[name]
    return getattr(module, name)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of adapter weights on a base of ``dtype``: float32 on a half-precision base, else the same."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class Update(nn.Module):
    """What one adapter adds to one module: its parameters, and the module's output with them.

    Its parameters stay float32 when the network around them becomes bfloat16 or float16. Half-precision weights lose
    small optimizer steps: at 1.0 a bfloat16 step below 0.004 is rounded away. Trainers that convert a whole network
    (``precision="bf16-true"``) would convert the adapter too, without a word.
    """

    frozen: tuple[str, ...] = ()
    """Parameters of its own that never train."""

    rows: bool = True
    """Whether the update can act on some rows of a batch and not on others."""

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_master(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.dtype in HALF and tensor.dtype not in HALF and tensor.is_floating_point()
            return tensor.to(moved.device) if narrowed else moved

        return cast("Self", super()._apply(keep_master, recurse))  # type: ignore[no-untyped-call]

    @abstractmethod
    def merged_values(self, layer: Any) -> dict[str, Tensor]:
        """Return the base parameters with the update in them, by name, in the base's dtype.

        Raises:
            ValueError: If no value of the base parameters computes what the update does.
        """

    def trainable(self) -> list[str]:
        """Return the names of the parameters that train, within the update."""
        return [name for name, _ in self.named_parameters() if name not in self.frozen]

    def base_loaded(self, layer: Any) -> None:
        """Follow the base to the weights that were just loaded into it; the update's own stayed as they are."""


class Updates(nn.ModuleDict):
    """The updates of one module by adapter name; at most one acts."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.enabled = True
        self.by_row: list[str | None] | None = None

    @property
    def current(self) -> Update | None:
        """The update that acts now, None for the base alone."""
        return self.get_update(self.active) if self.enabled and self.active is not None else None

    def get_update(self, name: str | None) -> Update | None:
        """Return the update of that adapter, None if the adapter adds nothing here."""
        found = self._modules.get(name) if name is not None else None
        return cast("Update | None", found)


def updates_of(module: nn.Module) -> Updates | None:
    """Return the updates that ``module`` itself holds, None if no adapter adds anything to it."""
    found = module._modules.get(ATTRIBUTE)
    return found if isinstance(found, Updates) else None


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Updates]]:
    """Yield every module inside ``model`` that holds updates: its dotted name, itself, the updates."""
    for name, module in model.named_modules():
        if (updates := updates_of(module)) is not None:
            yield name, module, updates


def updates_named(model: nn.Module, name: str) -> dict[str, Update]:
    """Return what one adapter adds inside ``model``, by the dotted name of the module that it is added to.

    >>> from lightning_peft import LoRA, add_adapter
    >>> list(updates_named(add_adapter(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2)), "default"))
    ['0']
    """
    return {path: update for path, _, held in hosts(model) if (update := held.get_update(name)) is not None}


def place(module: nn.Module, name: str, update: Update) -> str:
    """Give ``module`` an update and return the key prefix of its parameters, relative to the module."""
    updates = updates_of(module)
    if updates is None:
        updates = Updates()
        module.add_module(ATTRIBUTE, updates)
    update.train(module.training)
    updates[name] = update
    return f"{ATTRIBUTE}.{name}."

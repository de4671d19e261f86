"""Layers that became adapted in place: same object, same Parameters, same keys, and an update beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.quantised import is_quantised
from lightning_peft.adapters.updates import ATTRIBUTE, Updates, held


def is_merged(network: nn.Module) -> bool:
    """Whether any adapted layer of a network holds its update in its weight."""
    return any(isinstance(layer, AdaptedLayer) and layer.merged for layer in network.modules())


class AdaptedLayer(nn.Module):
    """A layer with updates. Subclasses say how one kind of layer computes; :meth:`adapt` joins one with a layer's class.

    The joined class inherits the class of the layer, so ``isinstance(layer, nn.Linear)`` stays true.
    """

    adapters: Updates
    base_class: type[nn.Module]
    pristine: dict[str, Tensor]

    @classmethod
    def adapt(cls, layer: nn.Module) -> Any:
        """Turn ``layer`` itself into an adapted one and return it; no Parameter of it is touched. Twice is once."""
        if not isinstance(layer, AdaptedLayer):
            base_class = type(layer)
            layer.__class__ = _joined(cls, base_class)
            adapted = cast("AdaptedLayer", layer)
            adapted.base_class = base_class
            adapted.pristine = {}
            adapted.add_module(ATTRIBUTE, Updates())
        return layer

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        updates: Updates = held(self, ATTRIBUTE)
        if updates.by_row is not None and updates.enabled:
            return self._by_row(input, updates.by_row)
        update = updates.current
        if update is None or self.pristine:
            return super().forward(input, *args, **kwargs)
        return update.forward(self, input, *args, **kwargs)

    def _by_row(self, input: Tensor, by_row: list[str | None]) -> Tensor:
        # Beam search repeats every row in place, and layers that see (batch * tokens, features) hold a row's tokens
        # together: in both cases equal blocks of the first axis belong to the rows in order.
        block, left = divmod(len(input), len(by_row))
        if left:
            raise ValueError(
                f"adapter_rows: {len(by_row)} names for an input of {len(input)} rows. Give one name per row of the batch."
            )
        names = [name for name in by_row for _ in range(block)]
        output: Tensor | None = None
        for chosen in dict.fromkeys(by_row):
            rows = torch.tensor([i for i, name in enumerate(names) if name == chosen], device=input.device)
            update = self.adapters.get_update(chosen)
            part = input.index_select(0, rows)
            result = super().forward(part) if update is None else update.forward(self, part)
            output = result.new_empty(len(input), *result.shape[1:]) if output is None else output
            output = output.index_copy(0, rows, result)
        assert output is not None
        return output

    @property
    def merged(self) -> bool:
        """Whether the layer's own parameters hold the active update already."""
        return bool(self.pristine)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active update to the layer's parameters and keep them as they were; twice is once."""
        update = self.adapters.get_update(self.adapters.active)
        if update is not None and not self.pristine:
            if is_quantised(self):
                raise ValueError(
                    "merge_adapter: the weight is quantised, so it cannot hold an update. Run it unmerged."
                )
            for name, value in update.merged_values(self).items():
                parameter = self.get_parameter(name)
                self.pristine[name] = parameter.detach().clone()
                parameter.copy_(value)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept parameters back, bit for bit."""
        for name, value in self.pristine.items():
            self.get_parameter(name).copy_(value)
        self.pristine = {}

    @contextmanager
    def pristine_values(self) -> Iterator[None]:
        """Let a merged layer compute with the kept parameters for a while; nothing is copied."""
        merged = {name: self.get_parameter(name).data for name in self.pristine}
        for name, value in self.pristine.items():
            self.get_parameter(name).data = value
        try:
            yield
        finally:
            for name, value in merged.items():
                self.get_parameter(name).data = value

    def become_plain(self) -> None:
        """Turn back into the layer it was; a merged layer keeps the merged values."""
        base_class = self.base_class
        del self.adapters, self.pristine, self.base_class
        self.__class__ = base_class  # type: ignore[assignment]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.pristine = {name: fn(value) for name, value in self.pristine.items()}
        return cast("Self", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @override
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            for name, update in self.adapters.items():
                if not any(key.startswith(f"{prefix}{ATTRIBUTE}.{name}.") for key in state_dict):
                    cast("Any", update).base_loaded(self)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[0], self.base_class), self.__dict__


_JOINED: dict[tuple[type, type], type[AdaptedLayer]] = {}


def _joined(kind: type[AdaptedLayer], base: type[nn.Module]) -> type[AdaptedLayer]:
    if (kind, base) not in _JOINED:
        made = type(f"Adapted{base.__name__}", (kind, base), {"__module__": base.__module__})
        _JOINED[kind, base] = cast("type[AdaptedLayer]", made)
    return _JOINED[kind, base]


def _rebuild(kind: type[AdaptedLayer], base: type[nn.Module]) -> nn.Module:
    # The joined class has no place in any module where pickle could find it by name; its two halves have.
    joined = _joined(kind, base)
    return joined.__new__(joined)

"""What every adapted layer can do: be merged, switched off, and turned back into the layer it was."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

HALF = (torch.float16, torch.bfloat16)


class MasterParameters(nn.ParameterDict):
    """Parameters that stay float32 when the network around them becomes bfloat16 or float16.

    Half-precision weights lose small optimizer steps: at 1.0 a bfloat16 step below 0.004 is rounded away. Trainers
    that convert a whole network (``precision="bf16-true"``) would convert the adapter too, without a word.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MasterParameters:
        def keep_master(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.dtype in HALF and tensor.dtype not in HALF and tensor.is_floating_point()
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(keep_master, recurse)  # type: ignore[no-untyped-call]
        return self


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of adapter weights on a base of ``dtype``: float32 on a half-precision base, else the same."""
    return torch.float32 if dtype in HALF else dtype


def is_merged(network: nn.Module) -> bool:
    """Whether any adapted layer of a network holds its update in its weight."""
    return any(isinstance(layer, AdaptedLayer) and layer.merged for layer in network.modules())


class AdaptedLayer(nn.Module):
    """A layer that became an adapted one in place: same object, same Parameters, same keys.

    Subclasses also inherit the layer they adapt (``class LoRALinear(AdaptedLayer, nn.Linear)``) and define the two
    abstract methods.
    """

    enabled: bool
    base_class: type[nn.Module]
    weight: Tensor
    pristine: Tensor | None

    def become_adapted(self, base_class: type[nn.Module]) -> None:
        """Start the state that all adapted layers share; ``base_class`` is what :meth:`become_plain` goes back to."""
        self.enabled = True
        self.base_class = base_class
        # Not persistent, so absent from checkpoints, but it follows the layer to other devices.
        self.register_buffer("pristine", None, persistent=False)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the adapter's update already."""
        return self.pristine is not None

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """Return the base weight plus this layer's update, in the base's dtype."""

    @abstractmethod
    def drop_adapter(self) -> None:
        """Delete what the adapter added to this layer."""

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to ``weight`` and keep the weight as it was; twice is once."""
        if self.pristine is None:
            merged = self.merged_weight()
            self.pristine = self.weight.detach().clone()
            self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept weight back, bit for bit."""
        if self.pristine is not None:
            self.weight.copy_(self.pristine)
            self.pristine = None

    def become_plain(self) -> None:
        """Turn back into the layer it was; a merged layer keeps the merged weight."""
        self.drop_adapter()
        del self._buffers["pristine"]
        self._non_persistent_buffers_set.discard("pristine")
        base_class = self.base_class
        del self.enabled, self.base_class
        self.__class__ = base_class  # type: ignore[assignment]

"""The kinds of layer that can be adapted, each with what an update must know about it.

For an update a layer is a linear map with a bias: it has output channels along one axis of its output, and a weight that
can be seen as a matrix ``(out, in)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.layer import AdaptedLayer
from lightning_peft.adapters.updates import held


class AdaptedLinear(AdaptedLayer):
    """``nn.Linear`` with updates."""

    weight: Tensor
    bias: Tensor | None

    def matrix(self) -> Tensor:
        """Return the weight as ``(out, in)``."""
        weight: Tensor = held(self, "weight")
        return weight

    def oriented(self, matrix: Tensor) -> Tensor:
        """Return a matrix ``(out, in)`` in the layout of the weight."""
        return matrix

    def unbiased(self, input: Tensor) -> Tensor:
        """Return the layer's output without its bias."""
        return F.linear(input, self.weight)

    def along_channels(self, vector: Tensor) -> Tensor:
        """Return ``(out,)`` in a shape that multiplies the output channel by channel."""
        return vector

    def along_inputs(self, vector: Tensor) -> Tensor:
        """Return ``(in,)`` in a shape that multiplies the input feature by feature."""
        return vector

    def plain(self, input: Tensor) -> Tensor:
        """Return the output of the layer without any update."""
        output: Tensor = self.base_class.forward(self, input)
        return output


class AdaptedConv1D(AdaptedLinear):
    """transformers' ``Conv1D`` with updates: a linear layer whose weight is stored as ``(in, out)``."""

    @override
    def matrix(self) -> Tensor:
        return self.weight.T

    @override
    def oriented(self, matrix: Tensor) -> Tensor:
        return matrix.T

    @override
    def unbiased(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.T)


class AdaptedConv(AdaptedLinear):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with updates; the matrix is ``(out, in / groups * kernel)``."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int
    _conv_forward: Any

    @override
    def matrix(self) -> Tensor:
        return self.weight.flatten(1)

    @override
    def oriented(self, matrix: Tensor) -> Tensor:
        return matrix.view_as(self.weight)

    @override
    def unbiased(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.weight, None)
        return output

    @override
    def along_channels(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * len(self.kernel_size))

    @override
    def along_inputs(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * len(self.kernel_size))


class AdaptedEmbedding(AdaptedLinear):
    """``nn.Embedding`` with updates; its output channels are the embedding's columns, the matrix is ``(dim, num)``."""

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    bias = None

    @override
    def matrix(self) -> Tensor:
        return self.weight.T

    @override
    def oriented(self, matrix: Tensor) -> Tensor:
        return matrix.T

    @override
    def unbiased(self, input: Tensor) -> Tensor:
        return self.plain(input)


class AdaptedParameters(AdaptedLayer):
    """A module whose parameters are updated before it reads them: attention in one module, fused experts."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        updates = self.adapters
        if updates.by_row is not None and updates.enabled:
            raise ValueError(
                f"adapter_rows: a {self.base_class.__name__} cannot have an adapter of its own for each row."
            )
        update = updates.current
        if update is None or self.pristine:
            return self.base_class.forward(self, *args, **kwargs)
        return update.forward(self, *args, **kwargs)


KINDS: dict[type[nn.Module], type[AdaptedLinear]] = {
    nn.Linear: AdaptedLinear,
    nn.Conv1d: AdaptedConv,
    nn.Conv2d: AdaptedConv,
    nn.Conv3d: AdaptedConv,
    nn.Embedding: AdaptedEmbedding,
}


def kind_of(layer: nn.Module) -> type[AdaptedLinear] | None:
    """Return the kind of an adaptable layer, None for any other module; transformers is not imported for it."""
    for cls in type(layer).__mro__:
        if cls in KINDS:
            return KINDS[cls]
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return AdaptedConv1D
    return None


def layers_of_kind(model: nn.Module, *kinds: type[AdaptedLayer]) -> dict[str, nn.Module]:
    """Return the layers of these kinds by dotted name, adapted already or not."""
    return {name: module for name, module in model.named_modules() if kind_of(module) in kinds}


def own_forward(layer: nn.Module) -> bool:
    """Whether a layer computes something else than the class of torch that it derives from."""
    base = layer.base_class if isinstance(layer, AdaptedLayer) else type(layer)
    return not any(cls in base.__mro__ and base.forward is cls.forward for cls in KINDS) and base.__name__ != "Conv1D"


def fused_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield parameters ``(experts, out, in)`` of modules of another kind: dotted name, module, name in the module."""
    for path, module in model.named_modules():
        if kind_of(module) is None:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim == 3 and len(parameter) > 1:  # not a class token
                    yield f"{path}.{name}".lstrip("."), module, name


def row_norms(matrix: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the Euclidean norm of every row, summed in ``dtype``; the matrix is read once and not copied."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)
    return norms

"""Many tasks at once in torch's vmap, and layers that know a shorter way when their weights differ from task to task.

Small networks spend more time around the arithmetic than in it: ``torch.vmap`` takes 50 microseconds to look through its
arguments, and its rule for a linear layer makes views, a product and a sum of it, and again of each derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from lightning_peft.meta.second_derivatives import Geometry, batch_norm, convolution

_vmap: Any = torch._C._functorch


def over_tasks(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """Return what a function gives for each task: ``torch.vmap(function, randomness="different")(*tensors)``, sooner.

    Args:
        function: Takes the tensors of one task; returns tensors, in any structure.
        tensors: With the tasks for their first dimension.

    >>> over_tasks(lambda a, b: a @ b, [torch.ones(3, 2), torch.ones(3, 2)])
    tensor([2., 2., 2.])
    """
    if torch.compiler.is_compiling():  # which knows the public function
        return torch.vmap(function, randomness="different")(*tensors)
    lazy_load_decompositions()
    tasks = len(tensors[0])
    level = _vmap._vmap_increment_nesting(tasks, "different")
    try:
        results = function(*(_vmap._add_batch_dim(tensor, 0, level) for tensor in tensors))
        if isinstance(results, Tensor):
            return _vmap._remove_batch_dim(results, level, tasks, 0)
        return pytree.tree_map(lambda result: _vmap._remove_batch_dim(result, level, tasks, 0), results)
    finally:
        _vmap._vmap_decrement_nesting()


def stacked_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return ``x_i W_i^T + b_i`` of every task ``i``; what is not so stacked goes the ordinary way."""
    weight, bias = layer.weight, layer.bias
    tensors = (inputs, weight) if bias is None else (inputs, weight, bias)
    if not all(map(_plainly_stacked, tensors)):
        return F.linear(inputs, weight, bias)
    x, w, *b = map(_vmap.get_unwrapped, tensors)
    rows = x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1])
    out = torch.baddbmm(b[0].unsqueeze(1), rows, w.mT) if b else torch.bmm(rows, w.mT)
    result: Tensor = _vmap._add_batch_dim(out if x.ndim == 3 else out.view(*x.shape[:-1], -1), 0, 1)
    return result


def _plainly_stacked(tensor: Tensor) -> bool:
    """Return whether a tensor is stacked along its first dimension, by an outermost vmap: what it wraps is an ordinary one."""
    stacked: bool = (
        _vmap.is_batchedtensor(tensor) and _vmap.maybe_get_level(tensor) == 1 and _vmap.maybe_get_bdim(tensor) == 0
    )
    return stacked


def stacked_embedding(layer: nn.Embedding, inputs: Tensor) -> Tensor:
    """Return an ``nn.Embedding`` whose padding row takes no gradient in any task; vmap's own rule spares the first task's alone."""
    if layer.padding_idx is None or layer.max_norm is not None:
        return type(layer).forward(layer, inputs)
    found = F.embedding(inputs, layer.weight, None, None, layer.norm_type, layer.scale_grad_by_freq, layer.sparse)
    return torch.where((inputs == layer.padding_idx).unsqueeze(-1), found.detach(), found)


def stacked_convolution(layer: Any, inputs: Tensor) -> Tensor:
    """Return an ``nn.Conv1d``, ``2d`` or ``3d`` whose weights differ from task to task."""
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and _is_rows(layer, inputs)
    if not plain:
        ordinary: Tensor = type(layer).forward(layer, inputs)
        return ordinary
    stride, padding, dilation = (list(size) for size in (layer.stride, layer.padding, layer.dilation))
    return convolution(inputs, layer.weight, layer.bias, Geometry(stride, padding, dilation, layer.groups))


def stacked_batch_norm(layer: Any, inputs: Tensor) -> Tensor:
    """Return an ``nn.BatchNorm1d``, ``2d`` or ``3d`` by statistics of the rows, whose scales differ from task to task."""
    single = inputs.ndim < 2 or inputs.numel() == inputs.shape[1]  # has no statistics, which torch says
    if single or layer.running_mean is not None or layer.weight is None or not _is_rows(layer, inputs):
        ordinary: Tensor = type(layer).forward(layer, inputs)
        return ordinary
    return batch_norm(inputs, layer.weight, layer.bias, layer.eps)


def stacked_activation(layer: Any, inputs: Tensor) -> Tensor:
    """Return an activation of every element, out of the tasks' wrapping."""
    if not _plainly_stacked(inputs) or getattr(layer, "inplace", False):
        ordinary: Tensor = type(layer).forward(layer, inputs)
        return ordinary
    result: Tensor = _vmap._add_batch_dim(type(layer).forward(layer, _vmap.get_unwrapped(inputs)), 0, 1)
    return result


def _is_rows(layer: nn.Module, inputs: Tensor) -> bool:
    """Return whether inputs are rows of channels, of the layer's own dtype: nothing is cast on the way."""
    dimensions = _DIMENSIONS.get(type(layer), inputs.ndim)
    return (
        inputs.ndim == dimensions
        and inputs.dtype == layer.weight.dtype
        and not torch.is_autocast_enabled(inputs.device.type)
    )


_DIMENSIONS: dict[type[nn.Module], int] = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
STACKED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: stacked_linear,
    nn.Embedding: stacked_embedding,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), stacked_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), stacked_batch_norm),
    **dict.fromkeys(
        (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus), stacked_activation
    ),
}
"""Forwards by the exact class of a layer."""

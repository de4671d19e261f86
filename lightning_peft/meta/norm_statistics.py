"""What normalisation layers with running statistics use while tasks adapt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_peft.distributed import world_size
from lightning_peft.meta.places import Parts, tree

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def running_layers(parts: Parts) -> dict[str, _NormBase]:
    """Return the layers that keep running statistics, by name."""
    found: dict[str, _NormBase] = {}
    for name, child in parts:
        if isinstance(child, _NormBase) and child.running_mean is not None and child not in found.values():
            found[name] = child
    return found


@contextmanager
def batch_statistics(parts: Parts) -> Iterator[None]:
    """Normalise by the statistics of each batch, also in eval mode; running ones are neither read nor moved."""
    layers = list(running_layers(parts).values())
    kept = [({name: layer._buffers[name] for name in RUNNING}, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer._buffers.update(dict.fromkeys(RUNNING))
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, (buffers, tracks) in zip(layers, kept, strict=True):
            layer._buffers.update(buffers)
            layer.track_running_stats = tracks


@contextmanager
def frozen_statistics(parts: Parts) -> Iterator[None]:
    """Normalise by running statistics, also in training mode, and leave them as they are."""
    layers = list(running_layers(parts).values())
    kept = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, training in zip(layers, kept, strict=True):
            layer.training = training


class StepStatistics(nn.Module):
    """Running statistics of their own for every inner step, since features move with the weights.

    Training normalises by the batch and keeps running means, over the tasks of all processes, of step 0, 1, ...; evaluation
    normalises by those of its step, past the last one by the last. Antoniou et al. 2019, arXiv:1810.09502, section 4.

    Args:
        module: Whose layers count.
        steps: Inner steps of training; the weights after the last are a step too.
    """

    def __init__(self, module: nn.Module, steps: int) -> None:
        super().__init__()
        found = running_layers(tree(module))
        self.layers = list(found)
        for i, layer in enumerate(found.values()):
            for kind in ("running_mean", "running_var"):
                value: Tensor = getattr(layer, kind)
                self.register_buffer(f"{kind}_{i}", value.detach().repeat(steps + 1, 1))

    def recording(self, module: nn.Module, method: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, list[Tensor]]]:
        """Return a method that also gives mean and unbiased variance of what enters each layer, ``(2, channels)``."""

        def run(batch: Any) -> tuple[Any, list[Tensor]]:
            found: dict[str, Tensor] = {}

            with ExitStack() as hooks:
                for name in self.layers:

                    def look(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                        rows = inputs[0].detach()
                        dims = [d for d in range(rows.dim()) if d != 1]
                        found[name] = torch.stack([rows.mean(dims), rows.var(dims)])

                    hooks.callback(module.get_submodule(name).register_forward_pre_hook(look).remove)
                result = method(batch)
            missing = [name for name in self.layers if name not in found]
            if missing:
                raise ValueError(f"norm_stats='per_step': layer {missing[0]!r} did not run. Use norm_stats='batch'.")
            return result, [found[name] for name in self.layers]

        return run

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, found: list[Tensor]) -> None:
        """Move the running statistics of a step towards what its tasks had, ``(tasks, 2, channels)`` of each layer."""
        for i, (name, values) in enumerate(zip(self.layers, found, strict=True)):
            momentum: Any = module.get_submodule(name).momentum
            mean = values.mean(0)
            if world_size() > 1:
                dist.all_reduce(mean)
                mean = mean / world_size()
            for kind, value in zip(("running_mean", "running_var"), mean, strict=True):
                getattr(self, f"{kind}_{i}")[step].lerp_(value, 0.1 if momentum is None else momentum)

    @contextmanager
    def at(self, parts: Parts, step: int) -> Iterator[None]:
        """Normalise by the running statistics of a step."""
        named = dict(parts)
        layers = [named[name] for name in self.layers]
        kept = [dict(layer._buffers) for layer in layers]
        for i, layer in enumerate(layers):
            for kind in ("running_mean", "running_var"):
                own: Tensor = getattr(self, f"{kind}_{i}")
                layer._buffers[kind] = own[min(step, len(own) - 1)]
        try:
            with frozen_statistics(parts):
                yield
        finally:
            for layer, buffers in zip(layers, kept, strict=True):
                layer._buffers.update(buffers)

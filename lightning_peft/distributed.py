"""Ranks that agree: the only file that touches strategy internals.

DistributedDataParallel decides which gradients it averages when it wraps the module. A parameter freed later gets a
different gradient on every rank, without an error (Lightning's own finetuning callbacks suffer from it); one frozen
later stops the run. So every change of what trains is followed by a new wrap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of the run; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def mean_over_ranks(value: float) -> float:
    """Return the mean of every rank's number, the same on each of them."""
    values: list[float] = gather_objects(value)
    return sum(values) / len(values)


# A compiled step would stop where a tensor becomes a number.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def weight_by_units(weight: float, units: Tensor | float, device: torch.device) -> float:
    """Return this rank's weight of a mean over its units (tokens, say), so that the mean over ranks is that over all units.

    Args:
        weight: What the rank's loss counts; the mean over ranks is what all units together count. Where it is 0, the rank's
            units are none.
        units: The rank's.
        device: Where ranks talk.
    """
    if world_size() == 1:
        return weight
    own = float(units) if weight > 0 else 0.0
    total = torch.tensor([weight, own], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    weights, everybody = total.tolist()
    return float(weights * own / everybody) if everybody > 0 else 0.0


def any_rank(decision: bool) -> bool:
    """Return whether a decision is true on any rank, the same on each of them."""
    return any(gather_objects(decision))


def gather_objects(value: Any) -> list[Any]:
    """Return what every rank gave, in their order: plain data that pickles."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(owner: str, work: Callable[[], T]) -> T:
    """Do something on this process that needs no other one, and stop on all of them if it fails on one: none waits for ever.

    Args:
        owner: Who does it; the error of the others begins with it.
        work: What is done; it must not communicate.

    Raises:
        RuntimeError: Where it went well, with what failed elsewhere; where it failed, the error itself.
    """
    failed: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failed = error
    told: list[str] = gather_objects("" if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for number, error_text in enumerate(told):
        if error_text:
            raise RuntimeError(f"{owner}: process {number} failed: {error_text}")
    return result


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor that FSDP2 has split; any other tensor is its own."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def as_part_of(whole: Tensor, part: Tensor) -> Tensor:
    """Return a share of a tensor split as ``whole`` is; a plain ``whole`` is not split."""
    if isinstance(whole, DTensor):
        return DTensor.from_local(part, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride())
    return part


def refuse_unsupported(trainer: pl.Trainer, owner: str) -> None:
    """Stop a run whose strategy cannot change what trains.

    Raises:
        ValueError: For FSDP1, DeepSpeed and whatever else was never tried.
    """
    tried = SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy
    is_deepspeed = isinstance(trainer.strategy, DeepSpeedStrategy)  # a kind of DDP to Lightning
    if is_deepspeed or not isinstance(trainer.strategy, tried):
        raise ValueError(
            f"{owner}: strategy {type(trainer.strategy).__name__} is not supported: what trains is fixed when it wraps "
            "the module. Use a single device, strategy='ddp', or ModelParallelStrategy (FSDP2)."
        )


EVERY_FORWARD = "every forward needs all processes, and a prompt takes as many as the rows of a process need"
"""Why sharded weights do not go with processes that run different numbers of forwards: they would wait for each other for ever."""


def refuse_sharded(trainer: pl.Trainer, owner: str, why: str = EVERY_FORWARD) -> None:
    """Stop a run whose strategy gathers weights in every forward.

    Args:
        trainer: The trainer.
        owner: Who refuses.
        why: What would go wrong, for the message.

    Raises:
        ValueError: For FSDP, DeepSpeed and whatever else is neither a single device nor DDP.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy) or not isinstance(
        trainer.strategy, SingleDeviceStrategy | DDPStrategy
    ):
        raise ValueError(
            f"{owner}: under {type(trainer.strategy).__name__} {why}. Use a single device or strategy='ddp'."
        )


def names_with_state(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """List the parameters for which an optimizer has a state: those that have taken a step."""
    states = [optimizer.state for optimizer in trainer.optimizers]
    return [name for name, parameter in pl_module.named_parameters() if any(state.get(parameter) for state in states)]


def expect_state_of(trainer: pl.Trainer, pl_module: pl.LightningModule, owner: str) -> None:
    """Let FSDP2 restore the optimizers of a run in which some parameters have taken no step yet.

    ``ModelParallelStrategy`` restores optimizers before any callback sees the checkpoint, and stops at a parameter that requires a
    gradient but has no state. So whoever freezes parameters looks into the checkpoint first, and frees them afterwards.

    Args:
        trainer: The trainer, in ``on_fit_start``.
        pl_module: The module to be restored.
        owner: Key of the callback whose state holds the ``names_with_state``.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    vars(strategy).pop("load_checkpoint", None)
    load = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        del strategy.load_checkpoint
        path = Path(checkpoint_path)
        file = path / "meta.pt" if path.is_dir() else path  # a folder if every process wrote its share
        kept = torch.load(file, map_location="cpu", mmap=path.is_file(), weights_only=bool(weights_only))["callbacks"]
        names = kept.get(owner, {}).get("with_state")
        for name, parameter in pl_module.named_parameters() if names is not None else ():
            parameter.requires_grad_(name in names)
        return load(checkpoint_path, weights_only=weights_only)

    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


def rewrap(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let DDP see anew which parameters train; a no-op on other strategies.

    Call it on every rank, at an optimizer-step boundary, after ``requires_grad`` changed. ``strategy.model`` and
    ``configure_ddp`` are internals of Lightning's strategies; tests hold them to each supported version.

    Raises:
        RuntimeError: If the ranks' weights differ already; the new wrapper would hide it by a broadcast.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    check_ranks_agree(pl_module.named_parameters(), when="before a change of what trains")
    for parameter in pl_module.parameters():
        parameter.grad = None
    strategy.model = None  # the old reducer removes its autograd hooks when it goes
    strategy.model = pl_module
    strategy.configure_ddp()


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in which the processes differ; a checkpoint holds those of only one of them.

    FSDP2, and DDP with ``broadcast_buffers=False``, let each process keep its own batch normalisation statistics.
    """
    buffers = {name: buffer.detach() for name, buffer in module.named_buffers()}
    if world_size() == 1 or not buffers:
        return {}
    digests: list[dict[str, str]] = gather_objects(
        {name: _digest(local_part(buffer)) for name, buffer in buffers.items()}
    )
    return {name: buffer.cpu() for name, buffer in buffers.items() if len({found.get(name) for found in digests}) > 1}


def check_ranks_agree(named: Iterable[tuple[str, Tensor]], when: str) -> None:
    """Compare tensors over ranks, by digest.

    Raises:
        RuntimeError: On every rank, with the names that differ.
    """
    if world_size() == 1:
        return
    digests = {name: _digest(tensor) for name, tensor in named}
    gathered: list[dict[str, str]] = gather_objects(digests)
    different = [name for name in digests if any(other.get(name) != digests[name] for other in gathered)]
    if different:
        raise RuntimeError(
            f"check_ranks_agree: {when}, {len(different)} of {len(digests)} tensors differ between ranks, first "
            f"{different[:3]}. The replicas have drifted apart: something trained without averaging its gradients."
        )


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=8).hexdigest()


def check_first_gradients(trainer: pl.Trainer, named: Iterable[tuple[str, Tensor]]) -> None:
    """Compare gradients over the ranks of DDP, which averages them; on other strategies they may well differ.

    Raises:
        RuntimeError: On every rank, with the names that differ.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        check_ranks_agree(named, when="in the first gradients after a change of what trains")


class _GatherRows(torch.autograd.Function):
    """All-gather along the first dimension; in backward each rank gets the gradient that all ranks' losses gave it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes  # type: ignore[attr-defined]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        sizes: list[int] = ctx.sizes  # type: ignore[attr-defined]
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(sizes[: rank()])
        return total[start : start + sizes[rank()]], None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Stack the rows of all ranks, with gradient, also when their counts differ.

    Under DDP, which averages the ranks' gradients, a loss that each rank takes over its own rows against all gathered
    rows then has the gradient of one process on the joint batch.

    Args:
        rows: This rank's rows, ``(rows, ...)``.

    Returns:
        The rows of rank 0, 1, ... and the index at which this rank's rows begin.

    >>> gather_rows(torch.ones(2, 3))[0].shape
    torch.Size([2, 3])
    """
    if world_size() == 1:
        return rows, 0
    counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    sizes = [int(count) for count in counts]
    gathered = _GatherRows.apply(rows, sizes)  # type: ignore[no-untyped-call]
    assert isinstance(gathered, Tensor)
    return gathered, sum(sizes[: rank()])

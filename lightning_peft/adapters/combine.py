"""Make one LoRA of several: their weighted sum, or a merge that lets them disagree less."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from glob import escape
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attach import add_adapter
from lightning_peft.adapters.attachment import Attachment, required_attachment
from lightning_peft.adapters.layer import is_merged
from lightning_peft.adapters.layer_kinds import AdaptedConv
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.lora_update import LoRAUpdate
from lightning_peft.adapters.switch import check_known
from lightning_peft.adapters.updates import hosts

Method = Literal["linear", "ties", "dare"]


def merge_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    method: Method = "linear",
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Add a LoRA that is made of LoRAs the network carries; it waits for :func:`~lightning_peft.set_adapter`.

    ``"linear"`` is the weighted sum of the updates, exactly: their matrices are stacked, which PEFT calls ``"cat"``.
    ``"ties"`` and ``"dare"`` work on the updates of the weights, layer by layer, and factorise what comes out:

    - ``"ties"`` keeps the largest ``density`` of every update, elects for each entry the sign of their sum, and takes the
      mean of the weighted entries that have it (Yadav et al. 2023, arXiv:2306.01708, section 4; the paper trims over all
      layers at once, PEFT's ``"ties_svd"`` by layer).
    - ``"dare"`` drops entries with probability ``1 - density``, divides the others by ``density``, and takes the weighted sum
      (Yu et al. 2023, arXiv:2311.03099, section 3).

    **The trap:** what ``"ties"`` and ``"dare"`` make has full rank. The sum of the ranks cuts it: for more of it, raise ``rank``.

    Args:
        model: A network with LoRA adapters.
        weights: Weight of every adapter that takes part, by name. Layers that only some of them adapt take those.
        name: Name of the new adapter.
        method: How the updates are combined.
        density: Share of entries that ``"ties"`` and ``"dare"`` keep.
        rank: Rank of the new updates, by singular values; None for the sum of the ranks. Never above the size of a layer.
        seed: Seed of what ``"dare"`` drops.

    Raises:
        ValueError: For a value out of range, an unknown or taken name, a merged adapter, or an adapter that is no plain
            LoRA on layers: the message says which and why.

    >>> from lightning_peft import add_adapter
    >>> net = add_adapter(nn.Sequential(nn.Linear(8, 8)), LoRA(rank=2), name="reviews")
    >>> net = merge_adapters(add_adapter(net, LoRA(rank=3), name="news"), {"reviews": 0.5, "news": 0.5}, "both")
    >>> net[0].adapters["both"].lora_A.shape
    torch.Size([5, 8])
    """
    attachment = required_attachment(model, "merge_adapters")
    _check(weights, method, density, rank)
    check_known(attachment, list(weights), "merge_adapters")
    _check_plain(model, attachment, weights)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = {}
    for path, _, updates in hosts(model):
        parts = [(weight, updates.get_update(one)) for one, weight in weights.items()]
        mine = [(weight, update) for weight, update in parts if isinstance(update, LoRAUpdate)]
        if mine:
            made[path] = _combine(mine, method, density, rank, generator)
    ranks = {escape(path): len(down) for path, (down, _) in made.items()}
    largest = max(ranks.values())
    # alpha equal to the rank: the matrices hold the scales already
    own = {path: count for path, count in ranks.items() if count != largest}
    alphas = {path: float(count) for path, count in own.items()}
    lora = LoRA(rank=largest, alpha=float(largest), targets=list(ranks), rank_pattern=own, alpha_pattern=alphas)
    add_adapter(model, lora, name)
    with torch.no_grad():
        for path, (down, up) in made.items():
            update = model.get_submodule(path).adapters[name]  # type: ignore[index]
            assert isinstance(update, LoRAUpdate)
            update.lora_A.copy_(down.view_as(update.lora_A))
            update.lora_B.copy_(up.view_as(update.lora_B))
    return model


@torch.no_grad()
def _combine(
    parts: Sequence[tuple[float, LoRAUpdate]],
    method: Method,
    density: float,
    rank: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    factors = [update.factors() for _, update in parts]
    total = sum(len(down) for down, _ in factors)
    if method == "linear":
        scales = [weight * update.scale for weight, update in parts]
        down = torch.cat([scale * a for scale, (a, _) in zip(scales, factors, strict=True)])
        up = torch.cat([b for _, b in factors], 1)
        size = min(down.shape[1], len(up))
        wanted = min(total if rank is None else rank, size)
        return (down, up) if wanted >= total else compressed(down, up, wanted)
    deltas = [update.scale * (b @ a) for (_, update), (a, b) in zip(parts, factors, strict=True)]
    weights = [weight for weight, _ in parts]
    delta = ties(deltas, weights, density) if method == "ties" else dare(deltas, weights, density, generator)
    wanted = min(total if rank is None else rank, *delta.shape)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return vt[:wanted], u[:, :wanted] * s[:wanted]


def compressed(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors of that rank of ``up @ down``; the product itself is never built.

    >>> a, b = compressed(torch.eye(3)[:2], torch.eye(4)[:, :2], 1)
    >>> a.shape, b.shape
    (torch.Size([1, 3]), torch.Size([4, 1]))
    """
    left, small_left = torch.linalg.qr(up)
    right, small_right = torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(small_left @ small_right.T)
    return vt[:rank] @ right.T, left @ (u[:, :rank] * s[:rank])


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect signs, and take the mean of the weighted entries that agree (Yadav et al. 2023, section 4).

    >>> ties([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 3.0])], [1.0, 1.0], density=1.0)
    tensor([3., 2.])
    """
    trimmed = torch.stack([_largest(delta, density) for delta in deltas])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agrees = trimmed.sign() == elected
    factors = torch.tensor(weights, dtype=trimmed.dtype, device=trimmed.device).view(-1, *[1] * deltas[0].ndim)
    return (trimmed * factors * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(delta: Tensor, density: float) -> Tensor:
    keep = delta.abs().flatten().topk(int(density * delta.numel())).indices
    kept = torch.zeros_like(delta).flatten()
    kept[keep] = delta.flatten()[keep]
    return kept.view_as(delta)


def dare(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random, rescale the others, and take the weighted sum (Yu et al. 2023, section 3).

    >>> dare([torch.ones(2), torch.ones(2)], [1.0, 2.0], density=1.0, generator=torch.Generator())
    tensor([3., 3.])
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        # drawn on the CPU, so that one seed is one result on every device
        kept = torch.bernoulli(torch.full(delta.shape, density, dtype=delta.dtype, device="cpu"), generator=generator)
        total += weight * delta * kept.to(delta.device) / density
    return total


def _check(weights: Mapping[str, float], method: str, density: float, rank: int | None) -> None:
    if not weights:
        raise ValueError("merge_adapters: weights={} names no adapter.")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"merge_adapters: weights[{name!r}]={weight!r} must be a finite number.")
    if method not in get_args(Method):
        raise ValueError(f"merge_adapters: method={method!r} must be one of {list(get_args(Method))}.")
    if not 0 < density <= 1:
        raise ValueError(f"merge_adapters: density={density!r} must lie in (0, 1].")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"merge_adapters: rank={rank!r} must be a whole number of at least 1.")


def _check_plain(model: nn.Module, attachment: Attachment, names: Mapping[str, float]) -> None:
    """Refuse what the sum of low-rank updates of weights would leave out."""
    if is_merged(model):
        raise ValueError("merge_adapters: an adapter is merged into the weights. Call unmerge_adapter first.")
    for name in names:
        adapter = attachment.adapters[name]
        if not isinstance(adapter, LoRA):
            raise ValueError(f"merge_adapters: the adapter {name!r} is {adapter!r}; only LoRA can be combined.")
        if own := sorted(attachment.base_parameters(name)):
            raise ValueError(
                f"merge_adapters: the adapter {name!r} also trains {len(own)} parameters of the network itself, first "
                f"{own[:3]}, which have no sum."
            )
    for path, module, updates in hosts(model):
        for name in names:
            update = updates.get_update(name)
            where = f"merge_adapters: the adapter {name!r} at {path or type(model).__name__!r}"
            if update is not None and not isinstance(update, LoRAUpdate):
                raise ValueError(
                    f"{where} updates parameters inside a {type(module).__name__}, which cannot be combined."
                )
            if isinstance(update, LoRAUpdate) and update.lora_magnitude_vector is not None:
                raise ValueError(f"{where} has dora=True: magnitudes have no sum.")
            if update is not None and isinstance(module, AdaptedConv) and module.groups > 1:
                raise ValueError(f"{where} is on a convolution in {module.groups} groups, which cannot be combined.")

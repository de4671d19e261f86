"""EVA: let a LoRA start in the directions in which its layers' inputs are largest.

Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from glob import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_peft.adapters.lora_update import LoRAUpdate
from lightning_peft.adapters.switch import pretrained_eval
from lightning_peft.adapters.updates import updates_named

if TYPE_CHECKING:
    from lightning_peft.adapters.lora import LoRA


def eva_start(model: nn.Module, name: str, lora: LoRA, batches: Iterable[Any], *, rho: float = 2.0) -> LoRA:
    """Let ``A`` hold the largest directions of each layer's inputs, and share the ranks out by how much those explain.

    ``A`` gets right singular vectors of the inputs ``X`` of the pretrained layer, all tokens of all batches; ``B`` stays
    zero. Every layer gives the shares ``s_i^2 / sum(s^2)`` of its singular values, and the largest shares of the whole
    network get the ranks: as many as there were, at least one and at most ``rho`` times its own for each layer. (The
    paper lets a layer go without.)

    **The trap:** a batch counts as it comes: where there are several processes, all must see the same batches.

    Args:
        model: A network that carries the adapter.
        name: Name of the adapter.
        lora: The adapter.
        batches: What the network is called with. Mappings become keyword arguments, and where they have an
            ``attention_mask`` the rows that it masks do not count; of a tuple or list the first entry counts.
        rho: How many times its rank a layer may get at most.

    Returns:
        The adapter with the ranks that came out, as ``rank_pattern``.

    Raises:
        ValueError: If there are no batches, or a layer is not called in any.

    >>> from lightning_peft import LoRA, add_adapter
    >>> net = add_adapter(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoRA(rank=2, init="eva"))
    >>> sum(eva_start(net, "default", LoRA(rank=2, init="eva"), [torch.randn(9, 4)]).rank_pattern.values())
    4
    """
    updates = {path: update for path, update in updates_named(model, name).items() if isinstance(update, LoRAUpdate)}
    moments = input_moments(model, list(updates), batches)
    directions: dict[str, tuple[Tensor, Tensor]] = {}
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for path, moment in moments.items():
        if id(moment) not in done:  # layers with the same inputs share one matrix
            values, vectors = torch.linalg.eigh(moment)
            values = values.flip(0).clamp_min(0)
            done[id(moment)] = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny), vectors.flip(1).T
        directions[path] = done[id(moment)]
    ranks = {path: update.rank for path, update in updates.items()}
    limits = {
        path: min(int(rho * update.rank), update.lora_A.shape[1], len(update.lora_B))
        for path, update in updates.items()
    }
    ranks = share_ranks({path: shares for path, (shares, _) in directions.items()}, ranks, limits)
    # With alpha in step, a layer keeps its scale whatever its rank.
    chosen = replace(
        lora,
        rank_pattern={escape(path): rank for path, rank in ranks.items()},
        alpha_pattern={
            escape(path): lora.alpha_of(path) * (rank / updates[path].rank) ** (0.5 if lora.scaling == "rslora" else 1)
            for path, rank in ranks.items()
        },
    )
    for path, update in updates.items():
        _restart(update, directions[path][1][: ranks[path]], chosen.scale_of(path))
    return chosen


def share_ranks(shares: Mapping[str, Tensor], ranks: Mapping[str, int], limits: Mapping[str, int]) -> dict[str, int]:
    """Return new ranks of the same sum: those of the largest shares of all layers, at least one for each layer.

    Args:
        shares: Of every layer, the shares of its directions, in descending order.
        ranks: The rank of every layer, whose sum is given out.
        limits: The largest rank of every layer.

    >>> share_ranks({"a": torch.tensor([0.6, 0.4]), "b": torch.tensor([0.9, 0.1])}, {"a": 1, "b": 2}, {"a": 2, "b": 2})
    {'a': 2, 'b': 1}
    """
    rest = [(-share, path) for path, limit in limits.items() for share in shares[path][1:limit].tolist()]
    given = dict.fromkeys(ranks, 1)
    for _, path in sorted(rest)[: sum(ranks.values()) - len(ranks)]:
        given[path] += 1
    return given


def _restart(update: LoRAUpdate, down: Tensor, scale: float) -> None:
    like, trains = {"device": update.lora_A.device, "dtype": update.lora_A.dtype}, update.lora_A.requires_grad
    update.rank, update.scale = len(down), scale
    update.lora_A = nn.Parameter(down.to(**like).contiguous(), requires_grad=trains)  # type: ignore[call-overload]
    update.lora_B = nn.Parameter(torch.zeros(len(update.lora_B), len(down), **like), requires_grad=trains)  # type: ignore[call-overload]


class InputMoments:
    """Sums of ``X^T X`` over the inputs of layers; layers that get the very same tensors share one sum.

    >>> moments = InputMoments()
    >>> moments.see("layer", torch.ones(3, 2))
    >>> moments.of(["layer"])["layer"]
    tensor([[3., 3.],
            [3., 3.]])
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._last: tuple[Tensor, int] | None = None
        self._product: Tensor | None = None
        self._layers: list[str] = []

    def see(self, layer: str, input: Tensor) -> None:
        """Count what a layer was called with, ``(..., features)``."""
        if self._last is None or self._last[0] is not input or self._last[1] != input._version:
            self.commit()
            rows = input if self.mask is None or self.mask.shape != input.shape[:-1] else input[self.mask.bool()]
            rows = rows.reshape(-1, input.shape[-1]).to(torch.promote_types(input.dtype, torch.float32))
            self._last, self._product = (input, input._version), rows.T @ rows
        self._layers.append(layer)

    def commit(self) -> None:
        """Add the last tensor's product to the sum of the layers that saw it."""
        if self._product is not None:
            key = tuple(self._layers)
            self._sums[key] = self._sums[key] + self._product if key in self._sums else self._product
        self._last, self._product, self._layers = None, None, []

    def of(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """Return the sum of every layer that was seen; layers with the same inputs have the same tensor."""
        self.commit()
        totals: dict[tuple[tuple[tuple[str, ...], int], ...], Tensor] = {}
        found = {}
        for layer in layers:
            if parts := tuple((key, key.count(layer)) for key in self._sums if layer in key):
                if parts not in totals:
                    first, *others = [self._sums[key] * count if count > 1 else self._sums[key] for key, count in parts]
                    totals[parts] = sum(others, start=first)
                found[layer] = totals[parts]
        return found


def input_moments(model: nn.Module, layers: list[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Run the pretrained network on batches and return ``X^T X`` of the inputs of its layers, by name.

    Args:
        model: A network with adapters.
        layers: Dotted names of the layers.
        batches: What the network is called with.

    Raises:
        ValueError: If there are no batches, or a layer is not called in any.
    """
    moments, device, seen = InputMoments(), next(model.parameters()).device, 0
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(_see, moments, path), with_kwargs=True)
        for path in layers
    ]
    try:
        with pretrained_eval(model):
            for batch in tqdm(batches, desc="EVA", unit="batch"):
                arguments, keywords = call_arguments(batch, device)
                moments.mask = keywords.get("attention_mask")
                model(*arguments, **keywords)
                moments.commit()
                seen += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("add_adapter: batches= is empty, so init='eva' has nothing to look at.")
    found = moments.of(layers)
    if missing := [path for path in layers if path not in found]:
        raise ValueError(
            f"add_adapter: {len(missing)} layers were called in none of the {seen} batches, first {missing[0]!r}, so "
            f"init='eva' cannot start them. Leave them out with exclude={missing}."
        )
    return found


def call_arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what to call a network with for a batch: mappings become keyword arguments, of a tuple the first entry counts.

    >>> call_arguments((torch.zeros(2), "labels"), torch.device("cpu"))
    ((tensor([0., 0.]),), {})
    """
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(inputs, Mapping):
        return (), {key: _moved(value, device) for key, value in inputs.items()}
    return (_moved(inputs, device),), {}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _see(moments: InputMoments, path: str, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    moments.see(path, arguments[0] if arguments else next(iter(keywords.values())))

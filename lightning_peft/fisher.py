"""How much each weight matters to what a network says: the diagonal of its Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from lightning_peft.data.mix_loader import Rows, carried_options, row_count
from lightning_peft.distributed import rank, world_size
from lightning_peft.old_task import untouched

Labels = Literal["exact", "sampled", "empirical"]
Step = Callable[[Any, Any], Any]


def diagonal_fisher(
    module: nn.Module,
    data: Rows,
    step: Step,
    names: Sequence[str],
    *,
    labels: Labels = "exact",
    to_device: Callable[[Any], Any] = lambda batch: batch,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    progress: bool = False,
    owner: str = "diagonal_fisher",
) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information, ``F = mean over rows of E_c (d log p_c / d w)^2``, by parameter.

    ``"exact"`` takes the expectation over the network's own labels, ``sum_c p_c (...)^2``, by a backward pass per class;
    ``"sampled"`` draws one label per row from the network, by one backward pass: the same in the mean;
    ``"empirical"`` takes the labels of the data, which is no Fisher information (Kunstner et al. 2019, arXiv:1905.12558).
    A row with several predictions (tokens) has the sum over them. Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3.

    Rows go through the network one by one, in eval mode, in the dtype of its weights: gradients of a batch say nothing of the
    square of each row's. Every process takes every ``world``-th row. Modes, gradients, flags and random numbers are as before.

    Args:
        module: What ``step`` gets.
        data: Old rows, as a map-style dataset or a loader, of which the batch size does not count.
        step: ``step(module, batch)`` returns logits ``(..., classes)`` of a batch of one row, for ``"empirical"`` the pair of
            logits and labels ``(...)``, of which those below 0 do not count.
        names: Parameters of the module, by their names.
        labels: Whose labels count.
        to_device: Moves a batch to the module's device.
        reduce: Sums a tensor over the processes.
        progress: Show a bar if it takes longer than two seconds.
        owner: Who asks; error messages begin with it.

    Returns:
        Tensors of the parameters' shapes, in ``float32`` or wider.

    Raises:
        ValueError: For data without rows, logits of another shape, or parameters none of which the logits depend on.

    >>> net, rows = nn.Linear(1, 2, bias=False), [torch.tensor([2.0])]
    >>> _ = nn.init.zeros_(net.weight)
    >>> diagonal_fisher(net, rows, lambda net, x: net(x), ["weight"])["weight"].round(decimals=4).tolist()  # p (1 - p) x^2
    [[1.0], [1.0]]
    """
    loader = data if isinstance(data, DataLoader) else DataLoader(data)
    rows = row_count(loader.dataset, f"{owner}: data")
    mine = range(rank(), rows, world_size())
    batches = DataLoader(
        Subset(loader.dataset, mine), batch_size=1, generator=torch.Generator(), **carried_options(loader)
    )
    known = dict(module.named_parameters())
    weights = {name: known[name] for name in names}
    sums = {name: torch.zeros_like(weight, dtype=_wide(weight.dtype)) for name, weight in weights.items()}
    with _scored(module, list(weights.values())):
        for row, batch in tqdm(
            zip(mine, batches, strict=True), total=len(mine), desc="Fisher", delay=2, leave=False, disable=not progress
        ):
            logits, given = _logits(step(module, to_device(batch)), labels, owner)
            _add_squares(logits, score_vectors(logits.detach(), labels, given, seed=row), weights, sums)
    summed = {name: reduce(found).div_(rows) for name, found in sums.items()}
    if not any(bool(found.any()) for found in summed.values()):
        raise ValueError(
            f"{owner}: the logits of step depend on none of the {len(weights)} parameters, first {list(weights)[:3]}. "
            "Let step call the module without torch.no_grad, or choose the parameters of the part that it calls."
        )
    return summed


def score_vectors(logits: Tensor, labels: Labels, given: Tensor | None = None, *, seed: int = 0) -> Iterator[Tensor]:
    """Yield what the logits of a row are weighted with; the squares of the gradients that come out add up to its Fisher.

    With ``d log p_c / d z = e_c - p``: ``sqrt(p_c) (e_c - p)`` for every prediction and class (``"exact"``), or
    ``e_y - p`` for all predictions at once, with drawn or given labels ``y``.

    Args:
        logits: ``(predictions, classes)``.
        labels: Whose labels count.
        given: Labels ``(predictions,)`` of the data; below 0 for none.
        seed: Of the labels that are drawn.

    >>> [weighting.tolist() for weighting in score_vectors(torch.zeros(1, 2), "empirical", torch.tensor([1]))]
    [[[-0.5, 0.5]]]
    """
    p = logits.to(_wide(logits.dtype)).softmax(-1)
    if labels == "exact":
        for place in range(len(p)):
            for one in range(p.shape[1]):
                weighting = torch.zeros_like(p)
                weighting[place] = -p[place]
                weighting[place, one] += 1
                yield weighting * p[place, one].sqrt()
        return
    if labels == "sampled":  # on the CPU, so that one seed is one label on every device
        generator = torch.Generator("cpu").manual_seed(seed)
        given = torch.multinomial(p.cpu(), 1, generator=generator).squeeze(1).to(p.device)
    assert given is not None
    counted = (given >= 0).unsqueeze(1)
    yield (nn.functional.one_hot(given.clamp_min(0), p.shape[1]).to(p.dtype) - p) * counted


def _add_squares(
    logits: Tensor, weightings: Iterator[Tensor], weights: Mapping[str, Tensor], sums: dict[str, Tensor]
) -> None:
    if not logits.requires_grad:
        return  # that no parameter has a part in them is said once, for all rows
    for weighting in weightings:
        gradients = torch.autograd.grad(
            logits, list(weights.values()), weighting.to(logits.dtype), retain_graph=True, allow_unused=True
        )
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.to(total.dtype).square())


def _logits(result: Any, labels: Labels, owner: str) -> tuple[Tensor, Tensor | None]:
    """Return what the step gave as ``(predictions, classes)``, and the labels if they count."""
    pair = isinstance(result, tuple | list)
    logits, given = (result[0], result[-1] if len(result) == 2 else None) if pair else (result, None)
    if not isinstance(logits, Tensor) or logits.ndim < 1 or logits.shape[-1] < 2:
        shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{owner}: step returned {shown!r}; it must return logits (..., classes) with at least two classes. For one "
            "logit z of two classes return torch.cat([torch.zeros_like(z), z], -1)."
        )
    if labels != "empirical":
        return logits.reshape(-1, logits.shape[-1]), None
    if not isinstance(given, Tensor) or given.shape != logits.shape[:-1]:
        shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"{owner}: labels='empirical' needs a step that returns logits and labels; the labels are {shown!r}, and must "
            f"be of the shape {tuple(logits.shape[:-1])}."
        )
    return logits.reshape(-1, logits.shape[-1]), given.reshape(-1)


def check_labels(labels: str, owner: str) -> None:
    """Refuse a choice of labels that there is not.

    Raises:
        ValueError: With those that there are.
    """
    if labels not in get_args(Labels):
        raise ValueError(f"{owner}: labels={labels!r} must be one of {list(get_args(Labels))}.")


@contextmanager
def _scored(module: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients of these weights be taken in eval mode, and leave no trace."""
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), untouched(module, weights[0].device if weights else torch.device("cpu")):
            yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

"""The two-layer linear model of Kumar et al. 2022, arXiv:2202.10054, section 3: how a head distorts features that were good.

The truth is ``y = v*^T B* x``, the model ``v^T B x`` with a backbone ``B_0`` near ``B*``. The training inputs fill 15 of 60
dimensions: gradient descent moves ``B`` there and nowhere else, so that what lies outside no longer fits the moved head.
All is float64 and batched over problems; nothing here knows Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

DIMENSIONS, FEATURES, SEEN_DIMENSIONS, INPUTS = 60, 5, 15, 40
RATE, MOST_STEPS, CHECK_EVERY, SMALL_ENOUGH = 0.02, 60_000, 200, 1e-12
HEADS = ("random", "random/10", "zero", "probe", "head first")
"""How the head starts. ``probe`` is the least-squares head and stays as it is; ``head first`` is the same one, then trained
with the backbone."""


@dataclass(frozen=True)
class Problems:
    """A batch of regressions, each from its own seed.

    Args:
        inputs: Training inputs, ``(problems, inputs, dimensions)``.
        seen: Orthonormal directions in which these inputs lie, ``(problems, seen, dimensions)``.
        truth: ``B*^T v*``, ``(problems, dimensions)``.
        backbone: ``B_0``, ``(problems, features, dimensions)``, with orthonormal rows.
        random_head: Entries from N(0, 1 / features), ``(problems, features)``.
    """

    inputs: Tensor
    seen: Tensor
    truth: Tensor
    backbone: Tensor
    random_head: Tensor

    @property
    def covariance(self) -> Tensor:
        """Second moment of the training inputs, ``(problems, dimensions, dimensions)``."""
        return self.inputs.mT @ self.inputs / self.inputs.shape[1]

    def __getitem__(self, chosen: Tensor) -> Problems:
        """Return the problems that a mask or indices choose."""
        return Problems(*(value[chosen] for value in vars(self).values()))

    def repeated(self, times: int) -> Problems:
        """Return the batch several times over, one copy after the other."""
        return Problems(*(value.repeat(times, *[1] * (value.dim() - 1)) for value in vars(self).values()))


def draw(noise: float, seeds: Sequence[int]) -> Problems:
    """Draw a problem for each seed; the same seed with other noise has the same truth and inputs.

    Args:
        noise: ``eps`` of ``B_0 = orth(B* + eps N(0, 1) / sqrt(dimensions))``: how far from right the pretrained features are.
        seeds: A seed for each problem.

    >>> problems = draw(0.0, [0, 1])
    >>> torch.allclose(problems.backbone @ problems.backbone.mT, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    True
    """
    drawn = [_draw_one(noise, torch.Generator().manual_seed(seed)) for seed in seeds]
    return Problems(*(torch.stack(values) for values in zip(*drawn, strict=True)))


def _draw_one(noise: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = orthonormal(normal(FEATURES, DIMENSIONS))
    weights = normal(FEATURES)
    seen = orthonormal(normal(SEEN_DIMENSIONS, DIMENSIONS))
    inputs = normal(INPUTS, SEEN_DIMENSIONS) @ seen
    backbone = orthonormal(features + noise * normal(FEATURES, DIMENSIONS) / DIMENSIONS**0.5)
    return inputs, seen, weights / weights.norm() @ features, backbone, normal(FEATURES) / FEATURES**0.5


def orthonormal(matrix: Tensor) -> Tensor:
    """Return the matrix with orthonormal rows that lies nearest."""
    parts: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrix, full_matrices=False)
    return parts[0] @ parts[2]


def start_head(kind: str, problems: Problems) -> Tensor:
    """Return the heads that an arm of :data:`HEADS` starts with, ``(problems, features)``."""
    if kind in {"probe", "head first"}:
        features = problems.inputs @ problems.backbone.mT
        wanted = (problems.inputs @ problems.truth.unsqueeze(-1)).squeeze(-1)
        solution: Tensor = torch.linalg.pinv(features) @ wanted.unsqueeze(-1)
        return solution.squeeze(-1)
    return {"random": 1.0, "random/10": 0.1, "zero": 0.0}[kind] * problems.random_head


def residual(problems: Problems, backbone: Tensor, head: Tensor) -> Tensor:
    """Return ``B^T v - B*^T v*``, ``(problems, dimensions)``: what the prediction is wrong by is its product with ``x``."""
    return torch.einsum("pfd,pf->pd", backbone, head) - problems.truth


def error(problems: Problems, backbone: Tensor, head: Tensor) -> Tensor:
    """Return the mean squared error over fresh inputs of the training kind (normal in the seen directions)."""
    return torch.einsum("psd,pd->ps", problems.seen, residual(problems, backbone, head)).square().sum(1)


def shifted_error(problems: Problems, backbone: Tensor, head: Tensor) -> Tensor:
    """Return the mean squared error over inputs from N(0, I), most of whose directions training never saw."""
    return residual(problems, backbone, head).square().sum(1)


def gradients(covariance: Tensor, truth: Tensor, backbone: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of half the mean squared training error with respect to backbone and head.

    With ``g = S (B^T v - B*^T v*)`` they are ``v g^T`` and ``B g``.
    """
    wrong = torch.baddbmm(truth.unsqueeze(-1), backbone.mT, head.unsqueeze(-1), beta=-1)
    pull = covariance @ wrong
    return head.unsqueeze(-1) @ pull.mT, (backbone @ pull).squeeze(-1)


def descend(problems: Problems, backbone: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Train backbone and head by gradient descent until the error is small; return both and the steps that it took.

    Problems leave the batch as they finish; it is looked every 200 steps, and 60,000 are the most.
    """
    backbone, head, covariance = backbone.clone(), head.clone(), problems.covariance
    steps, running = torch.zeros(len(head), dtype=torch.long), torch.arange(len(head))
    with tqdm(total=len(head), desc="linear models trained", leave=False) as bar:
        for _ in range(MOST_STEPS // CHECK_EVERY):
            running = running[error(problems, backbone, head)[running] >= SMALL_ENOUGH]
            bar.update(len(head) - len(running) - bar.n)
            if not len(running):
                break
            fixed, moved, moved_head = (covariance[running], problems.truth[running]), backbone[running], head[running]
            for _ in range(CHECK_EVERY):
                to_backbone, to_head = gradients(*fixed, moved, moved_head)
                moved, moved_head = moved - RATE * to_backbone, moved_head - RATE * to_head
            backbone[running], head[running] = moved, moved_head
            steps[running] += CHECK_EVERY
    return backbone, head, steps


def compare_heads(noises: Sequence[float], seeds: Sequence[int]) -> list[dict[str, float | str]]:
    """Train every head at every noise from every seed, all in one batch; return a row for each.

    Args:
        noises: Values of ``eps``; see :func:`draw`.
        seeds: Seeds of the problems.

    Returns:
        Rows with ``noise``, ``head``, ``seed``, ``steps``, the two errors, ``drift`` ``||B - B_0||`` and ``first_gradient``
        ``||dL/dB||`` before the first step.
    """
    drawn = [vars(draw(noise, seeds)).values() for noise in noises]
    one = Problems(*(torch.cat(values) for values in zip(*drawn, strict=True)))
    problems = one.repeated(len(HEADS))
    start = torch.cat([start_head(kind, one) for kind in HEADS])
    trained = torch.arange(len(start)) // len(one.truth) != HEADS.index("probe")
    backbone, head, steps = problems.backbone.clone(), start.clone(), torch.zeros(len(start), dtype=torch.long)
    backbone[trained], head[trained], steps[trained] = descend(problems[trained], backbone[trained], head[trained])
    first, _ = gradients(problems.covariance, problems.truth, problems.backbone, start)
    measures = {
        "steps": steps,
        "error": error(problems, backbone, head),
        "shifted_error": shifted_error(problems, backbone, head),
        "drift": (backbone - problems.backbone).flatten(1).norm(dim=1),
        "first_gradient": first.flatten(1).norm(dim=1),
    }
    labels = [(noise, kind, seed) for kind in HEADS for noise in noises for seed in seeds]
    columns = zip(*(values.tolist() for values in measures.values()), strict=True)
    return [
        dict(zip(("noise", "head", "seed", *measures), (*label, *values), strict=True))
        for label, values in zip(labels, columns, strict=True)
    ]

"""A picture of a latent space: rows by class on a plane, and what the decoder makes of each place of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.image_grid import image_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed


@dataclass(frozen=True)
class Plane:
    """Two directions through the mean of latents.

    Args:
        mean: ``(latents,)``.
        axes: ``(2, latents)``, orthonormal.
        explained: Share of the latents' variance that lies in the plane.
    """

    mean: Tensor
    axes: Tensor
    explained: float

    def project(self, latents: Tensor) -> Tensor:
        """Return the places of latents on the plane, ``(rows, 2)``."""
        return (latents.double() - self.mean) @ self.axes.T

    def lift(self, places: Tensor) -> Tensor:
        """Return the latents of places on the plane, ``(rows, latents)``."""
        return places.double() @ self.axes + self.mean


def principal_plane(latents: Tensor) -> Plane:
    """Return the plane of the first two principal components; two dimensions stay as they are.

    Signs are fixed (the largest entry of an axis is positive), so that pictures of successive steps do not flip.

    Args:
        latents: ``(rows, latents)``, at least 2 of both.

    Raises:
        ValueError: For another shape.

    >>> plane = principal_plane(torch.tensor([[0.0, 0, 1], [2, 0, 1], [4, 0, 1], [6, 1, 1]]))
    >>> plane.axes.shape, round(plane.explained, 3)
    (torch.Size([2, 3]), 1.0)
    """
    if latents.ndim != 2 or min(latents.shape) < 2:
        raise ValueError(
            f"principal_plane: latents of shape {tuple(latents.shape)}; a plane needs (rows, latents), 2 of each at least."
        )
    latents = latents.detach().double().cpu()
    if latents.shape[1] == 2:
        return Plane(torch.zeros(2).double(), torch.eye(2).double(), 1.0)
    mean = latents.mean(0)
    _, spread, axes = torch.linalg.svd(latents - mean, full_matrices=False)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()
    share = spread[:2].square().sum() / spread.square().sum().clamp_min(1e-300)
    return Plane(mean, axes[:2], float(share))


def plane_grid(places: Tensor, side: int) -> tuple[Tensor, tuple[float, float, float, float]]:
    """Return a grid over what places span, from the upper left on row by row, and its extent (left, right, low, high).

    >>> grid, extent = plane_grid(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), 2)
    >>> grid.tolist(), extent
    ([[0.25, 2.25], [0.75, 2.25], [0.25, 0.75], [0.75, 0.75]], (0.0, 1.0, 0.0, 3.0))
    """
    (left, low), (right, high) = places.amin(0).tolist(), places.amax(0).tolist()
    centres = (torch.arange(side).double() + 0.5) / side
    x, y = left + (right - left) * centres, high - (high - low) * centres
    grid = torch.stack([x.repeat(side), y.repeat_interleave(side)], 1)
    return grid, (left, right, low, high)


def draw_latents(
    latents: Tensor,
    labels: Tensor | None,
    decode: Callable[[Tensor], Tensor] | None,
    *,
    side: int = 16,
    title: str = "",
) -> Figure:
    """Draw rows by class on the plane of their latents; beside it, over the same extent, what a grid of it decodes to.

    Args:
        latents: ``(rows, latents)``.
        labels: Classes ``(rows,)``, or nothing to colour by.
        decode: From latents ``(rows, latents)`` to images; unset, the grid is left out.
        side: Images along an edge of the grid.
        title: Stands above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415

    plane = principal_plane(latents)
    places = plane.project(latents.cpu())
    figure = Canvas(figsize=(11 if decode else 5.8, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if decode else 1, squeeze=False)[0]
    scatter(panels[0], places, labels)
    if latents.shape[1] > 2:
        panels[0].set_title(f"first two principal components: {plane.explained:.0%} of the variance", fontsize=10)
    if decode:
        grid, extent = plane_grid(places, side)
        panels[0].set_xlim(extent[:2])
        panels[0].set_ylim(extent[2:])
        whole = image_grid(decode(plane.lift(grid)), columns=side)
        panels[1].imshow(
            whole.permute(1, 2, 0).expand(-1, -1, 3), extent=extent, aspect="auto", interpolation="nearest"
        )
        panels[1].set_title("the same plane, decoded", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def scatter(panel: Any, places: Tensor, labels: Tensor | None) -> None:
    """Draw places on a panel, coloured by class."""
    kinds = [None] if labels is None else sorted(set(labels.tolist()))
    for number, kind in enumerate(kinds):
        chosen = places if labels is None else places[labels.cpu() == kind]
        panel.scatter(*chosen.T.tolist(), s=7, color=f"C{number % 10}", linewidths=0, label=kind)
    if labels is not None and len(kinds) <= 20:
        panel.legend(fontsize=7, markerscale=2, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

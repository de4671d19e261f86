"""What the models of the recipe ``generative`` make, as pictures: latent planes, reconstructions, conditions, interpolation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_peft.latent_plane import plane_grid, scatter
from lightning_peft.recipes.generative_models import WORDS, spell
from lightning_peft.recipes.generative_panels import Gallery, canvas, label_rows, show
from lightning_peft.recipes.generative_train import blur, hide_half

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed


def draw_latent_planes(gallery: Gallery) -> Figure:
    """Draw the latents of AE and VAE side by side: classes, a circle that holds 95 % of N(0, I), and the decoded plane."""
    from matplotlib.patches import Circle  # noqa: PLC0415 - slow to import, seldom needed

    bench = gallery.bench
    figure = canvas(11.5, 10)
    for row, (title, name) in zip(figure.subplots(2, 2), (("AE", "autoencoder2"), ("VAE", "vae2")), strict=True):
        places = bench.nets[name].encode(bench.images.train).double()
        grid, extent = plane_grid(torch.cat([places, torch.tensor([[-3.0, -3.0], [3.0, 3.0]]).double()]), 20)
        scatter(row[0], places, bench.images.labels)
        row[0].set_title(f"{title}: latents of the training images, by class", fontsize=10)
        show(
            row[1],
            bench.nets[name].decode(grid.float()),
            20,
            f"{title}: the same plane, decoded",
            extent=extent,
            aspect="auto",
        )
        for panel, color in ((row[0], "black"), (row[1], "red")):
            panel.add_patch(Circle((0, 0), 2.45, fill=False, color=color, linewidth=1.5, linestyle="--"))
            panel.set_xlim(extent[:2])
            panel.set_ylim(extent[2:])
    figure.suptitle("Dashed: 95 % of the latents that N(0, I) draws", fontsize=11)
    return figure


def draw_reconstructions(gallery: Gallery) -> Figure:
    """Draw held-out images and their reconstructions."""
    names = [name for name in gallery.samples if "reconstructions" in name]
    rows = torch.cat([gallery.bench.images.test[:16], *(gallery.samples[name][:16] for name in names)])
    figure = canvas(9, 3.2)
    panel = figure.subplots()
    show(panel, rows, 16, "")
    label_rows(panel, ["originals", *(name.partition(",")[0] for name in names)])
    return figure


def draw_classes(gallery: Gallery) -> Figure:
    """Draw the conditional VAE's samples, a row for each class."""
    classes, across = gallery.bench.images.classes, 12
    figure = canvas(8.5, 0.36 * classes + 0.4)
    torch.manual_seed(5)
    for panel, latents in zip(figure.subplots(1, 2), (8, 2), strict=True):
        images = gallery.bench.nets[f"cvae{latents}"].sample(torch.arange(classes).repeat_interleave(across))
        show(panel, images, across, f"CVAE{latents}")
        label_rows(panel, [str(kind) for kind in range(classes)])
    return figure


def draw_conditions(gallery: Gallery) -> Figure:
    """Draw what was given, four draws and the original: for half an image, a blurred one, and words."""
    bench, count = gallery.bench, 8
    real = bench.images.test[:count]
    words = "word" in bench.nets
    figure = canvas(12, 4.8)
    panels = figure.subplots(1, 3 if words else 2)
    torch.manual_seed(5)
    for panel, name, spoil, title in (
        (panels[0], "completion", hide_half, "half an image"), (panels[1], "deblurring", blur, "a blurred image"),
    ):  # fmt: skip
        given = spoil(real)
        draws = [bench.nets[name].sample(given) for _ in range(4)]
        show(panel, torch.stack([given, *draws, real], 1).flatten(0, 1), 6, f"{title}: given, four draws, original")
    if words:
        spelled = [*WORDS, "sven", "SEVEN", "seevn"]
        images = bench.nets["word"].sample(spell(spelled).repeat_interleave(5, 0))
        show(panels[2], images, 5, "a word")
        label_rows(panels[2], spelled)
    return figure


def draw_interpolation(gallery: Gallery) -> Figure:
    """Draw straight lines between two held-out images: of pixels, and of latents."""
    bench = gallery.bench
    one, other = bench.images.test[:1], bench.images.test[bench.images.test_labels != bench.images.test_labels[0]][:1]
    way = torch.linspace(0, 1, 12)[:, None]
    rows = [torch.lerp(one.flatten(1), other.flatten(1), way).reshape(-1, *one.shape[1:])]
    names = ["pixels"]
    for title, name in (("AE8", "autoencoder8"), ("VAE8", "vae8"), ("AE2", "autoencoder2"), ("VAE2", "vae2")):
        net = bench.nets[name]
        rows.append(net.decode(torch.lerp(net.encode(one), net.encode(other), way)))
        names.append(title)
    figure = canvas(7.5, 3.4)
    panel = figure.subplots()
    show(panel, torch.cat(rows), 12, "")
    label_rows(panel, names)
    return figure

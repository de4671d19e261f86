"""Pictures of the recipe ``generative``, of its first seed: as PNG beside the page, and in TensorBoard."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_peft.files import write_atomic
from lightning_peft.image_grid import image_grid
from lightning_peft.recipes.generative_arms import NEAR, SMOOTH
from lightning_peft.recipes.generative_measures import Row
from lightning_peft.recipes.generative_model_pictures import (
    draw_classes,
    draw_conditions,
    draw_interpolation,
    draw_latent_planes,
    draw_reconstructions,
)
from lightning_peft.recipes.generative_naive import LOOK_EVERY, ascend
from lightning_peft.recipes.generative_panels import Gallery, canvas, show
from lightning_peft.recipes.generative_verdicts import means

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed

COLUMNS = 8


def draw(gallery: Gallery) -> dict[str, str]:
    """Draw all pictures; return file names and captions in the order of the page."""
    drawings: dict[str, tuple[Callable[[Gallery], Figure], str]] = {
        "samples": (draw_samples, "Every arm: 8 images of it, and below each its nearest training image"),
        "metrics": (
            draw_metrics,
            "Five measures that disagree: means over seeds; of FID less is better, of the others more",
        ),
        "ascent": (draw_ascent, "One image on its way up the classifier's gradient; C climbs, E never saw it"),
        "accepted": (draw_accepted, "Noise that the classifier accepted, with its confidence"),
        "search": (draw_search, "What random search would have to draw, by the size of the image"),
        "latents": (draw_latent_planes, "Two latents: training images by class, and the decoded plane around N(0, I)"),
        "reconstructions": (draw_reconstructions, "Held-out images, and what each model makes of them"),
        "classes": (draw_classes, "CVAE: a row for each class"),
        "conditions": (draw_conditions, "CVAE on an image and on a word: the condition, four draws, the original"),
        "interpolation": (draw_interpolation, "From one held-out image to another"),
    }
    logger = TensorBoardLogger(gallery.out / "logs", name="", version="summary")
    found = {}
    with torch.no_grad():
        for name, (drawing, caption) in drawings.items():
            figure = drawing(gallery)
            path = gallery.page.with_name(f"generative_{name}.png")
            write_atomic(path, partial(figure.savefig, dpi=100, format="png"))
            logger.experiment.add_figure(f"generation/{name}", figure)
            found[path.name] = caption
        for arm, images in gallery.samples.items():
            if len(images):
                pairs = beside_nearest(images[:64], gallery.bench.images.train)
                logger.experiment.add_image(f"generation/{arm}", image_grid(pairs, columns=16))
    logger.finalize("success")
    return found


def beside_nearest(images: Tensor, train: Tensor) -> Tensor:
    """Return each image and after it its nearest training image."""
    nearest = train[torch.cdist(images.flatten(1), train.flatten(1)).argmin(1)]
    return torch.stack([images, nearest], 1).flatten(0, 1)


def draw_samples(gallery: Gallery) -> Figure:
    """Draw a panel for each arm: eight images, below each its nearest training image."""
    shown = {arm: images[:COLUMNS] for arm, images in gallery.samples.items() if len(images)}
    across = 4
    figure = canvas(12.5, 1.05 * -(-len(shown) // across))
    panels = list(figure.subplots(-(-len(shown) // across), across, squeeze=False).flat)
    for panel, (arm, images) in zip(panels, shown.items(), strict=False):
        pairs = beside_nearest(images, gallery.bench.images.train)
        show(panel, torch.cat([pairs[::2], pairs[1::2]]), len(images), arm)
    for panel in panels[len(shown) :]:
        panel.axis("off")
    return figure


def draw_metrics(gallery: Gallery) -> Figure:
    """Draw FID, precision, recall, coverage and detector as bars, an arm below the other."""
    found = means(gallery.rows)
    figure = canvas(12, 0.21 * len(found) + 1.2)
    panels = figure.subplots(1, 5, sharey=True)
    titles = {
        "fid": "FID (less is better)", "precision": "precision", "recall": "recall", "coverage": "coverage",
        "detector": "called a digit",
    }  # fmt: skip
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        values = [row[key] for row in found.values()]
        panel.barh(range(len(found)), values, color=[color_of(arm) for arm in found])
        panel.set_title(title, fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.set_xlim(left=0)
    panels[0].set_xscale("symlog", linthresh=10)
    panels[0].set_xticks([0, 10, 100], ["0", "10", "100"])
    panels[0].set_ylim(len(found) - 0.4, -0.6)
    panels[0].set_yticks(range(len(found)), list(found), fontsize=8)
    return figure


def color_of(arm: str) -> str:
    """Return the colour of an arm's family."""
    families = {"real": "0.35", "ascent": "C1", "AE": "C0", "VAE": "C2", "CVAE": "C4", "GMM": "C5"}
    return next((color for start, color in families.items() if arm.startswith(start)), "C3")


def draw_ascent(gallery: Gallery) -> Figure:
    """Draw the way of one image for each kind of ascent, with the confidences of C and E in the target."""
    bench, target = gallery.bench, 3 % gallery.bench.images.classes
    shape = bench.images.train.shape[1:]
    generator = torch.Generator().manual_seed(7)
    noise = torch.rand(1, *shape, generator=generator)
    real = bench.images.test[bench.images.test_labels != target][:1]
    ways: dict[str, tuple[Tensor, dict[str, float]]] = {
        "from noise": (noise, {}), "from noise, smooth": (noise, {"smooth": SMOOTH}),
        "from grey": (torch.full_like(noise, 0.5), {}),
        "from an image": (real, {}), "from an image, near": (real, {"near": NEAR, "smooth": SMOOTH / 3}),
    }  # fmt: skip
    figure = canvas(9.5, 1.75 * len(ways))
    table = figure.subplots(len(ways), 120 // LOOK_EVERY + 1, squeeze=False)
    for panels, (title, (start, options)) in zip(table, ways.items(), strict=True):
        _, path = ascend(bench.nets["classifier"], start, torch.tensor([target]), **options)  # type: ignore[arg-type]
        for number, (panel, image) in enumerate(zip(panels, path, strict=True)):
            c, e = (float(bench.nets[judge](image).softmax(1)[0, target]) for judge in ("classifier", "evaluator"))
            show(panel, image, 1, f"C {c:.2f}  E {e:.2f}")
            if title == "from noise":
                panel.set_title(f"step {number * LOOK_EVERY}\n{panel.get_title()}", fontsize=9)
        panels[0].set_ylabel(title, fontsize=9)
    figure.suptitle(f"Gradient ascent to the class {target}", fontsize=11)
    return figure


def draw_accepted(gallery: Gallery) -> Figure:
    """Draw what the classifier accepted among noise, with its confidence below."""
    found = {arm: images[:10] for arm, images in gallery.samples.items() if ", C >" in arm}
    figure = canvas(10, 1.45 * len(found))
    for panels, (arm, images) in zip(figure.subplots(len(found), 10, squeeze=False), found.items(), strict=True):
        panels[0].set_ylabel(arm.replace(", ", "\n"), fontsize=8)
        for panel in panels[len(images) :]:
            panel.axis("off")
        if len(images):
            top, seen = gallery.bench.nets["classifier"](images).softmax(1).max(1)
            for panel, image, share, kind in zip(panels, images, top.tolist(), seen.tolist(), strict=False):
                show(panel, image[None], 1, f"“{kind}” {share:.3f}")
    return figure


def draw_search(gallery: Gallery) -> Figure:
    """Draw expected draws by size, as powers of ten: for the classifier as measured, for nearness at least."""
    figure = canvas(7, 3.8)
    panel = figure.subplots()
    found = [row for name, row in gallery.rows.items() if name.startswith("search")]
    sides = sorted({row["side"] for row in found})
    ways: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
        (
            "one that C is more than 0.99 sure of (measured)",
            "o",
            lambda row: math.log10(row["draws"] / max(row["sure"], 1)),
        ),
        ("one as near as held-out images are (a lower bound)", "^", lambda row: float(row["least_draws"])),
    )
    for (label, marker, power), lift in zip(ways, (-14, 6), strict=True):
        centre = [statistics.fmean(power(row) for row in found if row["side"] == side) for side in sides]
        panel.plot(sides, centre, marker=marker, label=label)
        for side, value in zip(sides, centre, strict=True):
            panel.annotate(
                f"$10^{{{value:.1f}}}$", (side, value), xytext=(4, lift), textcoords="offset points", fontsize=9
            )
    panel.yaxis.set_major_formatter(lambda value, _: f"$10^{{{value:.0f}}}$")
    panel.set_xticks(sides, [f"{side} x {side}" for side in sides])
    panel.set_ylabel("expected draws of uniform noise")
    panel.set_xlabel("pixels")
    panel.margins(0.12)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left")
    return figure

"""Pictures of the recipe ``generative``, of its first seed: as PNG beside the page, and in TensorBoard."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_peft.files import write_atomic
from lightning_peft.image_grid import image_grid
from lightning_peft.latent_plane import plane_grid, scatter
from lightning_peft.recipes.generative_arms import NEAR, SMOOTH, Bench
from lightning_peft.recipes.generative_measures import Row
from lightning_peft.recipes.generative_models import WORDS, spell
from lightning_peft.recipes.generative_naive import LOOK_EVERY, ascend
from lightning_peft.recipes.generative_train import blur, hide_half
from lightning_peft.recipes.generative_verdicts import means

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, seldom needed

COLUMNS = 8


@dataclass(frozen=True)
class Gallery:
    """What pictures are made from.

    Args:
        bench: Images and networks of the first seed.
        samples: What each arm has made with them.
        rows: Rows of all seeds.
        page: The page that shows the pictures.
        out: Folder of the run.
    """

    bench: Bench
    samples: Mapping[str, Tensor]
    rows: Mapping[str, Row]
    page: Path
    out: Path


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


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import, seldom needed
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def show(panel: Any, images: Tensor, columns: int, title: str, **options: Any) -> None:
    """Show images as a grid in a panel."""
    panel.imshow(
        image_grid(images, columns=columns).permute(1, 2, 0).expand(-1, -1, 3), interpolation="nearest", **options
    )
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])


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


def label_rows(panel: Any, names: Sequence[str]) -> None:
    """Write a name beside each row of a grid."""
    low, high = sorted(panel.get_ylim())
    height = (high - low) / len(names)
    panel.set_yticks([low + height * (place + 0.5) for place in range(len(names))], names, fontsize=8)


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

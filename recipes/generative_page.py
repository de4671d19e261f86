"""Table and page of the recipe ``generative``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from lightning_peft.files import write_text
from lightning_peft.recipes.generative_measures import COLUMNS, Row
from lightning_peft.recipes.generative_verdicts import by_arm, means
from lightning_peft.reporting import TextTable

LEGEND = """`conf`, `>.99`: mean confidence of the classifier C that the arms look at, and the share above 0.99. `agree`:
share where E, an independent classifier, sees the same class. `det`: share that a detector, trained against noise,
shuffled and mixed digits, calls a digit. `nn`: mean distance to the nearest training image. `FID`: of E's features to the
training images'. `P R D C`: precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020) in pixel
space, k = 5. `copy`: share by which images are nearer to training images than held-out ones are (0.5: no copying).
`cond`: share where E sees what was asked for."""
INTRODUCTION = """Does "sample something, ask a classifier" generate data? Random search, gradient ascent on the input,
random latents of an autoencoder; then latents of the right scale, a density fitted afterwards, a VAE's prior; without a
condition, and on a class, on half an image, on a blurred one, on a word. Models are MLPs 256-256, a pixel has a sigma of
0.15, beta is 1; every arm has as many images as are held out, or as `--samples` asks for where it can."""
SEARCH = """The images are interpolated to each size, and a classifier is trained for it. Near is what lies no further
from a training image than 95 % of the held-out images do. The expected draws for one are a rigorous lower bound
(Chernoff's for each training image, summed over them), of the easiest seed. What C asks for says nothing of that: it
accepts noise."""
SEEN = 0.8
"""E is fooled by ascent where it sees this share of the targets in images that are nowhere near real ones."""
VERDICT = """An arm works where precision, recall and coverage reach half of what the real test images have; it fails where
precision or coverage is below a tenth."""


def spread(values: list[float]) -> str:
    """Return a mean, and the range over seeds where there are several.

    >>> spread([1.0, 2.0]), spread([250.0]), spread([])
    ('1.500 (1.000-2.000)', '250', '-')
    """
    if not values:
        return "-"
    digits = 3 if abs(statistics.fmean(values)) < 5 else 1 if abs(statistics.fmean(values)) < 100 else 0
    shown = f"{statistics.fmean(values):.{digits}f}"
    return f"{shown} ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else shown


def table(rows: Mapping[str, Row]) -> TextTable:
    """Return a line for each arm: means over seeds, and of the Fréchet distance the range."""
    found = by_arm(rows)
    count = max(len(values["images"]) for values in found.values())
    lines = []
    for arm, values in found.items():
        cells = [spread(values[key]) if key == "fid" else spread(values[key]).partition(" ")[0] for key in COLUMNS]
        lines.append((arm, *cells))
    return TextTable(
        f"Means over {count} seed{'s' * (count > 1)}; of FID also the range", ["arm", *COLUMNS.values()], lines
    )


def search_table(rows: Mapping[str, Row]) -> TextTable:
    """Return a line for each size of the random search, summed over seeds."""
    found: dict[int, list[Row]] = {}
    for name, row in rows.items():
        if name.startswith("search"):
            found.setdefault(row["side"], []).append(row)
    lines = []
    for side, seeds in sorted(found.items()):
        draws, sure, near = (sum(row[key] for row in seeds) for key in ("draws", "sure", "near"))
        lines.append(
            (
                f"{side} x {side}", f"{draws:,}", f"{sure:,}", f"{draws / sure:,.0f}" if sure else f"above {draws:,}", f"{near:,}",
                f"10^{min(row['least_draws'] for row in seeds):.1f}", f"{statistics.fmean(row['accuracy'] for row in seeds):.3f}",
            )
        )  # fmt: skip
    columns = [
        "pixels",
        "draws",
        "C > 0.99",
        "draws for one",
        "near a real image",
        "draws for one, at least",
        "accuracy of C",
    ]
    return TextTable("Uniform noise, all seeds together", columns, lines)


def summary(rows: Mapping[str, Row]) -> list[str]:
    """Return what the arms say together, in the numbers of this run."""
    found = means(rows)
    wrong, scaled, fitted, prior = (found[arm] for arm in ("AE8, N(0, I)", "AE8, scaled", "AE8, GMM", "VAE8, N(0, I)"))
    floor, ascent, box = (found[arm] for arm in ("AE8, reconstructions", "ascent from noise", "AE8, box"))
    by_scale = (wrong["fid"] - scaled["fid"]) / max(wrong["fid"] - floor["fid"], 1e-9)
    fooled = ascent["conditional"] > SEEN and ascent["precision"] < 1 - SEEN
    said = [
        f"""That random latents of a plain autoencoder decode to nothing is {"mostly" if by_scale > 0.5 else "only in part"}
        a matter of scale: FID {wrong["fid"]:.0f} from N(0, I), {scaled["fid"]:.1f} once the draws have the latents' own mean
        and deviation ({scaled["latent_std"]:.1f} instead of 1): {by_scale:.0%} of the way to what its decoder can do
        ({floor["fid"]:.1f}). A density fitted afterwards mends the rest: {fitted["fid"]:.1f}.""",
        f"""The VAE's prior is known before any data is seen, and that is its merit. As a sampler its FID is
        {prior["fid"]:.1f}, the scaled autoencoder's {scaled["fid"]:.1f}, with precision {prior["precision"]:.2f} and
        {scaled["precision"]:.2f}, coverage {prior["coverage"]:.2f} and {scaled["coverage"]:.2f}; the autoencoder with a
        fitted density has {fitted["fid"]:.1f} and {fitted["coverage"]:.2f}.""",
        f"""Ascent from noise (C's confidence {ascent["confidence"]:.2f}, E, which it never saw, sees
        the target in {ascent["conditional"]:.1%}) makes images of which {ascent["precision"]:.1%} lie in the real manifold:
        {"distances and a detector unmask them, a second classifier does not" if fooled else "in this run E is not fooled"}.""",
        f"""The detector calls {box["detector"]:.1%} of a box of the autoencoder's latents digits, and
        {prior["detector"]:.1%} of the VAE's prior, whose precision is {prior["precision"]:.2f} against
        {box["precision"]:.2f}. No single column ranks the arms.""",
        f"""Copies: {nearest_arm(found)} lies nearest to the training images beside held-out ones. Above 0.5 does not yet
        mean copies: smooth images lie nearer to everything.""",
    ]
    return [" ".join(sentence.split()) for sentence in said]


def nearest_arm(found: Mapping[str, Row]) -> str:
    """Return the arm of the highest ``copy`` value, with the value."""
    arm = max((arm for arm in found if "reconstructions" not in arm), key=lambda arm: found[arm]["nearer"])
    return f"{arm} ({found[arm]['nearer']:.2f})"


def page(
    file: Path, rows: Mapping[str, Row], said: Mapping[str, str], pictures: Mapping[str, str], command: str
) -> None:
    """Write the page.

    Args:
        file: Where.
        rows: Rows of all seeds.
        said: A sentence for each arm.
        pictures: File names and captions, the overview and the measures first.
        command: What made it.
    """
    shown = [f"![{caption}]({name})\n\n*{caption}.*" for name, caption in pictures.items()]
    parts = [
        "# Small generative models: why naive generation fails, and what mends it",
        INTRODUCTION,
        shown[0],
        "## What is measured",
        table(rows).markdown(),
        LEGEND,
        shown[1],
        "## What it says",
        "\n".join(f"- {sentence}" for sentence in summary(rows)),
        "## Arm by arm",
        VERDICT,
        "\n".join(f"- **{sentence.replace(': ', ':** ', 1)}" for sentence in said.values()),
        "## Random search as it scales",
        SEARCH,
        search_table(rows).markdown(),
        *shown[2:],
        f"Made by `{command} --page docs/generative.md`.",
    ]
    write_text(file, "\n\n".join(parts) + "\n")

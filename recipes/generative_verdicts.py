"""Why each arm of the recipe ``generative`` fails or works, said from what was measured of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from fnmatch import fnmatchcase

from lightning_peft.recipes.generative_measures import Row

REAL = "real test images"
NEAR = 0.5
"""An arm works where precision, recall and coverage reach this share of the real test images' own."""
FAR = 0.1
"""And fails where precision or coverage is below this share."""


def means(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the mean over seeds of each number of an arm, by arm; over those seeds in which it is one.

    >>> means({"a, seed 0": {"name": "a", "fid": 1.0}, "a, seed 1": {"name": "a", "fid": 3.0}})
    {'a': {'fid': 2.0}}
    """
    found: dict[str, Row] = {}
    for arm, values in by_arm(rows).items():
        found[arm] = {key: statistics.fmean(numbers) if numbers else math.nan for key, numbers in values.items()}
    return found


def by_arm(rows: Mapping[str, Row]) -> dict[str, dict[str, list[float]]]:
    """Return the numbers of all seeds by arm and key."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows.values():
        if "name" in row:
            kept = found.setdefault(row["name"], {})
            for key in row.keys() - {"name", "seed"}:
                kept.setdefault(key, [])
                if math.isfinite(row[key]):
                    kept[key].append(row[key])
    return found


def verdicts(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return a sentence for each arm that makes images."""
    found = means(rows)
    said = {}
    for arm, row in found.items():
        if arm != REAL:
            reason = "Too few were accepted to measure." if math.isnan(row["precision"]) else why(arm, row, found)
            said[arm] = f"{arm}: {judged(row, found[REAL])}. {reason}"
    return said


def judged(row: Row, real: Row) -> str:
    """Return whether an arm works, from its precision, recall and coverage beside those of real images.

    >>> judged({"precision": 0.9, "recall": 0.2, "coverage": 0.7}, {"precision": 1.0, "recall": 1.0, "coverage": 0.8})
    'works in part'
    """
    if math.isnan(row["precision"]):
        return "makes nothing"
    reached = {key: row[key] / max(real[key], 1e-9) for key in ("precision", "recall", "coverage")}
    if min(reached["precision"], reached["coverage"]) < FAR:
        return "fails"
    return "works" if min(reached.values()) >= NEAR else "works in part"


def why(arm: str, row: Row, found: Mapping[str, Row]) -> str:
    """Return the reason, of the arm's family: the first pattern that matches has the sentence."""
    reason = next(text for pattern, text in REASONS if fnmatchcase(arm, pattern))
    floor = found.get(f"{arm.partition(', ')[0]}, reconstructions", {})
    told = reason.format(row=row, real=found[REAL], noise=found["uniform noise"], floor=floor)
    return " ".join(f"{told} {MANIFOLD.format(row=row)}".split())


MANIFOLD = """Precision {row[precision]:.2f}, recall {row[recall]:.2f}, density {row[density]:.2f}, coverage
{row[coverage]:.2f}, FID {row[fid]:.1f}."""
REASONS = (
    (
        "*, C >*",
        """C accepted {row[acceptance]:.2%} of the draws. The detector calls {row[detector]:.1%} of them digits, and the
        nearest training image is {row[nearest]:.2f} away (from held-out ones {real[nearest]:.2f}): C tells digits apart,
        and was never asked whether an image is one.""",
    ),
    (
        "ascent from an image*",
        """The images moved by {row[moved]:.2f} from real ones, and C's confidence in another class is
        {row[confidence]:.2f}; E, which the ascent never saw, sees that class in {row[conditional]:.1%}. The detector
        calls {row[detector]:.1%} of them digits, the nearest training image is {row[nearest]:.2f} away.""",
    ),
    (
        "ascent*",
        """C's confidence is {row[confidence]:.2f}, and E, which the ascent never saw, sees the wanted class in
        {row[conditional]:.1%}. The nearest training image is {row[nearest]:.2f}
        away (noise: {noise[nearest]:.2f}, held-out ones: {real[nearest]:.2f}) and the detector calls {row[detector]:.1%}
        of them digits; noise has a FID of {noise[fid]:.0f}.""",
    ),
    (
        "*, reconstructions",
        """No sampling, but what the decoder can do at best: squared error {row[squared_error]:.4f} a pixel. The detector
        calls {row[detector]:.1%} of these, which are real digits, digits: it rewards sharpness.""",
    ),
    (
        "*AE?, N(0, I)",
        """The training latents have a standard deviation of {row[latent_std]:.2f}, the draws of 1; reconstructions of
        held-out images have a FID of {floor[fid]:.1f}.""",
    ),
    (
        "*AE?, scaled",
        """The draws have the training latents' own mean and deviation ({row[latent_std]:.2f}), and still ignore where
        classes lie; the decoder's limit is a FID of {floor[fid]:.1f}.""",
    ),
    (
        "*AE?, box",
        "A box has corners where no training latent lies; sharp as they are, the detector takes {row[detector]:.1%} for digits.",
    ),
    (
        "*AE?, GMM",
        "A density fitted to the training latents knows their scale and shape; the decoder's limit is a FID of {floor[fid]:.1f}.",
    ),
    (
        "CVAE?, class",
        "E sees the class that was asked for in {row[conditional]:.1%} (of real test images in {real[conditional]:.1%}).",
    ),
    (
        "CVAE?, word",
        """E sees the class of the word in {row[conditional]:.1%}, and still in {row[misspelled]:.1%} where the word's
        second letter is left out, which training never did.""",
    ),
    (
        "CVAE?, *image",
        """E sees the original's class in {row[conditional]:.1%} (of the originals: {real[conditional]:.1%}); the squared
        error to the original is {row[squared_error]:.4f}, that of the training image with the nearest condition
        {row[neighbour_error]:.4f}; two draws lie {row[two_draws]:.2f} apart.""",
    ),
    (
        "GMM on pixels",
        "No network at all; the nearest training image is {row[nearest]:.2f} away.",
    ),
    (
        "*",
        """The nearest training image is {row[nearest]:.2f} away (from held-out ones {real[nearest]:.2f}), the detector
        calls {row[detector]:.1%} of them digits, and yet C's mean confidence is {row[confidence]:.2f}.""",
    ),
)
"""Patterns of arms, and what is said of them; the numbers are filled in as measured."""

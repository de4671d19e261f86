"""How far a Fréchet distance depends on the network whose features it compares: many judges of the same images.

Takes the images that a run of ``lightning-peft generative`` has kept, trains classifiers of different shapes on the same training
images, each as well as the others, and measures every arm with each of them: how far the values lie apart, and whether the arms
keep their order (Spearman's correlation with the run's own evaluator).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

from lightning_peft.files import write_text
from lightning_peft.metrics.frechet_distance import frechet_distance
from lightning_peft.recipes.generative import load
from lightning_peft.recipes.generative_data import read_images
from lightning_peft.recipes.generative_models import Classifier
from lightning_peft.recipes.generative_train import fit
from lightning_peft.reporting import TextTable, write_section

EPOCHS = 30
ARMS = (
    "real test images", "uniform noise", "pixel Gaussian", "ascent from noise", "ascent from an image", "AE8, N(0, I)",
    "AE8, scaled", "AE8, GMM", "AE8, reconstructions", "VAE8, N(0, I)", "VAE8, GMM", "CVAE8, class",
)  # fmt: skip


def convolutions(
    channels: tuple[int, int], kind: type[nn.Module] = nn.ReLU, *, stride: int = 1, pools: int = 1
) -> nn.Sequential:
    """Two convolutions on 8 x 8 pixels and 64 features."""
    a, b = channels
    left = 8 // stride // 2**pools
    first, second = (nn.MaxPool2d(2) if pools > place else nn.Identity() for place in range(2))
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1), kind(), first,
        nn.Conv2d(a, b, 3, stride=stride, padding=1), kind(), second,
        nn.Flatten(), nn.Linear(b * left * left, 64), kind(),
    )  # fmt: skip


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "32, 64, a pool (the recipe's)": lambda: convolutions((32, 64)),
    "16, 32, a pool": lambda: convolutions((16, 32)),
    "32, 64, two pools": lambda: convolutions((32, 64), pools=2),
    "32, 64, a stride": lambda: convolutions((32, 64), stride=2, pools=0),
    "16, 32, a stride": lambda: convolutions((16, 32), stride=2, pools=0),
    "32, 64, a pool, GELU": lambda: convolutions((32, 64), nn.GELU),
    "16, 32, a pool, GELU": lambda: convolutions((16, 32), nn.GELU),
}


class Judge(Classifier):
    """A classifier of another shape, at a falling or at a constant rate."""

    def __init__(self, features: nn.Module, classes: int, *, constant: bool) -> None:
        super().__init__(classes)
        self.features, self.constant = features, constant

    def configure_optimizers(self):
        """AdamW, as the recipe's own, or Adam."""
        return torch.optim.Adam(self.parameters(), self.rate) if self.constant else super().configure_optimizers()


def measured(run: Path, seed: int) -> dict[str, dict[str, float]]:
    """Return accuracy and distances of every arm by judge."""
    images = read_images("digits", seed, most=2000)
    samples = {name: load(run, name, seed) for name in ARMS}
    found = {}
    for (name, build), constant in tqdm(list(itertools.product(SHAPES.items(), (False, True))), desc=f"seed {seed}"):
        pl.seed_everything(77 + seed, verbose=False)
        judge = fit(Judge(build(), images.classes, constant=constant), (images.train, images.labels), EPOCHS, out=run)
        accuracy = float((judge(images.test).argmax(1) == images.test_labels).float().mean())
        distances = {arm: frechet_distance(judge.features, images.train, one) for arm, one in samples.items()}
        found[f"{name}, {'constant' if constant else 'falling'} rate"] = {"accuracy": accuracy, **distances}
    return found


def tables(seeds: list[dict[str, dict[str, float]]]) -> list[TextTable]:
    """Return distances of every arm, means over seeds: the recipe's network beside all; and what each network is like."""
    means = {
        judge: {key: statistics.fmean(found[judge][key] for found in seeds) for key in first}
        for judge, first in seeds[0].items()
    }
    usual = next(iter(means.values()))
    arms, judges = [], []
    for arm in ARMS:
        values = sorted(row[arm] for row in means.values())
        shown = (usual[arm], values[0], statistics.median(values), values[-1])
        arms.append([arm, *(f"{value:.1f}" for value in shown)])
    for judge, row in means.items():
        order = spearmanr([row[arm] for arm in ARMS], [usual[arm] for arm in ARMS]).statistic
        judges.append(
            [judge, f"{row['accuracy']:.3f}", f"{row['AE8, N(0, I)'] / row['AE8, scaled']:.1f}", f"{order:.2f}"]
        )
    return [
        TextTable(
            f"Fréchet distance to the training images by {len(means)} networks, means over {len(seeds)} seeds",
            ["arm", "the recipe's network", "least", "median", "most"],
            arms,
        ),
        TextTable(
            "The networks: accuracy, how many times as far N(0, I) is as scaled latents, the order of the arms",
            ["network", "accuracy", "N(0, I) / scaled", "Spearman's correlation"],
            judges,
        ),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/generative"), help="folder of a run of the recipe, on digits"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds that the run has (3)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/evaluators.json"))
    parser.add_argument("--page", type=Path, help="a page to write the table into")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # dozens of trainers greet
    seeds = [measured(options.run, seed) for seed in range(options.seeds)]
    found = tables(seeds)
    for one in found:
        one.show()
    write_text(options.results, json.dumps(seeds, indent=1) + "\n")
    if options.page:
        about = (
            "## The scale of a Fréchet distance is its network's\n\nThe same images of the recipe `generative`, judged by "
            f"classifiers of 64 features and two convolutions, {EPOCHS} epochs each. Only values of one network can be compared, "
            "never with another project's; ratios and the order of the arms (correlation with the recipe's network) travel better."
        )
        made = (
            "Made by `lightning-peft generative --seeds 3` and then "
            "`python benchmarks/evaluators.py --page docs/generation_metrics.md`."
        )
        text = "\n\n".join([about, *(one.markdown() for one in found), made])
        write_section(options.page, "evaluators", text, heading="Metrics of generated samples")


if __name__ == "__main__":
    main()

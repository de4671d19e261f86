"""Sine waves from ten points: a network that was meta-learned, one that was trained on all waves, one that knows a single wave.

The tasks are those of Finn et al. 2017 (arXiv:1703.03400, section 5.1): ``y = A sin(x - phase)``, mean squared error, an MLP
1-40-40-1, one inner step of rate 0.01 in training and up to ten in test. All arms are tested by gradient steps on the same ten
points of the same unseen waves; the baselines' rate is chosen on other waves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft import FOMAMLMixin, MAMLMixin, MetaConfig
from lightning_peft.data import Sinusoids
from lightning_peft.meta import AdaptationCurve, Episode
from lightning_peft.meta.adaptation_curve import curve_figure
from lightning_peft.recipes.maml_page import (
    HEADING,
    Facts,
    adaptation,
    pooled,
    quiet,
    save_picture,
    seeds_told,
    tables,
    told,
    trainer,
)
from lightning_peft.recipes.maml_record import Record
from lightning_peft.reporting import write_section

__all__ = ["SineRun", "main", "run"]

RATES = (0.001, 0.003, 0.01, 0.03)
SHOWN = (0, 1, 2, 5, 10)
SPECIALITY = (2.0, 1.0)
"""Amplitude and phase of the one wave that the specialist knows."""


@dataclass
class SineRun:
    """Learn to learn sine waves from ten points.

    Args:
        arms: Which of maml, fomaml, joint, specialist.
        steps: Meta-steps; the baselines take as many ordinary ones.
        meta_batch: Waves of a meta-step.
        shots: Support points of a wave.
        test_tasks: Unseen waves.
        seeds: Runs, from seed 0 on; weights and waves differ.
        quick: 2,000 steps.
        resume: Go on with the killed run in this folder; arms and seeds may be added.
        accelerator: Any Lightning accelerator.
        out: Folder for results, logs and pictures.
        page: A page to write the tables into; unset, maml.md in the folder.
    """

    arms: tuple[str, ...] = ("maml", "fomaml", "joint", "specialist")
    steps: int = 16_000
    meta_batch: int = 25
    shots: int = 10
    test_tasks: int = 1000
    seeds: int = 1
    quick: bool = False
    resume: bool = False
    accelerator: str = "cpu"
    out: str = "runs/maml_sinusoid"
    page: str | None = None


class SineNet(pl.LightningModule):
    """The network of the paper; weights begin with a truncated normal of variance 1 / inputs, biases with 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.log("learn/loss", loss)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class MAMLSine(MAMLMixin, SineNet):
    """Meta-learned."""


class FOMAMLSine(FOMAMLMixin, SineNet):
    """Meta-learned without second derivatives."""


class Together:
    """The points of all waves of a meta-step as one batch, so that a network sees them jointly."""

    def __init__(self, episodes: DataLoader[Any]) -> None:
        self.episodes = episodes

    def __iter__(self) -> Iterator[list[Tensor]]:
        for episode in self.episodes:
            yield [torch.cat(sides, 1).flatten(0, 1) for sides in zip(episode.support, episode.query, strict=True)]

    def __len__(self) -> int:
        return len(self.episodes)


def one_wave(steps: int, generator: torch.Generator) -> DataLoader[Any]:
    """Return batches of points of the specialist's wave."""
    amplitude, phase = SPECIALITY
    x = 10 * torch.rand(500 * min(steps, 200), 1, generator=generator) - 5
    return DataLoader(torch.utils.data.TensorDataset(x, amplitude * torch.sin(x - phase)), 500)


def train(arm: str, options: SineRun, seed: int, record: Record) -> tuple[SineNet, float]:
    """Train one arm; return it and the seconds that it took."""
    pl.seed_everything(seed, verbose=False)
    config = MetaConfig(inner_lr=0.01)
    kinds: dict[str, Callable[[], SineNet]] = {
        "maml": lambda: MAMLSine(meta=config),
        "fomaml": lambda: FOMAMLSine(meta=config),
    }
    module, name = kinds.get(arm, SineNet)(), f"{arm}-{seed}"
    episodes: Any = Sinusoids(options.shots).loader(options.steps * options.meta_batch, options.meta_batch, seed=seed)
    if arm == "joint":
        episodes = Together(episodes)
    elif arm == "specialist":
        episodes = one_wave(options.steps, torch.Generator().manual_seed(seed))
    made = trainer(Path(options.out), name, options.steps, episodes, accelerator=options.accelerator)
    return module, record.trained(name, module, lambda: made.fit(module, episodes))


def tested(network: SineNet, options: SineRun, rate: float, *, seed: int, tasks: int) -> AdaptationCurve:
    """Return how a network adapts to unseen waves, by up to ten steps; the error is on 100 points."""
    module = MAMLSine(meta=MetaConfig(inner_lr=rate, eval_adaptation_steps=10))
    module.net.load_state_dict(network.net.state_dict())
    return adaptation(module, Sinusoids(options.shots, 100).loader(tasks, min(tasks, 250), seed=seed, fixed=True))


def chosen_rate(network: SineNet, options: SineRun) -> float:
    """Return the rate with the least error after ten steps on 200 waves that are not the test's."""

    def after_ten(rate: float) -> float:
        error = tested(network, options, rate, seed=20_000, tasks=200).means("loss")[-1]
        return error if math.isfinite(error) else math.inf

    return min(RATES, key=after_ten)


def run(options: SineRun) -> dict[str, list[AdaptationCurve]]:
    """Train all arms, test them and write tables and pictures; return the curves of each seed."""
    if options.quick:
        options.steps = min(options.steps, 2000)
    record = Record("maml_sinusoid", Path(options.out), options)
    networks: dict[str, SineNet] = {}
    for seed, arm in itertools.product(range(options.seeds), options.arms):
        network, seconds = train(arm, options, seed, record)
        networks.setdefault(arm, network)
        if not record.has(f"{arm}-{seed}"):
            rate = 0.01 if isinstance(network, MAMLMixin) else chosen_rate(network, options)
            curve = tested(network, options, rate, seed=10_000 + seed, tasks=options.test_tasks)
            record.add(f"{arm}-{seed}", curve, {"seconds": seconds, "rate": rate})
    curves, facts = record.by_arm(options.arms, options.seeds)
    report(options, networks, curves, facts)
    return curves


def report(
    options: SineRun,
    networks: dict[str, SineNet],
    curves: dict[str, list[AdaptationCurve]],
    facts: dict[str, list[Facts]],
) -> None:
    """Print the tables, and write page and pictures, of the first seed's networks."""
    out = Path(options.out)
    page = Path(options.page) if options.page else out / "maml.md"
    found = tables("Squared error on unseen waves: mean ± 95 % over tasks (median)", curves, "loss", SHOWN)
    for one in found:
        one.show()
    lines = [
        "## Sine waves from ten points",
        f"{options.steps:,} steps of {options.meta_batch} waves, {options.shots} points, {seeds_told(options.seeds)}. "
        f"Trained and tested: {told(facts)}",
        *(one.markdown() for one in found),
    ]
    if "specialist" in networks:
        own = torch.linspace(-5, 5, 500)[:, None]
        amplitude, phase = SPECIALITY
        with torch.no_grad():
            error = float(F.mse_loss(networks["specialist"](own), amplitude * torch.sin(own - phase)))
        lines.append(f"On its own wave the specialist's error is {error:.2g}; on unseen ones it is in the table.")
    save_picture(
        page.with_name("maml_sinusoid.png"),
        curve_figure({arm: pooled(seeds) for arm, seeds in curves.items()}, log_loss=True),
        out,
        "meta/adaptation",
    )
    save_picture(page.with_name("maml_sinusoid_fits.png"), fits(networks, facts, options), out, "meta/fits")
    lines += [
        "![error against steps](maml_sinusoid.png)",
        "![fits of one wave after 0, 1, 5 and 10 steps](maml_sinusoid_fits.png)",
        f"Made by `lightning-peft maml_sinusoid --seeds {options.seeds} --page docs/meta-learning.md`.",
    ]
    write_section(page, "maml_sinusoid", "\n\n".join(lines), heading=HEADING)
    print(f"Page      {page}\nCurves    tensorboard --logdir {out / 'logs'}")


def fits(networks: dict[str, SineNet], facts: dict[str, list[Facts]], options: SineRun) -> Figure:
    """Draw one unseen wave and what each arm makes of its ten points, after 0, 1, 5 and 10 steps."""
    amplitude, phase = 3.0, 2.0
    x = torch.linspace(-5, 5, 200)[:, None]
    support = 10 * torch.rand(options.shots, 1, generator=torch.Generator().manual_seed(7)) - 5
    episode: Episode = Episode((support, amplitude * torch.sin(support - phase)), None)
    figure = Figure(figsize=(3.2 * len(networks), 3), layout="constrained")
    for place, (arm, network) in enumerate(networks.items()):
        axes = figure.add_subplot(1, len(networks), place + 1)
        axes.plot(x, amplitude * torch.sin(x - phase), "k--", linewidth=1, label="wave")
        axes.plot(*(side.flatten() for side in episode.support), "k^", markersize=4)
        module = MAMLSine(meta=MetaConfig(inner_lr=facts[arm][0]["rate"]))
        module.net.load_state_dict(network.net.state_dict())
        for steps in (0, 1, 5, 10):
            with module.with_fast_weights(module.adapt(episode.support, steps)), torch.no_grad():
                axes.plot(x, module(x), label=f"{steps} steps")
        axes.set_title(arm)
        axes.set_ylim(-6, 6)
        if not place:
            axes.legend(fontsize=7)
    return figure


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft maml_sinusoid", description=(SineRun.__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(SineRun.arms), default=list(SineRun.arms), help="which arms")
    parser.add_argument("--quick", action="store_true", help="2,000 steps")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the killed run in --out; arms and seeds may be added"
    )
    parser.add_class_arguments(SineRun, skip={"arms", "quick", "resume"})
    quiet()
    found = parser.parse_args(args).as_dict()
    run(SineRun(**found | {"arms": tuple(found["arms"])}))


if __name__ == "__main__":
    main()

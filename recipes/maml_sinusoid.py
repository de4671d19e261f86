"""Sine waves from ten points: a network that was meta-learned, one that was trained on all waves, one that knows a single wave.

The tasks are those of Finn et al. 2017 (arXiv:1703.03400, section 5.1): ``y = A sin(x - phase)``, mean squared error, an MLP
1-40-40-1, one inner step of rate 0.01 in training and up to ten in test. All arms are tested by gradient steps on the same ten
points of the same unseen waves; the baselines' rate is chosen on other waves.
"""

from __future__ import annotations

import math
import time
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
from lightning_peft.recipes.maml_page import HEADING, adaptation, quiet, save, save_picture, table, trainer
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
        seed: Of weights and waves.
        quick: 2,000 steps.
        accelerator: Any Lightning accelerator.
        out: Folder for results, logs and pictures.
        page: A page to write the tables into; unset, maml.md in the folder.
    """

    arms: tuple[str, ...] = ("maml", "fomaml", "joint", "specialist")
    steps: int = 16_000
    meta_batch: int = 25
    shots: int = 10
    test_tasks: int = 1000
    seed: int = 0
    quick: bool = False
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


def train(arm: str, options: SineRun) -> tuple[SineNet, float]:
    """Train one arm; return it and the seconds that it took."""
    pl.seed_everything(options.seed, verbose=False)
    config = MetaConfig(inner_lr=0.01)
    kinds: dict[str, Callable[[], SineNet]] = {
        "maml": lambda: MAMLSine(meta=config),
        "fomaml": lambda: FOMAMLSine(meta=config),
    }
    module = kinds.get(arm, SineNet)()
    episodes: Any = Sinusoids(options.shots).loader(
        options.steps * options.meta_batch, options.meta_batch, seed=options.seed
    )
    if arm == "joint":
        episodes = Together(episodes)
    elif arm == "specialist":
        episodes = one_wave(options.steps, torch.Generator().manual_seed(options.seed))
    made = trainer(Path(options.out), arm, options.steps, episodes, accelerator=options.accelerator)
    start = time.perf_counter()
    made.fit(module, episodes)
    return module, time.perf_counter() - start


def tested(network: SineNet, options: SineRun, rate: float, *, seed: int, tasks: int) -> AdaptationCurve:
    """Return how a network adapts to unseen waves, by up to ten steps; the error is on 100 points."""
    module = MAMLSine(meta=MetaConfig(inner_lr=rate, eval_adaptation_steps=10))
    module.net.load_state_dict(network.net.state_dict())
    return adaptation(module, Sinusoids(options.shots, 100).loader(tasks, min(tasks, 250), seed=seed, fixed=True))


def chosen_rate(network: SineNet, options: SineRun) -> float:
    """Return the rate with the least error after ten steps on 200 waves that are not the test's."""

    def after_ten(rate: float) -> float:
        error = tested(network, options, rate, seed=10_001, tasks=200).means("loss")[-1]
        return error if math.isfinite(error) else math.inf

    return min(RATES, key=after_ten)


def run(options: SineRun) -> dict[str, AdaptationCurve]:
    """Train all arms, test them and write tables and pictures; return the curves."""
    if options.quick:
        options.steps = min(options.steps, 2000)
    out = Path(options.out)
    networks, curves, more = {}, {}, {}
    for arm in options.arms:
        networks[arm], seconds = train(arm, options)
        rate = 0.01 if isinstance(networks[arm], MAMLMixin) else chosen_rate(networks[arm], options)
        curves[arm] = tested(networks[arm], options, rate, seed=10_000, tasks=options.test_tasks)
        more[arm] = {"seconds": seconds, "rate": rate}
    save(out, curves, options, more)
    report(options, networks, curves, more)
    return curves


def report(
    options: SineRun, networks: dict[str, SineNet], curves: dict[str, AdaptationCurve], more: dict[str, Any]
) -> None:
    """Print the table, and write page and pictures."""
    out = Path(options.out)
    page = Path(options.page) if options.page else out / "maml.md"
    found = table("Squared error on unseen waves: mean ± 95 % over tasks (median)", curves, "loss", SHOWN)
    found.show()
    took = "; ".join(f"{arm}: {one['seconds']:.0f} s, rate in test {one['rate']:g}" for arm, one in more.items())
    lines = [
        "## Sine waves from ten points",
        f"{options.steps:,} steps of {options.meta_batch} waves, {options.shots} points, seed {options.seed}. {took}.",
        found.markdown(),
    ]
    if "specialist" in networks:
        own = torch.linspace(-5, 5, 500)[:, None]
        amplitude, phase = SPECIALITY
        with torch.no_grad():
            error = float(F.mse_loss(networks["specialist"](own), amplitude * torch.sin(own - phase)))
        lines.append(f"On its own wave the specialist's error is {error:.2g}; on unseen ones it is in the table.")
    save_picture(page.with_name("maml_sinusoid.png"), curve_figure(curves, log_loss=True), out, "meta/adaptation")
    save_picture(page.with_name("maml_sinusoid_fits.png"), fits(networks, more, options), out, "meta/fits")
    lines += [
        "![error against steps](maml_sinusoid.png)",
        "![fits of one wave after 0, 1, 5 and 10 steps](maml_sinusoid_fits.png)",
        "Made by `lightning-peft maml_sinusoid --page docs/meta-learning.md`.",
    ]
    write_section(page, "maml_sinusoid", "\n\n".join(lines), heading=HEADING)
    print(f"Page      {page}\nCurves    tensorboard --logdir {out / 'logs'}")


def fits(networks: dict[str, SineNet], more: dict[str, Any], options: SineRun) -> Figure:
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
        module = MAMLSine(meta=MetaConfig(inner_lr=more[arm]["rate"]))
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
    parser.add_class_arguments(SineRun, skip={"arms", "quick"})
    quiet()
    found = parser.parse_args(args).as_dict()
    run(SineRun(**found | {"arms": tuple(found["arms"])}))


if __name__ == "__main__":
    main()

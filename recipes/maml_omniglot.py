"""Characters of unseen alphabets from one drawing each: MAML, ANIL, first-order MAML and Reptile beside plain ways.

Omniglot's small background sets, split by alphabet, 5-way 1-shot. Four convolutions with batch normalisation on batch statistics,
as in Finn et al. 2017 (arXiv:1703.03400): the query rows of a task see each other, so all accuracies are transductive. Every arm is
tested by gradient steps on the same drawings of the same unseen characters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_peft import ANILMixin, FOMAMLMixin, MAMLMixin, MetaConfig, ReptileMixin
from lightning_peft.data import EpisodicDataModule
from lightning_peft.data.omniglot import Omniglot
from lightning_peft.meta import AdaptationCurve
from lightning_peft.meta.adaptation_curve import curve_figure, interval
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
from lightning_peft.reporting import TextTable, write_section

__all__ = ["CharacterRun", "main", "run"]

VALIDATION, TEST = ("Balinese",), ("Early_Aramaic", "Tagalog")
ARMS = ("maml", "anil", "fomaml", "reptile", "joint", "specialist", "scratch")
META = ("maml", "anil", "fomaml", "reptile")
RATES = (0.01, 0.03, 0.1, 0.3)
SHOWN = (0, 1, 3, 5, 10)


@dataclass
class CharacterRun:
    """Learn to tell five unseen characters apart from one drawing each.

    Args:
        data_dir: Folder with Omniglot's archives or drawings.
        arms: Which of maml, anil, fomaml, reptile, joint, specialist, scratch.
        steps: Meta-steps; joint and specialist take as many ordinary ones.
        meta_batch: Tasks of a meta-step.
        filters: Channels of each convolution; the paper has 64.
        test_tasks: Tasks from unseen alphabets.
        seeds: Runs, from seed 0 on; weights and episodes differ.
        quick: Few steps, and no verdict worth the name.
        resume: Go on with the killed run in this folder; arms and seeds may be added.
        accelerator: Any Lightning accelerator.
        out: Folder for results, logs and pictures.
        page: A page to write the tables into; unset, maml.md in the folder.
    """

    data_dir: str = ""
    arms: tuple[str, ...] = ARMS
    steps: int = 600
    meta_batch: int = 16
    filters: int = 32
    test_tasks: int = 300
    seeds: int = 1
    quick: bool = False
    resume: bool = False
    accelerator: str = "cpu"
    out: str = "runs/maml_omniglot"
    page: str | None = None


class CharacterNet(pl.LightningModule):
    """Four strided convolutions and a linear head."""

    def __init__(self, filters: int = 32, classes: int = 5) -> None:
        super().__init__()
        blocks = []
        for inputs in (1, filters, filters, filters):
            norm = nn.BatchNorm2d(filters, track_running_stats=False)
            blocks += [nn.Conv2d(inputs, filters, 3, stride=2, padding=1), norm, nn.ReLU()]
        self.body = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(4 * filters, classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("learn/loss", loss)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class MAMLNet(MAMLMixin, CharacterNet):
    """All weights adapt."""


class ANILNet(ANILMixin, CharacterNet):
    """The head adapts."""


class FOMAMLNet(FOMAMLMixin, CharacterNet):
    """No second derivatives."""


class ReptileNet(ReptileMixin, CharacterNet):
    """Moves to where tasks lead."""


SETTINGS: dict[str, tuple[Callable[..., CharacterNet], dict[str, Any]]] = {
    "maml": (MAMLNet, {"inner_lr": 0.4}),
    "anil": (ANILNet, {"inner_lr": 0.4}),
    "fomaml": (FOMAMLNet, {"inner_lr": 0.4}),
    "reptile": (ReptileNet, {"inner_lr": 0.1, "adaptation_steps": 5}),
}


def train(
    arm: str, options: CharacterRun, seed: int, characters: dict[str, Omniglot], record: Record
) -> tuple[CharacterNet, float]:
    """Train an arm; return the network and the seconds that it took."""
    pl.seed_everything(seed, verbose=False)
    rows = characters["train"]
    loader: Any
    if arm in META:
        kind, config = SETTINGS[arm]
        network = kind(options.filters, meta=MetaConfig(**config))
        # Reptile has no query set: its support set takes more drawings in training, as in the paper.
        shots, queries = (10, 1) if arm == "reptile" else (1, 15)
        loader = EpisodicDataModule(
            rows,
            k_shot=shots,
            n_query=queries,
            meta_batch=options.meta_batch,
            episodes=options.steps * options.meta_batch,
            seed=seed,
        ).train_dataloader()
    else:
        classes = sorted(set(rows.labels))
        chosen = classes[::-1][:5] if arm == "specialist" else classes
        network = CharacterNet(options.filters, len(chosen))
        loader = plain(rows, chosen, options, seed)

    def fit() -> None:
        if arm != "scratch":
            made = trainer(Path(options.out), f"{arm}-{seed}", options.steps, loader, accelerator=options.accelerator)
            made.fit(network, loader)

    return network, record.trained(f"{arm}-{seed}", network, fit)


def plain(rows: Omniglot, classes: list[str], options: CharacterRun, seed: int) -> DataLoader[Any]:
    """Return batches of some classes, as many drawings to a step as a meta-step of MAML sees."""
    numbers = {label: number for number, label in enumerate(classes)}
    kept = [row for row, label in enumerate(rows.labels) if label in numbers]
    targets = torch.tensor([numbers[rows.labels[row]] for row in kept])
    generator = torch.Generator().manual_seed(seed)
    size = min(5 * 16 * options.meta_batch // 4, len(kept))
    return DataLoader(TensorDataset(rows.images[kept], targets), size, shuffle=True, generator=generator)


def tested(network: CharacterNet, arm: str, rate: float, episodes: Any, filters: int) -> AdaptationCurve:
    """Return how a network adapts; a head for other classes than five begins at zero."""
    module = MAMLNet(
        filters, meta=MetaConfig(inner_lr=rate, eval_adaptation_steps=10, adapt="head" if arm == "anil" else "all")
    )
    module.body.load_state_dict(network.body.state_dict())
    if arm in META:
        module.head.load_state_dict(network.head.state_dict())
    else:
        nn.init.zeros_(module.head.weight)
        nn.init.zeros_(module.head.bias)
    return adaptation(module, episodes)


@torch.no_grad()
def by_centroid(features: Callable[[Tensor], Tensor], episodes: Any) -> list[float]:
    """Return the accuracy of each task by the nearest class mean of the support set's features."""
    found = []
    for episode in episodes:
        for (x, y), (queries, classes) in zip(
            zip(*episode.support, strict=True), zip(*episode.query, strict=True), strict=True
        ):
            support, query = F.normalize(features(x), dim=1), F.normalize(features(queries), dim=1)
            centres = torch.stack([support[y == label].mean(0) for label in y.unique()])
            found.append(float(((query @ centres.T).argmax(1) == classes).float().mean()))
    return found


def run(options: CharacterRun) -> dict[str, list[AdaptationCurve]]:
    """Train all arms, test them and write table and picture; return the curves of each seed."""
    if not options.data_dir:
        raise ValueError(
            "maml_omniglot: --data-dir is needed: a folder with images_background_small1.zip and ...2.zip."
        )
    if options.quick:
        options.steps, options.test_tasks = min(options.steps, 20), min(options.test_tasks, 60)
    everything = set(Omniglot(options.data_dir).alphabets)
    split = {"train": everything - {*VALIDATION, *TEST}, "validation": set(VALIDATION), "test": set(TEST)}
    characters = {
        name: Omniglot(options.data_dir, alphabets, rotations=4 if name == "train" else 1)
        for name, alphabets in split.items()
    }
    record = Record("maml_omniglot", Path(options.out), options)
    nearest: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        networks = one_seed(options, seed, characters, record)
        test = episodes(characters, seed, n_query=10, tasks=options.test_tasks).test_dataloader()
        for name, found in centroids(networks, test).items():
            nearest.setdefault(name, []).extend(found)
    curves, facts = record.by_arm(options.arms, options.seeds)
    report(options, (curves, facts), nearest, characters)
    return curves


def episodes(characters: dict[str, Omniglot], seed: int, *, n_query: int, tasks: int) -> EpisodicDataModule:
    """Return fixed tasks of unseen characters."""
    return EpisodicDataModule(*characters.values(), n_query=n_query, meta_batch=4, eval_episodes=tasks, seed=seed)


def one_seed(
    options: CharacterRun, seed: int, characters: dict[str, Omniglot], record: Record
) -> dict[str, CharacterNet]:
    """Train and test the arms of a seed; return their networks."""
    few = episodes(characters, seed, n_query=5, tasks=24)
    networks = {}
    for arm in options.arms:
        networks[arm], seconds = train(arm, options, seed, characters, record)
        if record.has(f"{arm}-{seed}"):
            continue

        def after(rate: float, arm: str = arm) -> float:
            return max(tested(networks[arm], arm, rate, few.val_dataloader(), options.filters).means("accuracy")[1:])

        rate = max((SETTINGS[arm][1]["inner_lr"], 0.1) if arm in META else RATES, key=after)
        test = episodes(characters, seed, n_query=10, tasks=options.test_tasks).test_dataloader()
        curve = tested(networks[arm], arm, rate, test, options.filters)
        record.add(f"{arm}-{seed}", curve, {"seconds": seconds, "rate": rate})
    return networks


def centroids(networks: dict[str, CharacterNet], test: Any) -> dict[str, list[float]]:
    """Return accuracies of nearest centroids, by what they measure distances in."""
    found = {"pixels": by_centroid(lambda images: images.flatten(1), test)}
    for arm in ("joint", "scratch"):
        if arm in networks:
            found[f"features of {arm}"] = by_centroid(networks[arm].eval().body, test)
    return found


def report(
    options: CharacterRun,
    measured: tuple[dict[str, list[AdaptationCurve]], dict[str, list[Facts]]],
    nearest: dict[str, list[float]],
    characters: dict[str, Omniglot],
) -> None:
    """Print the tables, and write page and picture."""
    out = Path(options.out)
    page = Path(options.page) if options.page else out / "maml.md"
    curves, facts = measured
    found = tables("Accuracy on unseen alphabets: mean ± 95 % over tasks (median)", curves, "accuracy", SHOWN)
    centres = TextTable(
        "Nearest centroid, without any step",
        ["in", "tasks", "accuracy"],
        [(name, str(len(v)), f"{sum(v) / len(v):.3f} ± {interval(v):.3f}") for name, v in nearest.items()],
    )
    for one in (*found, centres):
        one.show()
    counts = ", ".join(f"{name} {len(set(rows.labels))}" for name, rows in characters.items())
    lines = [
        "## Characters from one drawing",
        f"5-way 1-shot, {options.steps} steps of {options.meta_batch} tasks, {options.filters} filters, "
        f"{seeds_told(options.seeds)}; classes: {counts} (training ones turned by 90 degrees count apart). Rates are chosen on "
        "the validation alphabet. "
        f"Batch statistics, so transductive. {told(facts)}",
        *(one.markdown() for one in (*found, centres)),
        "![accuracy against steps](maml_omniglot.png)",
        f"Made by `lightning-peft maml_omniglot --data-dir DIR --steps {options.steps} --test_tasks {options.test_tasks} "
        f"--seeds {options.seeds} --page docs/meta-learning.md`.",
    ]
    save_picture(
        page.with_name("maml_omniglot.png"),
        curve_figure({arm: pooled(seeds) for arm, seeds in curves.items()}),
        out,
        "meta/adaptation",
    )
    write_section(page, "maml_omniglot", "\n\n".join(lines), heading=HEADING)
    print(f"Page      {page}\nCurves    tensorboard --logdir {out / 'logs'}")


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft maml_omniglot", description=(CharacterRun.__doc__ or "").splitlines()[0])
    parser.add_argument("--data_dir", "--data-dir", required=True, help="folder with Omniglot's archives or drawings")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the killed run in --out; arms and seeds may be added"
    )
    parser.add_class_arguments(CharacterRun, skip={"arms", "quick", "resume", "data_dir"})
    quiet()
    found = parser.parse_args(args).as_dict()
    run(CharacterRun(**found | {"arms": tuple(found["arms"])}))


if __name__ == "__main__":
    main()

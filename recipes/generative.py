"""Does "sample something, ask a classifier" generate data? Naive ways, why they fail in numbers, and what mends them.

Images are made by random search, by gradient ascent on the input, from random latents of an autoencoder, and then from latents of
the right scale, from a density fitted afterwards, from a VAE's prior, and under conditions: a class, half an image, a blurred
one, a word. Two classifiers, a detector, and metrics of the manifold judge them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tqdm.auto import tqdm

from lightning_peft.files import write_atomic
from lightning_peft.recipes.generative_arms import Bench, arms, make
from lightning_peft.recipes.generative_data import Images, read_images
from lightning_peft.recipes.generative_measures import Row, measured
from lightning_peft.recipes.generative_models import Classifier
from lightning_peft.recipes.generative_naive import random_search
from lightning_peft.recipes.generative_page import page, summary, table
from lightning_peft.recipes.generative_panels import Gallery
from lightning_peft.recipes.generative_pictures import draw
from lightning_peft.recipes.generative_train import fit, plans, train
from lightning_peft.recipes.generative_verdicts import verdicts
from lightning_peft.reporting import finished_rows, save_results

__all__ = ["Generative", "main", "run"]

SIDES = (8, 14, 28)
SEARCH_EPOCHS = 1 / 6
"""A classifier of another size trains for this share of the epochs of a generator."""


@dataclass
class Generative:
    """Make images in naive ways, see in numbers why they fail, and mend them: small generative models on digits.

    Args:
        data: digits (scikit-learn's, 8 x 8 pixels), a folder of IDX files as MNIST's (plain or .gz), or an .npz file with x_train,
            y_train, x_test, y_test or with images and labels.
        seeds: Runs, from seed 0 on; a seed also chooses what is held out.
        epochs: Of each generative model; what judges trains for a quarter of them.
        samples: Images of every arm; unset, as many as there are held-out ones, and arms made of those never have more.
        rows: Most training images, and most held-out ones.
        draws: Random images of the search at each size; a filter draws at most 20 times as many.
        quick: One seed, 10 epochs, 2,000 draws, 200 samples: to see that it runs.
        out: Folder for results, networks, logs and pictures.
        page: The page; its pictures lie beside it. Unset, generative.md in the folder.
        resume: Go on with the killed run in this folder.
    """

    data: str = "digits"
    seeds: int = 1
    epochs: int = 120
    samples: int | None = None
    rows: int = 2000
    draws: int = 20_000
    quick: bool = False
    out: str = "runs/generative"
    page: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be known before anything is read.

        Raises:
            ValueError: For counts that are too small.
        """
        if self.quick:
            self.seeds, self.epochs, self.draws = 1, min(self.epochs, 10), min(self.draws, 2000)
            self.samples = min(self.samples or 200, 200)
        least = {"seeds": 1, "epochs": 1, "rows": 100, "draws": 2000, "samples": 20}
        found = {name: getattr(self, name) for name in least}
        wrong = {name: value for name, value in found.items() if value is not None and value < least[name]}
        if wrong:
            raise ValueError(
                f"generative: {wrong!r} are too small; the least are { {name: least[name] for name in wrong} }."
            )


def run(options: Generative) -> dict[str, Row]:
    """Run all seeds; print the table and what it says, write results, page and pictures; return the rows by name."""
    out = Path(options.out)
    about = {
        name: value
        for name, value in asdict(options).items()
        if name not in {"seeds", "out", "page", "resume", "quick"}
    }
    if not options.resume:
        forget(out)
    rows = finished_rows(out, about, owner="generative") if options.resume else {}
    save_results(out, rows, about)  # before any network is kept, so that a resumed run knows whose they are
    first: Bench | None = None
    for seed in range(options.seeds):
        images = read_images(options.data, seed, most=options.rows)
        bench = one_seed(images, seed, options, rows, about)
        first = first or bench
    assert first is not None  # there is at least one seed
    written = Path(options.page) if options.page else out / "generative.md"
    samples = {name: load(out, name, 0) for name in arms(first.images)}
    pictures = draw(Gallery(first, samples, rows, written, out))
    said = verdicts(rows)
    page(written, rows, said, pictures, command(options))
    table(rows).show()
    for sentence in (*said.values(), *summary(rows)):
        print(sentence)
    print(
        f"Results   {out}/results.json, results.csv\nPage      {written}\nPictures  {written.with_name('generative_*.png')}"
    )
    print(f"Curves    tensorboard --logdir {out}/logs")
    return rows


def one_seed(images: Images, seed: int, options: Generative, rows: dict[str, Row], about: Mapping[str, Any]) -> Bench:
    """Train the networks of a seed and run its arms, but for what is finished; files are whole after each of them."""
    out, names = Path(options.out), list(arms(images))
    total = len(plans(images, Classifier)) + len(SIDES) + len(names)
    with tqdm(total=total, desc="generative", unit="part") as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        nets = train(images, seed, options.epochs, out, tick=tick)
        bench = Bench(images, nets, options.samples or len(images.test), seed, 20 * options.draws)
        for side in SIDES:
            if (key := f"search {side} px, seed {seed}") not in rows:
                rows[key] = searched(images.resized(side), bench, options)
                save_results(out, rows, about)
            tick(f"seed {seed}: search at {side} pixels")
        for name in names:
            if (key := f"{name}, seed {seed}") not in rows:
                made = make(name, bench)
                file = sample_file(out, name, seed)
                write_atomic(file, partial(torch.save, made.images))
                rows[key] = {"name": name, "seed": seed, **measured(made, bench)}
                save_results(out, rows, about)
            tick(f"seed {seed}: {name}")
    return bench


def searched(images: Images, bench: Bench, options: Generative) -> Row:
    """Search at random at one size, with a classifier of that size."""
    pl.seed_everything(100 + bench.seed, verbose=False)
    if images.side == bench.images.side:
        classifier = bench.nets["classifier"]
    else:
        net = Classifier(images.classes, images.side)
        epochs = max(1, round(SEARCH_EPOCHS * options.epochs))
        classifier = fit(net, (images.train, images.labels), epochs, out=Path(options.out))
    accuracy = float((classifier(images.test).argmax(1) == images.test_labels).float().mean())
    return {"seed": bench.seed, "accuracy": accuracy, **random_search(images, classifier, draws=options.draws)}


def sample_file(out: Path, name: str, seed: int) -> Path:
    """Return where an arm's images are kept."""
    word = "".join(letter if letter.isalnum() else "_" for letter in name)
    return out / "samples" / f"seed-{seed}" / f"{word}.pt"


def load(out: Path, name: str, seed: int) -> torch.Tensor:
    """Return an arm's images."""
    found: torch.Tensor = torch.load(sample_file(out, name, seed), weights_only=True)
    return found


def forget(out: Path) -> None:
    """Remove networks and results of an earlier run, which would be taken for this one's."""
    for file in (*out.glob("nets/seed-*/*.pt"), *out.glob("results.*")):
        file.unlink()


def command(options: Generative) -> str:
    """Return the command that makes the page again.

    >>> command(Generative(seeds=3, data="mnist"))
    'lightning-peft generative --data mnist --seeds 3'
    """
    usual, words = asdict(Generative()), ["lightning-peft generative"]
    for name, value in asdict(options).items():
        if value != usual[name] and name not in {"out", "page", "resume", "quick"}:
            words.append(f"--{name} {value}")
    return " ".join(words)


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft generative", description=(Generative.__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 10 epochs, 2,000 draws, 200 samples: to see that it runs"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(Generative, skip={"quick", "resume"})
    warnings.filterwarnings(
        "ignore", ".*(does not have many workers|exists and is not empty|LeafSpec|logging interval).*"
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # a dozen trainers greet
    run(Generative(**parser.parse_args(args).as_dict()))


if __name__ == "__main__":
    main()

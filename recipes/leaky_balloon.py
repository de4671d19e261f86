"""A leaky balloon: air is data, the leak is weight decay, and pumping one arm alone lets the other deflate.

A network that knows two arms of one body, upright digits and digits turned by 90 degrees, is fed with one of them or with both,
with and without weight decay. Compared is what is left of the arm that gets no air.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_peft.blocks import group_by_block
from lightning_peft.callbacks import ForgettingEvaluation, ReplayMixing, accuracy_task
from lightning_peft.logging import log_values
from lightning_peft.recipes.leaky_balloon_page import Row, checks, draw, page, table
from lightning_peft.reporting import save_results

__all__ = ["LeakyBalloon", "main", "run"]

FEEDS = ("one arm", "both arms")
RATE = 1e-3


@dataclass
class LeakyBalloon:
    """Feed a network that knows upright digits with turned ones, alone or beside upright ones, with and without decay.

    Args:
        decays: Weight decays (AdamW, all parameters); the first should be 0.
        seeds: Runs of each cell, from seed 0 on; a seed also splits the rows.
        before: Steps in which the first arm, upright digits, is pumped up.
        steps: Steps after that.
        batch_size: Rows of a step.
        ratio: Share of upright rows where both arms are fed.
        look_every: Steps between looks.
        out: Folder for results, logs, page and picture.
        page: The page; its picture has the same name. Unset, leaky_balloon.md in the folder.
        resume: Go on with the killed run in this folder.
    """

    decays: list[float] = field(default_factory=lambda: [0.0, 1.0, 10.0])
    seeds: int = 10
    before: int = 600
    steps: int = 300
    batch_size: int = 64
    ratio: float = 0.5
    look_every: int = 20
    out: str = "runs/leaky_balloon"
    page: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be known before anything is trained.

        Raises:
            ValueError: For counts that are not positive, a share outside (0, 1), or decays that do not rise from 0.
        """
        names = ("seeds", "before", "steps", "batch_size", "look_every")
        if wrong := {name: getattr(self, name) for name in names if getattr(self, name) < 1}:
            raise ValueError(f"leaky_balloon: {wrong!r} must be at least 1 each.")
        if not 0 < self.ratio < 1:
            raise ValueError(f"leaky_balloon: ratio={self.ratio!r} must lie inside (0, 1).")
        if len(self.decays) < 2 or self.decays != sorted(set(self.decays)) or self.decays[0] != 0:
            raise ValueError(f"leaky_balloon: decays={self.decays!r} must rise from 0, as 0 1.")


class Balloon(pl.LightningModule):
    """An MLP 64-128-128-10 with one head for both arms.

    Args:
        decay: Weight decay; without it AdamW is Adam.
    """

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)
        self.decay = decay

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), RATE, weight_decay=self.decay)


class WeightNorms(pl.Callback):
    """Take down the norm of each block's weights: how much air is in the balloon.

    Args:
        every: Steps between looks.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.norms: dict[str, list[float]] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for block, found in group_by_block(pl_module.named_parameters()).items():
            norm = torch.cat([value.detach().double().flatten() for value in found.values()]).norm()
            self.norms.setdefault(block, []).append(float(norm))
        log_values(trainer, {f"drift/norm {block}": values[-1] for block, values in self.norms.items()})


# --- data -------------------------------------------------------------------------------------------------------------


@cache
def digits(seed: int) -> tuple[TensorDataset, ...]:
    """Return upright and turned training rows, upright and turned test rows; 30 % of scikit-learn's digits are test rows."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (x / 16).astype(np.float32), y, test_size=0.3, random_state=seed, stratify=y
    )

    def rows(images: Any, labels: Any) -> TensorDataset:
        return TensorDataset(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long())

    def turned(images: Any) -> Any:
        return np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

    return rows(train_x, train_y), rows(turned(train_x), train_y), rows(test_x, test_y), rows(turned(test_x), test_y)


# --- a run ------------------------------------------------------------------------------------------------------------


def fit(net: Balloon, rows: TensorDataset, steps: int, options: LeakyBalloon, **trainer: Any) -> None:
    """Train for so many steps."""
    usual = {"logger": False, "callbacks": []}
    pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        default_root_dir=options.out,
        **{**usual, **trainer},
    ).fit(net, DataLoader(rows, options.batch_size, shuffle=True, drop_last=True))


def pump_up(seed: int, options: LeakyBalloon) -> Balloon:
    """Return the network that knows upright digits."""
    pl.seed_everything(seed, verbose=False)
    net = Balloon()
    fit(net, digits(seed)[0], options.before, options)
    return net


def feed(net: Balloon, feed: str, decay: float, seed: int, options: LeakyBalloon) -> Row:
    """Go on with one cell of the experiment; return its curves.

    Args:
        net: What knows the first arm; it is changed.
        feed: One of :data:`FEEDS`.
        decay: Weight decay.
        seed: Of the run.
        options: The recipe's.
    """
    pl.seed_everything(seed, verbose=False)
    net.decay = decay
    upright, turned, *tests = digits(seed)
    arms = {name: accuracy_task(rows, 10) for name, rows in zip(("upright", "turned"), tests, strict=True)}
    looks, norms = ForgettingEvaluation(arms, every_n_steps=options.look_every), WeightNorms(options.look_every)
    replay = [ReplayMixing(upright, options.ratio)] if feed == "both arms" else []
    logger = TensorBoardLogger(options.out, name="logs", version=name_of(feed, decay, seed))
    fit(net, turned, options.steps, options, callbacks=[looks, norms, *replay], logger=logger)
    return {
        "feed": feed,
        "decay": decay,
        "seed": seed,
        "upright_before": looks.before["upright"],
        "upright_after": looks.after["upright"],
        "turned_after": looks.after["turned"],
        "forgetting": looks.forgetting["upright"],
        "steps": [entry["step"] for entry in looks.history],
        "upright": [entry["retained"]["upright"] for entry in looks.history],
        "turned": [entry["retained"]["turned"] for entry in looks.history],
        "norms": norms.norms,
    }


def run(options: LeakyBalloon) -> tuple[list[Row], bool]:
    """Run every cell that is not finished; print table and checks, write results, page and picture.

    Returns:
        The rows, and whether all checks hold.
    """
    out = Path(options.out)
    about = {key: value for key, value in asdict(options).items() if key not in {"seeds", "out", "page", "resume"}}
    rows = stored(out / "results.json", about, resume=options.resume)
    cells = [(feed, decay) for feed in FEEDS for decay in options.decays]
    jobs = {seed: [cell for cell in cells if name_of(*cell, seed) not in rows] for seed in range(options.seeds)}
    with tqdm(total=sum(map(len, jobs.values())), desc="leaky balloon", unit="run") as bar:
        for seed, missing in jobs.items():
            known = pump_up(seed, options) if missing else None
            for cell in missing:
                bar.set_postfix_str(f"{cell[0]}, decay {cell[1]:g}, seed {seed}")
                rows[name_of(*cell, seed)] = feed(copy.deepcopy(known), *cell, seed, options)  # type: ignore[arg-type]
                save_results(out, rows, about)
                bar.update()
    found = [rows[name_of(*cell, seed)] for seed in range(options.seeds) for cell in cells]
    verdicts = checks(found)
    written = Path(options.page) if options.page else out / "leaky_balloon.md"
    draw(written.with_suffix(".png"), found)
    page(written, found, verdicts, asdict(options), command(options))
    table(found).show()
    for verdict in verdicts:
        print(verdict)
    print(f"Results   {out}/results.json, results.csv\nPage      {written}\nPicture   {written.with_suffix('.png')}")
    print(f"Curves    tensorboard --logdir {out}/logs")
    return found, all(verdict.holds is not False for verdict in verdicts)


def name_of(feed: str, decay: float, seed: int) -> str:
    """Return what a run is called in the files."""
    return f"{feed}, decay {decay:g}, seed {seed}"


def command(options: LeakyBalloon) -> str:
    """Return the command that makes the page again.

    >>> command(LeakyBalloon(decays=[0, 2.5], out="elsewhere"))
    'lightning-peft leaky_balloon --decays 0 2.5'
    """
    words, usual = ["lightning-peft leaky_balloon"], LeakyBalloon()
    for name, value in asdict(options).items():
        if value != getattr(usual, name) and name not in {"out", "page", "resume"}:
            words.append(f"--{name} {' '.join(f'{one:g}' for one in value) if isinstance(value, list) else value}")
    return " ".join(words)


def stored(file: Path, about: Mapping[str, Any], *, resume: bool) -> dict[str, Row]:
    """Return the finished rows of a run that is resumed.

    Raises:
        ValueError: If they come from a run with other options.
    """
    if not resume or not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["about"] != about:
        raise ValueError(
            f"leaky_balloon: {file} comes from {found['about']}, not {dict(about)}; drop --resume or use --out."
        )
    rows: dict[str, Row] = found["arms"]
    return rows


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line; the exit status is 1 if a check fails."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft leaky_balloon", description=(LeakyBalloon.__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--decays", nargs="+", type=float, default=LeakyBalloon().decays, help="weight decays, from 0 on"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(LeakyBalloon, skip={"decays", "resume"})
    warnings.filterwarnings("ignore", ".*(does not have many workers|exists and is not empty|LeafSpec).*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(
        logging.WARNING
    )  # a trainer greets for each cell
    if not run(LeakyBalloon(**parser.parse_args(args).as_dict()))[1]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""How should a new head start: a linear model where the answer is known, and MiniLM under full fine-tuning, with numbers.

Kumar et al. 2022, arXiv:2202.10054: the gradients of a random head distort pretrained features. Compared are a random head,
the same one at a tenth of its size, a zero head (:class:`~lightning_peft.callbacks.ZeroInitHead`) and a head that is trained
first (:meth:`~lightning_peft.callbacks.FreezeSchedule.head_first`).
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from lightning_peft.recipes import head_init_linear, head_init_minilm
from lightning_peft.recipes.head_init_minilm import train_head
from lightning_peft.recipes.head_init_page import linear_table, minilm_table, page
from lightning_peft.recipes.head_init_picture import draw
from lightning_peft.recipes.head_init_texts import Setting, Texts
from lightning_peft.reporting import finished_rows, save_results

__all__ = ["HeadInit", "main", "run"]

Row = dict[str, Any]


@dataclass
class HeadInit:
    """Compare heads that start in different ways, by what they do to pretrained features.

    Args:
        parts: linear, the two-layer linear model of Kumar et al. 2022; minilm, MiniLM under full fine-tuning.
        noises: How far from right the features of the linear model start (eps).
        linear_seeds: Problems of the linear model at each eps, from seed 0 on.
        seeds: Runs of MiniLM for each head, from seed 0 on.
        steps: Optimizer steps after which MiniLM is measured, rising, counted from the first step that may move the
            backbone.
        head_steps: Steps in which the arm "head first" trains its head alone before that.
        batch_size: Rows of a step.
        rows: Test rows in distribution, and as many out of it.
        pairs: Pairs of half reviews of the old skill.
        accelerator: Any Lightning accelerator.
        out: Folder for results, page and picture.
        page: The page; its picture has the same name and lies beside it. Unset, head_init.md in the folder.
        resume: Go on with the killed run in this folder: what is finished is kept. More seeds may be asked for.
    """

    parts: list[Literal["linear", "minilm"]] = field(default_factory=lambda: ["linear", "minilm"])
    noises: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3])
    linear_seeds: int = 20
    seeds: int = 3
    steps: list[int] = field(default_factory=lambda: [10, 50])
    head_steps: int = 50
    batch_size: int = 16
    rows: int = 500
    pairs: int = 500
    accelerator: str = "auto"
    out: str = "runs/head_init"
    page: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be known before anything is loaded.

        Raises:
            ValueError: For counts that are not positive, steps that do not rise, or no part.
        """
        counts = {name: getattr(self, name) for name in ("linear_seeds", "seeds", "head_steps", "batch_size", "rows")}
        wrong = {name: count for name, count in counts.items() if count < 1}
        if wrong:
            raise ValueError(f"head_init: {wrong!r} must be at least 1 each.")
        if not self.steps or self.steps != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError(f"head_init: steps={self.steps!r} must be whole numbers from 1 on that rise, as 10 50.")
        if not self.parts:
            raise ValueError("head_init: parts=[] is empty; give linear, minilm or both.")


def run(options: HeadInit) -> dict[str, list[Row]]:
    """Run both parts, then print the tables and write results, page and picture; return the rows by part."""
    out = Path(options.out)
    found: dict[str, list[Row]] = {}
    if "linear" in options.parts:
        found["linear"] = linear_rows(options, out / "linear")
    if "minilm" in options.parts:
        found["minilm"] = minilm_rows(options, out / "minilm")
    written = Path(options.page) if options.page else out / "head_init.md"
    draw(written.with_suffix(".png"), found)
    page(written, found, asdict(options), asdict(HeadInit()))
    tables = {"linear": linear_table, "minilm": minilm_table}
    for part, rows in found.items():
        tables[part](rows).show()
    print(f"Results   {out}/*/results.json, results.csv\nPage      {written}\nPicture   {written.with_suffix('.png')}")
    return found


def linear_rows(options: HeadInit, folder: Path) -> list[Row]:
    """Return the rows of the linear model, from an earlier run of the same problems if it is resumed."""
    about = {"noises": options.noises, "seeds": options.linear_seeds}
    kept = finished_rows(folder, about, owner="head_init") if options.resume else {}
    if kept:
        return list(kept.values())
    rows: list[Row] = head_init_linear.compare_heads(options.noises, range(options.linear_seeds))
    save_results(folder, {f"{row['head']}, eps {row['noise']:g}, seed {row['seed']}": row for row in rows}, about)
    return rows


def minilm_rows(options: HeadInit, folder: Path) -> list[Row]:
    """Train MiniLM from every head and seed; return a row for each at each step. Files are whole after every run."""
    setting = Setting(
        tuple(options.steps), options.head_steps, options.batch_size, options.rows, options.pairs, options.accelerator
    )
    about = {**asdict(setting), "steps": options.steps}
    del about["accelerator"]
    rows = finished_rows(folder, about, owner="head_init") if options.resume else {}
    jobs = [(head, seed) for seed in range(options.seeds) for head in head_init_minilm.HEADS]
    missing = [job for job in jobs if name_of(*job, options.steps[-1]) not in rows]
    texts = Texts(setting)
    with tqdm(total=sum(setting.total_steps(head) for head, _ in missing), desc="MiniLM", unit="step") as bar:
        for head, seed in missing:
            bar.set_postfix_str(f"{head}, seed {seed}")
            rows |= {name_of(head, seed, row["step"]): row for row in train_head(head, seed, texts, bar)}
            save_results(folder, rows, about)
    return [rows[name_of(*job, step)] for job in jobs for step in (0, *options.steps)]


def name_of(head: str, seed: int, step: Any) -> str:
    """Return what a row of MiniLM is called in the files."""
    return f"{head}, seed {seed}, step {step}"


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft head_init", description=(HeadInit.__doc__ or "").splitlines()[0])
    lists: dict[str, dict[str, Any]] = {
        "parts": {"choices": ["linear", "minilm"], "help": "what to run"},
        "noises": {"type": float, "help": "how far from right the features of the linear model start: eps"},
        "steps": {
            "type": int,
            "help": "steps after which MiniLM is measured, from the first that may move the backbone",
        },
    }
    for name, about in lists.items():
        parser.add_argument(f"--{name}", nargs="+", default=getattr(HeadInit(), name), **about)
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(HeadInit, skip={*lists, "resume"})
    warnings.filterwarnings("ignore", ".*(does not have many workers|srun|barebones).*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # a dozen trainers greet
    run(HeadInit(**parser.parse_args(args).as_dict()))


if __name__ == "__main__":
    main()

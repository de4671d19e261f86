"""What protects an old task, on sklearn's digits: every method through the library's callbacks, ten seeds, two scenarios.

"classes": learn the digits 0-4, then 5-9. "turned": learn upright digits, then the same turned by 90 degrees. An MLP
64-128-128-10, Adam 1e-3, batch 64, 600 steps and then 300; one head over all ten digits, always. Forgetting is the accuracy
on old test rows before minus after, in points.

The budget looks at one half of the old test rows; its table reports the other half, for fixed ratios too.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from forgetting_tables import page
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from lightning_peft import DERMixin, DistillMixin, LoRA, add_adapter
from lightning_peft.callbacks import EWC, DecayToPretrained, ForgettingBudget, GradientProjection, OldTask, ReplayMixing
from lightning_peft.files import write_text
from lightning_peft.mixins.der_mixin import store_logits

SCENARIOS = ("classes", "turned")
BATCH, BEFORE, AFTER = 64, 600, 300


class Digits(pl.LightningModule):
    """The network of the protocol."""

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; without decay it is Adam."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, 1e-3, weight_decay=self.decay)


def logits_of(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the arguments of an accuracy."""
    return module(batch[0]), batch[1]


def loss_of(module: Any, batch: Any) -> Tensor:
    """Return the loss on old rows."""
    return F.cross_entropy(module(batch[0]), batch[1])


def outputs_of(module: Any, batch: Any) -> Tensor:
    """Return the logits alone."""
    return module(batch[0])


@cache
def data(scenario: str, seed: int) -> tuple[TensorDataset, ...]:
    """Return old and new training rows, old and new test rows."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split((x / 16).astype(np.float32), y, test_size=0.3, random_state=seed, stratify=y)
    train, test = (parts[0], parts[2]), (parts[1], parts[3])

    def rows(images: Any, labels: Any) -> TensorDataset:
        return TensorDataset(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long())

    if scenario == "classes":
        return tuple(
            rows(a[b < 5], b[b < 5]) if old else rows(a[b >= 5], b[b >= 5]) for a, b in (train, test) for old in (1, 0)
        )
    turned = [np.rot90(a.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64) for a, _ in (train, test)]
    return rows(*train), rows(turned[0], train[1]), rows(*test), rows(turned[1], test[1])


def fit(net: Digits, rows: TensorDataset, steps: int, seed: int, *callbacks: pl.Callback) -> None:
    """Train for so many steps."""
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(rows, BATCH, shuffle=True, drop_last=True)
    with tempfile.TemporaryDirectory() as scratch:
        pl.Trainer(
            accelerator="cpu", max_epochs=-1, max_steps=steps, callbacks=list(callbacks), logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=scratch,
        ).fit(net, loader)  # fmt: skip


@cache
def pretrained(scenario: str, seed: int) -> Digits:
    """Return the network that has learned the old task."""
    torch.manual_seed(seed)
    net = Digits()
    fit(net, data(scenario, seed)[0], BEFORE, seed)
    return net


@torch.no_grad()
def accuracy(net: Digits, rows: Any) -> float:
    """Return the percentage of right answers."""
    x, y = next(iter(DataLoader(rows, len(rows))))
    return 100 * float((net.eval()(x).argmax(1) == y).float().mean())


class DERDigits(DERMixin, Digits):
    """The network, held to what it said of old rows."""

    def distill_outputs(self, batch: Any) -> Tensor:
        """Return logits."""
        return self(batch[0])


class HeldDigits(DistillMixin, Digits):
    """The network, held at temperature 2 to what it says of rows as it is when training begins."""

    distill_temperature = 2.0
    classes = 10

    def distill_outputs(self, batch: Any) -> Tensor:
        """Return logits of the classes that are held."""
        return self(batch[0])[:, : self.classes]


def few(rows: TensorDataset, per_class: int = 10) -> TensorDataset:
    """Return the first rows of each class."""
    x, y = rows.tensors
    chosen = torch.cat([(y == label).nonzero()[:per_class, 0] for label in y.unique()])
    return TensorDataset(x[chosen], y[chosen])


def drawn(rows: TensorDataset) -> Subset[Any]:
    """Return rows drawn with replacement, as the protocol does, enough for all steps."""
    chosen = torch.randint(len(rows), (BATCH * AFTER,), generator=torch.Generator().manual_seed(0))
    return Subset(rows, chosen.tolist())


@dataclass
class Case:
    """What an arm works on."""

    net: Digits
    old: TensorDataset
    new: TensorDataset
    guard: OldTask

    def becomes(self, net: Digits) -> Digits:
        """Go on with another kind of network, of the same weights."""
        net.load_state_dict(self.net.state_dict())
        self.net = net
        return net


Arm = Callable[[Case], list[pl.Callback]]


def nothing(_: Case) -> list[pl.Callback]:
    """Protect nothing."""
    return []


def replay(ratio: float) -> Arm:
    """Mix this share of old rows in."""
    return lambda case: [ReplayMixing(case.old, ratio)]


def decay(rate: float) -> Arm:
    """Decay all weights to zero."""

    def arm(case: Case) -> list[pl.Callback]:
        case.net.decay = rate
        return []

    return arm


def lora(then: Arm = nothing) -> Arm:
    """Train updates of rank 4 in the body, and the head."""

    def arm(case: Case) -> list[pl.Callback]:
        add_adapter(case.net.body, LoRA(rank=4, alpha=8, targets=["*"]))
        return then(case)

    return arm


def der(case: Case) -> list[pl.Callback]:
    """Rehearse 3.2 rows of the memory beside each batch, with labels and stored logits."""
    memory = store_logits(few(case.old), case.becomes(DERDigits()), batch_size=256)
    return [ReplayMixing(memory.loader(), 1 / 21)]


def lwf(case: Case) -> list[pl.Callback]:
    """Hold the old classes to what they were on as many new rows, beside those that are learned."""
    net = case.becomes(HeldDigits())
    net.classes = int(case.old.tensors[1].max()) + 1
    return [ReplayMixing(case.new, 0.5)]


def held(case: Case) -> list[pl.Callback]:
    """Hold all classes to what they were on as many old rows, whose labels are not used."""
    case.becomes(HeldDigits())
    return [ReplayMixing(case.old, 0.5)]


def budget(case: Case) -> list[pl.Callback]:
    """Let a budget of 5 points steer the share of old rows."""
    return [ReplayMixing(case.old, 0.5), ForgettingBudget(0.05, tasks={"old": case.guard})]


ARMS: dict[str, Arm] = {
    "nothing": nothing,
    "replay 1 %": replay(0.01),
    "replay 5 %": replay(0.05),
    "replay 10 %": replay(0.1),
    "replay 25 %": replay(0.25),
    "weight decay 1 (to zero)": decay(1.0),
    "weight decay 10 (to zero)": decay(10.0),
    "EWC 1e4": lambda case: [EWC(case.old, outputs_of, 1e4)],
    "LoRA r4": lora(),
    "LoRA r4 + replay 5 %": lora(replay(0.05)),
    "LwF 1 (KL on new rows)": lwf,
    "DER++ 5 %, 10 per class": der,
    "A-GEM, 10 per class": lambda case: [GradientProjection(drawn(few(case.old)), loss_of, batch_size=64)],
    "A-GEM, all 50 rows each step": lambda case: [GradientProjection(few(case.old), loss_of, batch_size=50)],
    "KL on old rows, no labels": held,
    "decay to pretrained 1": lambda _: [DecayToPretrained(1.0)],
    "decay to pretrained 10": lambda _: [DecayToPretrained(10.0)],
}
FIXED = (0.1, 0.2, 0.3, 0.4, 0.5)
BUDGET: dict[str, Arm] = {**{f"fixed {ratio:.0%}": replay(ratio) for ratio in FIXED}, "ForgettingBudget(0.05)": budget}


def run(name: str, arm: Arm, scenario: str, seed: int) -> dict[str, Any]:
    """Train one arm; return its accuracies before and after, and the share of old rows."""
    old, new, old_test, new_test = data(scenario, seed)
    net = copy.deepcopy(pretrained(scenario, seed))
    task = OldTask(DataLoader(old_test, 256), MulticlassAccuracy(10, average="micro"), logits_of)
    guard, report = task.split(seed=seed)
    rows = {"old": old_test, "new": new_test, "report": report.loader.dataset}
    before = {key: accuracy(net, value) for key, value in rows.items()}
    net.train()
    case = Case(net, old, new, guard)
    callbacks = arm(case)
    net = case.net
    fit(net, new, AFTER, seed + 1000, *callbacks)
    after = {key: accuracy(net, value) for key, value in rows.items()}
    mixing = next((one for one in callbacks if isinstance(one, ReplayMixing)), None)
    ratio = 0.0 if mixing is None else mixing.share
    return {"arm": name, "scenario": scenario, "seed": seed, "before": before, "after": after, "ratio": ratio}


def write_between(path: Path, made: str, mark: str = "digits") -> None:
    """Put the tables between the marks of a page."""
    head, rest = path.read_text().split(f"<!-- {mark} -->\n")
    tail = rest.split(f"<!-- /{mark} -->\n")[1]
    write_text(path, f"{head}<!-- {mark} -->\n{made}<!-- /{mark} -->\n{tail}")


def main() -> None:
    """Run the benchmark and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds (10)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/forgetting_digits.json"))
    parser.add_argument("--page", type=Path, help="write the tables here too")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="run only these, and keep the results of the others")
    parser.add_argument(
        "--tables", action="store_true", help="make the tables of the results that are there, without a run"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    known = ARMS | BUDGET
    if unknown := set(options.arms or ()) - set(known):
        parser.error(f"--arms {' '.join(sorted(unknown))}: the arms are {', '.join(known)}")
    chosen = [] if options.tables else options.arms or list(known)
    kept = json.loads(options.out.read_text()) if options.tables or options.arms else []
    results = [row for row in kept if row["arm"] not in chosen]
    if chosen:
        cases = [(name, known[name], s, k) for name in chosen for s in SCENARIOS for k in range(options.seeds)]
        results += [run(*case) for case in tqdm(cases, desc="runs", smoothing=0)]
        write_text(options.out, json.dumps(results, indent=1) + "\n")
    made = page(results)
    print(made)
    if options.page:
        write_between(options.page, made)


if __name__ == "__main__":
    main()

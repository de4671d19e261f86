"""LightningModules that nobody here wrote, adapted with at most three changed lines; printed as a table.

``python -m tests.adoption docs/adoption.md`` runs each project's script as it was and as it is with the library, from the
same pretrained weights on the same real data, and writes what that changed.
"""

from __future__ import annotations

import copy
import difflib
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft.files import write_text
from lightning_peft.freezing import trainable_count
from tests.projects import Names, boring, digits, lstm, nanogpt, series, trainer, transformer


@dataclass(frozen=True)
class Trial:
    """A project's script, and the same with the library.

    Args:
        module: The name of the LightningModule.
        package: The package it comes from.
        kind: What it does.
        technique: What is added.
        prepare: Returns what the scripts find, as in ``tests/projects.py``.
        before: The script as it was.
        after: The script with the library.
    """

    module: str
    package: str
    kind: str
    technique: str
    prepare: Callable[[], Names]
    before: str
    after: str

    @property
    def changed(self) -> int:
        """How many lines of the script are new or other ones."""
        lines = difflib.ndiff(self.before.strip().splitlines(), self.after.strip().splitlines())
        return sum(line.startswith("+ ") for line in lines)

    def run(self, seed: int = 0) -> Result:
        """Run both scripts."""
        untrained, _ = self._play(self.before, seed, max_steps=0)
        without, _ = self._play(self.before, seed)
        with_it, net = self._play(self.after, seed)
        share = trainable_count(net) / sum(parameter.numel() for parameter in net.parameters())
        return Result(untrained, without, with_it, share)

    def _play(self, script: str, seed: int, **options: Any) -> tuple[Scores, pl.LightningModule]:
        names = self.prepare()
        found = {**names, "pretrained": copy.deepcopy(names.get("pretrained")), "torch": torch, "seed": seed}
        found["Trainer"] = lambda **own: trainer(**{**own, **options})
        torch.manual_seed(seed)
        exec(script, found)
        net = found["net"].eval()
        with torch.no_grad():
            return names["score"](net), net


Scores = dict[str, float]


@dataclass(frozen=True)
class Result:
    """What a trial gave: values by name before training, after it without and with the library, and what trained."""

    untrained: Scores
    without: Scores
    with_it: Scores
    trainable: float


NANOGPT = """
net = NanoGPT(**arguments)
net.load_state_dict(pretrained)
trainer = Trainer(max_steps=200)
trainer.fit(net, datamodule=data)
"""
TRIALS = [
    Trial(
        "ModelModuleIMG", "cph-imgclassification", "image classifier", "ReplayMixing", digits,
        """
net = ModelModuleIMG(pretrained, lr=1e-3)
trainer = Trainer(max_epochs=5)
trainer.fit(net, datamodule=data)
""",
        """
from lightning_peft.callbacks import ReplayMixing
net = ModelModuleIMG(pretrained, lr=1e-3)
trainer = Trainer(max_epochs=5, callbacks=[ReplayMixing(old_digits, ratio=0.3, seed=seed)])
trainer.fit(net, datamodule=data)
""",
    ),
    Trial(
        "NanoGPT", "lightning-gpt", "causal language model", "ReplayMixing", nanogpt,
        NANOGPT,
        """
from lightning_peft.callbacks import ReplayMixing
net = NanoGPT(**arguments)
net.load_state_dict(pretrained)
trainer = Trainer(max_steps=200, callbacks=[ReplayMixing(old_text, ratio=0.3, seed=seed)])
trainer.fit(net, datamodule=data)
""",
    ),
    Trial(
        "NanoGPT", "lightning-gpt", "causal language model", "LoRA", nanogpt,
        NANOGPT,
        """
from lightning_peft import LoRA, adapted, parameter_groups
net = adapted(NanoGPT, LoRA(rank=8))(**arguments)
net.load_state_dict(pretrained)
net.configure_optimizers = lambda: torch.optim.AdamW(parameter_groups(net, lr=1e-2))
trainer = Trainer(max_steps=200)
trainer.fit(net, datamodule=data)
""",
    ),
    Trial(
        "LightningLSTM", "lightning", "sequence model", "FreezeSchedule", lstm,
        """
net = LightningLSTM(vocab_size=size)
net.load_state_dict(pretrained)
trainer = Trainer(max_steps=15, gradient_clip_val=0.25)
fit(trainer, net)
""",
        """
from lightning_peft.callbacks import FreezeSchedule, Phase
net = LightningLSTM(vocab_size=size)
net.load_state_dict(pretrained)
phases = [Phase(["*.decoder.*"], steps=5), Phase(["*.decoder.*", "*.rnn.*"], steps=5), Phase(["*"])]
trainer = Trainer(max_steps=15, gradient_clip_val=0.25, callbacks=[FreezeSchedule(phases)])
fit(trainer, net)
""",
    ),
    Trial(
        "LightningTransformer", "lightning", "encoder and decoder", "LoRA", transformer,
        """
net = LightningTransformer(vocab_size=size)
net.load_state_dict(pretrained)
trainer = Trainer(max_steps=80)
fit(trainer, net)
""",
        """
from lightning_peft import LoRA, adapted
net = adapted(LightningTransformer, LoRA(rank=8))(vocab_size=size)
net.load_state_dict(pretrained)
trainer = Trainer(max_steps=80)
fit(trainer, net)
""",
    ),
    Trial(
        "NBeats", "pytorch-forecasting", "forecaster (regression)", "LoRA", series,
        """
net = NBeats.from_dataset(rows, **arguments)
net.load_state_dict(pretrained)
trainer = Trainer(max_epochs=3)
trainer.fit(net, data)
""",
        """
from lightning_peft import LoRA, adapted
net = adapted(NBeats, LoRA(rank=4, exclude=["*theta*"]), backbone="net_blocks").from_dataset(rows, **arguments)
net.load_state_dict(pretrained)
trainer = Trainer(max_epochs=3)
trainer.fit(net, data)
""",
    ),
    Trial(
        "ManualOptimBoringModel", "lightning", "manual optimization", "LoRA", boring,
        """
net = ManualOptimBoringModel()
trainer = Trainer(max_epochs=1)
trainer.fit(net, data)
""",
        """
from lightning_peft import LoRA, adapted
net = adapted(ManualOptimBoringModel, LoRA(rank=1, alpha=1), backbone=".")()
trainer = Trainer(max_epochs=1)
trainer.fit(net, data)
""",
    ),
]  # fmt: skip


SEEDS = (0, 1, 2)


def row(trial: Trial) -> str:
    """Run a trial with every seed and return its line of the table."""
    runs = [trial.run(seed) for seed in SEEDS]

    def told(name: str, column: str) -> str:
        values = [getattr(found, column)[name] for found in runs]
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    results = [
        f"{name} {runs[0].untrained[name]:.3f} → {told(name, 'without')} / {told(name, 'with_it')}"
        for name in runs[0].without
    ]
    cells = [f"{trial.module} ({trial.package})", trial.kind, trial.technique, trial.changed, "; ".join(results)]
    return "| " + " | ".join(map(str, [*cells, f"{runs[0].trainable:.1%}"])) + " |"


HEADING = f"""# Projects that nobody here wrote

LightningModules out of packages, their files untouched. Each project's script runs as it was and with the library, from the
same weights on the same rows. *Result* is before training → without / with the library, mean ± standard deviation over seeds
{list(SEEDS)}; n counts what is measured, held out from training: images, characters, words, predicted values, rows.
cph-imgclassification and lightning-gpt are imported without their `__init__`, which ask for torchvision and lightning.app;
the modules tried here need neither. Made by `python -m tests.adoption docs/adoption.md`; the scripts stand in
`tests/adoption.py`, the data in `tests/projects.py`, and the tests run them.

| module | kind | technique | changed lines | result | trainable at the end |
|---|---|---|---|---|---|
"""
FOOT = """
## What cannot be adapted as it is

- **Modules of the package `pytorch_lightning`** are copies of the classes of `lightning.pytorch`, and refused. Change the
  project's import; nothing else in it changes.
- **A `configure_optimizers` that insists on knowing every parameter by name** (minGPT, nanoGPT) works with all callbacks, not
  with an adapter, whose parameters have new names. Give the module an optimizer over `parameter_groups(module, lr=...)`: the
  third changed line of NanoGPT with LoRA.
- **Layers smaller than LoRA's rank** (the last ones of NBeats): `exclude=["*theta*"]`; the error names the layer.
- **Recurrent and convolution weights** (LightningLSTM) are no `nn.Linear`, which is all that LoRA adapts. Schedules, replay and
  measuring work on any.
- **An iterable training set** has no order that replay could plan, and is refused there; the other callbacks take it.
"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    write_text(Path(sys.argv[1]), HEADING + "\n".join(map(row, TRIALS)) + "\n" + FOOT)

"""Every mixin with every callback and every feature of Lightning: trained, resumed, compared; printed as a table.

``python -m tests.composition docs/composition.md`` writes the table of one process and, launched by itself through
torchrun, of two. A cell is ``exact`` (a run resumed from its middle ends bit for bit where the whole run ends), or says
why it is refused before training.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import (
    DERMixin,
    DistillMixin,
    FullFinetuneMixin,
    KVPrefix,
    LinearProbeMixin,
    LoRA,
    LoRAMixin,
    MAMLMixin,
    PrefixMixin,
    PromptingMixin,
    PromptSearchMixin,
    PromptTemplate,
    ReplayMixin,
    ReptileMixin,
    SoftPrompt,
    SoftPromptMixin,
    Verbalizer,
    adapted,
)
from lightning_peft.callbacks import (
    EWC,
    DecayToPretrained,
    DecodingEvaluation,
    ExactResume,
    ForgettingBudget,
    ForgettingEvaluation,
    FreezeSchedule,
    GenerationMetrics,
    GradientFlow,
    GradientProjection,
    KLGauge,
    LatentPlane,
    MemoryFill,
    OldTask,
    ProbeBaseline,
    ReplayMixing,
    SampleGrid,
    WeightDrift,
    WeightInterpolation,
    ZeroInitHead,
)
from lightning_peft.data import ReservoirBuffer
from lightning_peft.decoding import Greedy
from lightning_peft.distributed import rank, world_size
from lightning_peft.files import write_text
from lightning_peft.logging import FAMILIES
from lightning_peft.meta import Episode
from lightning_peft.mixins.der_mixin import LogitMemory
from lightning_peft.old_task import evaluate
from lightning_peft.prompts import PromptSearch, PromptSpace, RandomSearch
from tests.prompts.language_nets import llama, tokenizer
from tests.toy import Toy, rows, same, weights

ROOT = Path(__file__).parents[1]
EPOCHS = 3


class Plain(Toy):
    """The toy on rows in their own order, with a scheduler and without a log where the cell asks for it."""

    scheduler, logs, monitored = False, True, "loss"

    def __init__(self) -> None:
        super().__init__(lr=0.03)

    def training_step(self, batch, batch_idx):
        # torch 2.13 cannot compile a step that calls self.log, of any module.
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.logs:
            self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(24), 6 // world_size())

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return ([optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]) if self.scheduler else optimizer


class WithLoRA(LoRAMixin, Plain):
    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))


class Probing(LinearProbeMixin, Plain): ...


class Full(FullFinetuneMixin, Plain): ...


class Rehearsing(ReplayMixin, Plain):
    def replay_step(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class Distilling(DistillMixin, Plain):
    def distill_outputs(self, batch):
        return self(batch[0])


class Remembering(DERMixin, Plain):
    def distill_outputs(self, batch):
        return self(batch[0])


class Reading(Plain):
    """The toy with a small BERT for its backbone, which reads a row as one embedded token."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(
            vocab_size=5, max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.backbone = BertModel(config, add_pooling_layer=False)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(inputs_embeds=x[:, None]).last_hidden_state[:, 0])


class Prompted(SoftPromptMixin, Reading):
    def __init__(self) -> None:
        super().__init__(adapter=SoftPrompt(tokens=2))


class Prefixed(PrefixMixin, Reading):
    def __init__(self) -> None:
        super().__init__(adapter=KVPrefix(tokens=2))


class Speaking(Plain):
    """The toy with a small Llama for its backbone: it trains on a row as one embedded token, and reads it in a prompt as words."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.backbone = LlamaForCausalLM(LlamaConfig(vocab_size=400, initializer_range=0.2, **sizes))
        self.head, self.tokenizer = torch.nn.Linear(4, 2), tokenizer()

    def forward(self, x):
        states = self.backbone(inputs_embeds=x[:, None], output_hidden_states=True).hidden_states
        return self.head(states[-1][:, 0])

    def val_dataloader(self) -> DataLoader:
        return DataLoader(rows(16, seed=5), 4 // world_size())


def words(batch: list[torch.Tensor]) -> tuple[list[str], torch.Tensor]:
    return [" ".join("good" if number > 0 else "bad" for number in row) for row in batch[0].tolist()], batch[1]


FORMS = ["{text}: {answer}", "It was {text}, so {answer}"]
ANSWERS = Verbalizer(["bad", "good"])


class Judging(PromptingMixin, LoRAMixin, Speaking):
    prompt, verbalizer = PromptTemplate(FORMS[0]), ANSWERS

    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2, targets=["*v_proj", "*down_proj"]))

    def prompt_inputs(self, batch):
        return words(batch)


class Searching(PromptSearchMixin, Speaking):
    monitored = "search/validation"

    def __init__(self) -> None:
        examples = list(zip(*words(rows(6, seed=6)[:]), strict=True))
        space = PromptSpace(
            FORMS, [ANSWERS], examples=[(text, int(label)) for text, label in examples], shots=(0, 1, 2)
        )
        super().__init__(search=PromptSearch(space, RandomSearch(2, 12), rounds=9))

    def prompt_inputs(self, batch):
        return words(batch)


def halves(batch: Any) -> Episode:
    """A batch as one task: each second row is a query."""
    return Episode(*([tensor[None, start::2] for tensor in batch] for start in (0, 1)))


class MetaLearning(MAMLMixin, Plain):
    monitored = "meta/query_loss"

    def split_episode(self, batch):
        return halves(batch)


class Following(ReptileMixin, Plain):
    monitored = "meta/query_loss"

    def split_episode(self, batch):
        return halves(batch)


MODULES: dict[str, Callable[[], Plain]] = {
    "no mixin": Plain,
    "LoRAMixin": WithLoRA,
    "SoftPromptMixin": Prompted,
    "PrefixMixin": Prefixed,
    "LinearProbeMixin": Probing,
    "FullFinetuneMixin": Full,
    "PromptingMixin": Judging,
    "PromptSearchMixin": Searching,
    "ReplayMixin": Rehearsing,
    "DistillMixin": Distilling,
    "DERMixin": Remembering,
    "MAMLMixin": MetaLearning,
    "ReptileMixin": Following,
    "adapted": adapted(Plain, LoRA(rank=2)),
}


def old_step(module, batch):
    return module(batch[0]), batch[1]


def logits(module, batch):
    return module(batch[0])


def old_loss(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


def old_task() -> OldTask:
    return OldTask(rows(20, seed=4), MulticlassAccuracy(num_classes=2), old_step)


def encoded(module, x):
    return module(x)


def drawn(module, count):
    return module(torch.randn(count, 4)).reshape(count, 1, 1, 2)


CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "ZeroInitHead": ZeroInitHead,
    "FreezeSchedule": lambda: FreezeSchedule.head_first("head", steps=5),
    "ReplayMixing": lambda: ReplayMixing(rows(20, seed=3), ratio=0.25),
    "ForgettingEvaluation": lambda: ForgettingEvaluation({"old": old_task()}, every_n_epochs=1),
    "ExactResume": ExactResume,
    "GradientFlow": GradientFlow,
    "WeightDrift": lambda: WeightDrift(every_n_steps=3),
    "ForgettingBudget": lambda: ForgettingBudget(9.0, tasks={"old": old_task()}, action="rollback", every_n_steps=3),
    "KLGauge": lambda: KLGauge(logits, every_n_steps=3),
    "DecayToPretrained": lambda: DecayToPretrained(0.1),
    "EWC": lambda: EWC(rows(20, seed=4), logits, rate=1.0),
    "GradientProjection": lambda: GradientProjection(rows(20, seed=3), old_loss, batch_size=4),
    "WeightInterpolation": lambda: WeightInterpolation(old_task(), {"old": old_task()}, alphas=[0.0, 0.5, 1.0]),
    "MemoryFill": lambda: MemoryFill(ReservoirBuffer(8), during="batches"),
    "ProbeBaseline": lambda: ProbeBaseline("head"),
    "DecodingEvaluation": lambda: DecodingEvaluation(
        Greedy(max_new_tokens=2),
        ["a", "It", "film"],
        short_texts,
        tokenizer=tokenizer(),
        network="writer",
        cut_counts=True,
    ),
    "SampleGrid": lambda: SampleGrid(drawn, count=4, every_n_steps=3),
    "LatentPlane": lambda: LatentPlane(rows(16, seed=5), encode=encoded, every_n_steps=6),
    "GenerationMetrics": lambda: GenerationMetrics(torch.rand(12, 1, 1, 2), drawn, count=8, k=2, every_n_steps=3),
}
PROTECTING = list(CALLBACKS)[-12:]
"""They do not touch how a mixin adds weights, so they stand with two modules only; two mixins stand with what feeds them."""
ALONE = {"no mixin", "LoRAMixin"}
FED = {"DistillMixin": ("ReplayMixing", "ExactResume"), "DERMixin": ("ReplayMixing", "ExactResume")}


def short_texts(texts: list[str]) -> list[bool]:
    return [len(text) < 8 for text in texts]


def make(module: str, callback: str) -> pl.Callback:
    """Return a callback for a module: DER's memory holds logits."""
    if (module, callback) == ("DERMixin", "ReplayMixing"):
        return ReplayMixing(LogitMemory(rows(20, seed=3), torch.zeros(20, 2), step=0).loader(), ratio=0.25)
    return CALLBACKS[callback]()


# What a feature adds: callbacks, options of the trainer, and what it does to the module.
FEATURES: dict[str, dict[str, Any]] = {
    "ModelCheckpoint": {},
    "EarlyStopping": {"callback": lambda net: EarlyStopping(net.monitored, min_delta=9.0, patience=1)},
    "WeightAveraging": {"callback": lambda net: EMAWeightAveraging(decay=0.5)},
    "LR scheduler": {"scheduler": True},
    "gradient accumulation": {"options": {"accumulate_grad_batches": 2}},
    "clipping": {"options": {"gradient_clip_val": 0.2}},
    "torch.compile": {"compiled": True},
}


@torch.compiler.disable  # for it logs
def validated(net: Any, batch: Any, batch_idx: int) -> None:
    right = net(batch[0]).argmax(1) == batch[1]
    net.log("learn/accuracy", right.float().mean(), batch_size=len(right), sync_dist=True)


def build(module: str, callback: str, feature: str) -> tuple[Any, Plain]:
    """Return what is given to fit, and the module inside it; a probe needs validation rows."""
    pl.seed_everything(7, verbose=False)
    net = MODULES[module]()
    if callback == "ProbeBaseline":
        net.val_dataloader = lambda: DataLoader(rows(16, seed=5), 4 // world_size())
        net.validation_step = types.MethodType(validated, net)
    if (
        callback == "DecodingEvaluation"
    ):  # the toy writes nothing: a language model stands beside it, and does not train
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net.writer = llama().requires_grad_(False)
    net.scheduler, net.logs = FEATURES[feature].get("scheduler", False), not FEATURES[feature].get("compiled")
    return (torch.compile(net, backend="eager") if FEATURES[feature].get("compiled") else net), net


def fit(given: Any, callbacks: list[pl.Callback], feature: str, ckpt_path: Path | None = None) -> pl.Trainer:
    added = [FEATURES[feature]["callback"](given)] if "callback" in FEATURES[feature] else []
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=world_size() if dist.is_initialized() else 1,
        strategy="ddp" if dist.is_initialized() else "auto",
        callbacks=[*callbacks, *added],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        **FEATURES[feature].get("options", {}),
    )
    trainer.fit(given, ckpt_path=ckpt_path)
    return trainer


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)


class Witness(pl.Callback):
    """Sees from outside whether a callback and a mixin do what they are there for."""

    def __init__(self, module: str, callback: str) -> None:
        self.module, self.watched = module, make(module, callback)
        self.trained: set[str] | None = None
        self.drawn = 0
        self.kept: dict[str, Any] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        self.zero_head = not pl_module.head.weight.any()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.trained is None:
            self.trained = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if isinstance(self.watched, ReplayMixing):
            self.drawn = self.watched.drawn()[0]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.kept = checkpoint["callbacks"]

    def idle(self, net: Plain, start: dict[str, torch.Tensor]) -> list[str]:
        """Return who did nothing in a run that began with the weights ``start``."""
        end = weights(net)
        moved = {name for name, value in start.items() if not torch.equal(end[name], value)}
        base_moved = any(name.startswith("backbone") and ".adapters." not in name for name in moved)
        untrained = MODULES[self.module]()
        untrained.configure_model()
        added = {name: value for name, value in weights(untrained).items() if name.endswith(("prompt", "prefix"))}
        up = [value for name, value in end.items() if "lora_B" in name]
        done = {
            "head": any(name.startswith("head") for name in moved),
            "LoRA": not base_moved and len(up) == 2 and all(value.any() for value in up),
            "LinearProbeMixin": not base_moved,
            "prompt": not base_moved and bool(added) and not any(torch.equal(end[name], added[name]) for name in added),
            "whole network": base_moved,
            "ReplayMixin": net.replay_loss is not None if self.drawn and isinstance(net, ReplayMixin) else True,
            "ZeroInitHead": self.zero_head,
            "PromptingMixin": isinstance(net, PromptingMixin) and judged(net),
            "PromptSearchMixin": isinstance(net, PromptSearchMixin) and searched(net, moved),
            "FreezeSchedule": self.trained == {"head.weight", "head.bias"},
            "ReplayMixing": self.drawn > 0,
            "ForgettingEvaluation": getattr(self.watched, "after", {}) == {"old": evaluate(net, old_task())},
            "ExactResume": len(self.kept.get("ExactResume", {}).get("processes", [])) == world_size(),
            "GradientFlow": all(norm > 0 for _, norm in getattr(self.watched, "norms", {}).get("head", [(0, 0)])),
            "WeightDrift": getattr(self.watched, "values", {}).get("head", {}).get("distance", 0) > 0,
            **self.protected(),
        }
        of_module = {"LoRAMixin": "LoRA", "adapted": "LoRA", "LinearProbeMixin": "LinearProbeMixin"}
        of_module |= {"SoftPromptMixin": "prompt", "PrefixMixin": "prompt", "PromptingMixin": "LoRA"}
        expected = ["head", of_module.get(self.module, "whole network"), "ReplayMixin", type(self.watched).__name__]
        expected += ["PromptingMixin"] if self.module == "PromptingMixin" else []
        if self.module == "PromptSearchMixin":
            expected = ["PromptSearchMixin", type(self.watched).__name__]
        if isinstance(self.watched, WeightInterpolation):  # which may go back all the way
            expected = expected[-1:]
        return [name for name in expected if not done[name]]

    def protected(self) -> dict[str, bool]:
        """Return who of those that protect an old task has done so."""
        watched: Any = self.watched
        return {
            "DistillMixin": True,
            "DERMixin": True,
            "ForgettingBudget": bool(getattr(watched, "best", None)),
            "KLGauge": bool(getattr(watched, "value", None)),
            "DecayToPretrained": bool(getattr(watched, "_starts", None)),
            "EWC": bool(getattr(watched, "fisher", None)),
            "GradientProjection": True,
            "WeightInterpolation": getattr(watched, "alpha", None) is not None,
            "MemoryFill": len(getattr(watched, "buffer", ())) == 8,
            "ProbeBaseline": getattr(watched, "probe_score", None) is not None,
            "DecodingEvaluation": len(getattr(watched, "history", ())) == 2,
            "SampleGrid": getattr(watched, "samples", None) is not None,
            "LatentPlane": getattr(watched, "latents", None) is not None,
            "GenerationMetrics": getattr(watched, "values", {}).get("nearest", 0) > 0,
        }


@torch.no_grad()
def judged(net: Any) -> bool:
    """Whether the last accuracy is that of the last weights, on all rows."""
    texts, labels = words(rows(16, seed=5)[:])
    right = (net.label_scores(texts).argmax(1) == labels).sum()
    return net.trainer.callback_metrics["learn/accuracy"] == right / 16


def searched(net: PromptSearchMixin, moved: set[str]) -> bool:
    """Whether there was a round for each step, and no weight moved."""
    return 0 < len(net.report.rounds) == net.trainer.global_step and not moved


SPENT = {"search/tokens", "search/forwards", "search/cached"}


def ours(trainer: pl.Trainer) -> dict[str, float]:
    """Return what was logged last under our keys, without what a search spends: after a resume its cache begins empty."""
    found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.partition("/")[0] in FAMILIES}
    return {key: value for key, value in found.items() if key not in SPENT}


def plain(state: Any) -> Any:
    """Return a state that can be compared by ``==``."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def cell(module: str, callback: str, feature: str, folder: Path) -> str:
    """Train a combination whole and in two parts; return what became of it.

    Raises:
        Exception: Whatever a run raises after it has begun to train.
    """
    given, whole = build(module, callback, feature)
    start, seen = weights(whole), Witness(module, callback)
    try:
        trainer = fit(given, [seen.watched, seen, every_epoch(folder)], feature)
    except ValueError as error:
        assert all(torch.equal(start[name], value) for name, value in weights(whole).items() if name in start)
        return f"refused: {error}"
    end = weights(whole)
    assert all(value.isfinite().all() for value in end.values())
    if idle := seen.idle(whole, start):
        return f"no effect of {', '.join(idle)}"
    if dist.is_initialized() and not as_on_the_first_process(end):
        return "differs between the processes"
    if FEATURES[feature].get("compiled"):
        _, uncompiled = build(module, callback, feature)
        fit(uncompiled, [make(module, callback)], feature)
        if not all(torch.allclose(value, end[name], rtol=0, atol=1e-6) for name, value in weights(uncompiled).items()):
            return "differs from the run that is not compiled"
    return after_resume(
        module, callback, feature, folder, (end, trainer.global_step, plain(seen.watched.state_dict()), ours(trainer))
    )


def after_resume(module: str, callback: str, feature: str, folder: Path, whole: tuple[Any, ...]) -> str:
    """Go on from the checkpoint of the first epoch and compare weights, steps, state and log with those of the whole run."""
    given, net = build(module, callback, feature)
    watched = make(module, callback)
    trainer = fit(given, [watched, every_epoch(folder)], feature, ckpt_path=folder / "epoch=0.ckpt")
    if not same(weights(net), whole[0]):
        return "differs after a resume"
    if (trainer.global_step, plain(watched.state_dict()), ours(trainer)) != whole[1:]:
        return "ends with another state or log after a resume"
    return "exact"


def as_on_the_first_process(found: dict[str, torch.Tensor]) -> bool:
    own = torch.cat([value.flatten() for value in found.values()])
    first = own.clone()
    dist.broadcast(first, 0)
    return torch.equal(own, first)


def all_cells(pairs: list[tuple[str, str, str]], folder: Path) -> dict[str, str]:
    """Return what became of each combination; an error is told, not raised. ``folder`` is the same on every process."""
    found = {}
    for number, names in enumerate(pairs):
        try:
            found[" / ".join(names)] = cell(*names, folder / str(number))
        except Exception as error:
            traceback.print_exc()
            found[" / ".join(names)] = f"broken: {type(error).__name__}: {error}"
    return found


def callbacks_of(module: str) -> list[str]:
    """Return the callbacks that a module stands with."""
    return [one for one in FED.get(module, CALLBACKS) if one not in PROTECTING or module in ALONE]


def everything() -> list[tuple[str, str, str]]:
    return [(module, *rest) for module in MODULES for rest in itertools.product(callbacks_of(module), FEATURES)]


def pairwise() -> list[tuple[str, str, str]]:
    """Return cells in which every pair of ``everything()`` occurs; of those that protect, each with two features."""
    cells = []
    for i, module in enumerate(MODULES):
        usual = [one for one in callbacks_of(module) if one not in PROTECTING]
        cells += [(module, usual[(i + j) % len(usual)], feature) for j, feature in enumerate(FEATURES)]
    features = list(FEATURES)
    for i, callback in enumerate(PROTECTING):
        cells += [("no mixin", callback, features[(i + turn) % len(features)]) for turn in (0, 3)]
    cells += [("LoRAMixin", callback, "ModelCheckpoint") for callback in PROTECTING]
    cells += [("PromptSearchMixin", "ExactResume", feature) for feature in features]  # what it does not refuse
    return list(dict.fromkeys(cells))


def two_processes(names: list[tuple[str, str, str]], folder: Path) -> list[dict[str, str]]:
    """Run combinations under DDP in one launch; return what each process saw."""
    write_text(folder / "cells.json", json.dumps(names))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "tests.composition"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *command, str(folder)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"The launch of two processes failed:\n{run.stderr[-4000:]}")
    return [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(2)]


def table(one: dict[str, str], two: dict[str, str]) -> str:
    """Return the cells as Markdown: a part for each mixin, a line for each callback, a column for each feature."""
    reasons: dict[str, int] = {}

    def show(key: str) -> str:
        shown = []
        for result in (one[key], two[key]):
            kind, _, reason = result.partition(": ")
            shown.append(kind if not reason else f"{kind} [{reasons.setdefault(reason, len(reasons) + 1)}]")
        return shown[0] if shown[0] == shown[1] else f"{shown[0]}; DDP: {shown[1]}"

    lines = []
    for module in MODULES:
        lines += ["", f"### {module}", "", f"| | {' | '.join(FEATURES)} |", "|---|" + "---|" * len(FEATURES)]
        for callback in callbacks_of(module):
            cells = [show(f"{module} / {callback} / {feature}") for feature in FEATURES]
            lines.append(f"| {callback} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]) + "\n"


HEADING = """# What goes together

Every mixin with every callback and every feature of Lightning, in one process and under DDP in two. *exact*: in the run both do
what they are there for (adapters move and their base does not, the head starts at zero, the first phase trains the head alone,
old rows are drawn, the old task's last value is that of the last weights), the processes end with the same weights, and a run that
is resumed from the end of its first epoch ends bit for bit where the whole run ends, with the same callback state and log (the same
in one process and in two, where nothing else is said). *refused*: an error before training, with the reason below. A compiled run
(backend `eager`) also ends where the plain one ends, up to 1e-6; torch 2.13 cannot compile a step that calls `self.log`, in any
LightningModule: the compiled modules log nothing in theirs, and ours do it outside.

PromptingMixin stands before LoRAMixin: the adapter trains, and the last accuracy is that of the last weights on all validation
rows. Under PromptSearchMixin no weight moves and each step is a round; what a search spends is not compared, since after a resume
its cache begins empty. For MAMLMixin and ReptileMixin a batch is one task, each second row a query; the other presets of MAMLMixin
differ from it in a setting, and have no rows. A class of PromptSearchMixin and a mixin that trains something is an error as soon
as it is written.

Made by `python -m tests.composition docs/composition.md`; the tests make each cell anew.
"""


def work(folder: Path) -> None:
    """Run the cells of a folder as one of several processes."""
    dist.init_process_group("gloo")
    names = [tuple(found) for found in json.loads((folder / "cells.json").read_text())]
    write_text(folder / f"rank-{rank()}.json", json.dumps(all_cells(names, folder / "cells")))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        work(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            pair = two_processes(everything(), Path(scratch))
            assert pair[0] == pair[1], "the processes disagree"
            one = all_cells(everything(), Path(scratch, "one"))
        write_text(Path(sys.argv[1]), HEADING + table(one, pair[0]))

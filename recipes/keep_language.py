"""What the recipes ``keep_fluent`` and ``keep_safe`` share: a language model with LoRA, tuned under several kinds of protection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_peft import DistillMixin, LoRA, LoRAMixin, parameter_groups
from lightning_peft.callbacks import ForgettingBudget, ForgettingEvaluation, OldTask, ReplayMixing
from lightning_peft.data.causal_batch import IGNORED, TokenRow, causal_batch
from lightning_peft.reporting import finished_rows, save_results

Arm = Literal["none", "replay", "distill", "budget"]
ARMS: dict[Arm, str] = {
    "none": "nothing is done",
    "replay": "a fixed share of old rows in the batches, learned as text (`ReplayMixing`)",
    "distill": "the same share of the same rows beside the batches; on them the model is held to what it said of every token "
    "before it was tuned (`DistillMixin`)",
    "budget": "as `distill`, but the share is steered by what is lost on guard rows, and the latest state inside the limits is put "
    "back at the end (`ForgettingBudget`)",
}
Row = dict[str, Any]


class LanguageNet(pl.LightningModule):
    """A causal language model that is trained on ``input_ids`` and ``labels``.

    Args:
        backbone: A transformers model.
        lr: Rate of what trains.
    """

    def __init__(self, backbone: Any, lr: float) -> None:
        super().__init__()
        self.backbone, self.lr = backbone, lr

    @override
    def forward(self, **tokens: Tensor) -> Any:
        return self.backbone(**tokens, use_cache=False)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = logits_of(self, batch)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        self.log("learn/train_loss", loss, batch_size=len(logits))
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.backbone, lr=self.lr), weight_decay=0.0)


class TunedLanguageNet(LoRAMixin, LanguageNet):
    """The same with LoRA."""


class HeldLanguageNet(LoRAMixin, DistillMixin, LanguageNet):
    """With LoRA, and held on old rows to what the untuned model says of each token that has a label."""

    def distill_outputs(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits that answer for the tokens with a label, ``(such tokens, vocabulary)``."""
        # Chosen here and not by distill_mask: over a whole vocabulary, what is masked away costs as much as what counts.
        return logits_of(self, batch)[:, :-1][batch["labels"][:, 1:] != IGNORED]

    def replay_units(self, batch: dict[str, Tensor]) -> Tensor:
        """Return how many tokens have a label."""
        return (batch["labels"][:, 1:] != IGNORED).sum()


def logits_of(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a batch, ``(rows, tokens, vocabulary)``."""
    found: Tensor = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


# --- the experiment ---------------------------------------------------------------------------------------------------


@dataclass
class Keep:
    """Options of both recipes; each documents them."""

    model: str | None
    arms: list[Arm]
    seeds: int
    steps: int
    batch_size: int
    lr: float
    rank: int
    ratio: float
    max_drop: float
    look_every: int
    accelerator: str
    out: str
    page: str | None
    resume: bool

    def __post_init__(self) -> None:
        """Check what can be known before anything is loaded.

        Raises:
            ValueError: For counts, rates and limits that are not positive, a share outside (0, 1), or an arm that is none.
        """
        names = ("seeds", "steps", "batch_size", "lr", "rank", "max_drop", "look_every")
        if wrong := {name: getattr(self, name) for name in names if getattr(self, name) <= 0}:
            raise ValueError(f"{self.name}: {wrong!r} must be above 0.")
        if not 0 < self.ratio < 1:
            raise ValueError(f"{self.name}: ratio={self.ratio!r} must lie inside (0, 1).")
        if not self.arms or set(self.arms) - set(ARMS):
            raise ValueError(f"{self.name}: arms={self.arms!r} must be among {', '.join(ARMS)}.")

    @property
    def name(self) -> str:
        """Of the recipe."""
        return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in type(self).__name__)[1:]

    def about(self) -> dict[str, Any]:
        """Return what makes one run another."""
        skipped = {"arms", "seeds", "accelerator", "out", "page", "resume"}
        return {key: value for key, value in asdict(self).items() if key not in skipped}

    def command(self) -> str:
        """Return the command that makes the page again."""
        words, usual = [f"lightning-peft {self.name}"], type(self)()  # type: ignore[call-arg]
        for key, value in asdict(self).items():
            if value != getattr(usual, key) and key not in {"out", "page", "resume", "accelerator"}:
                words.append(f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}")
        return " ".join(words)


@dataclass
class Study:
    """What is learned, what is kept, and what is reported.

    Args:
        train: New rows.
        memory: Old rows to replay.
        guards: What the budget looks at.
        limits: What each guard may lose, in its unit.
        reports: What is measured before and after, on other rows than the guards.
    """

    train: list[TokenRow]
    memory: list[TokenRow]
    guards: Mapping[str, OldTask]
    limits: Mapping[str, float]
    reports: Mapping[str, OldTask]


class Ticks(pl.Callback):
    """Move a bar with every step."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.bar.update()


def tune(
    arm: Arm, seed: int, study: Study, options: Keep, load_model: Callable[[], Any], *callbacks: pl.Callback
) -> Row:
    """Tune a fresh model in one way; return what it knew before and knows after."""
    pl.seed_everything(seed, verbose=False)
    kind = HeldLanguageNet if arm in {"distill", "budget"} else TunedLanguageNet
    net = kind(load_model(), options.lr, adapter=LoRA(rank=options.rank))
    evaluation = ForgettingEvaluation(study.reports)
    budget = ForgettingBudget(
        study.limits, tasks=study.guards, action=["replay", "rollback"], every_n_steps=options.look_every
    )
    replay = [] if arm == "none" else [ReplayMixing(study.memory, options.ratio, seed=seed)]  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=[evaluation, *replay, *([budget] if arm == "budget" else []), *callbacks],
        logger=TensorBoardLogger(options.out, name="logs", version=f"{arm}-{seed}"),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(study.train, options.batch_size, shuffle=True, collate_fn=causal_batch))  # type: ignore[arg-type]
    put_back = budget.best if arm == "budget" else None
    return {
        "arm": arm,
        "seed": seed,
        **{f"{name} before": value for name, value in evaluation.before.items()},
        **{f"{name} after": value for name, value in evaluation.after.items()},
        **{f"{name} lost": value for name, value in evaluation.forgetting.items()},
        "share of old rows": replay[0].share if replay else 0.0,
        "weights of step": float(put_back["step"] if put_back else trainer.global_step),
    }


def run_arms(options: Keep, study: Study, load_model: Callable[[], Any]) -> list[Row]:
    """Run every arm and seed that is not finished; files are whole after each."""
    out = Path(options.out)
    rows = finished_rows(out, options.about(), owner=options.name) if options.resume else {}
    jobs = [(arm, seed) for seed in range(options.seeds) for arm in options.arms]
    missing = [job for job in jobs if f"{job[0]}, seed {job[1]}" not in rows]
    with tqdm(total=len(missing) * options.steps, desc=options.name, unit="step") as bar:
        for arm, seed in missing:
            bar.set_postfix_str(f"{arm}, seed {seed}")
            rows[f"{arm}, seed {seed}"] = tune(arm, seed, study, options, load_model, Ticks(bar))
            save_results(out, rows, options.about())
    return [rows[f"{arm}, seed {seed}"] for arm, seed in jobs]

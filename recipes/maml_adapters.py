"""Intents from one or five examples each: a LoRA whose start is meta-learned over a frozen sentence encoder, beside plain ways.

CLINC150's intents are episodes, split by intent; MiniLM stays as it is. The arms: MAML over a LoRA and a head; the same LoRA
trained jointly on all training intents and then fine-tuned; a LoRA that knows five intents only; a fresh LoRA and a linear probe,
fine-tuned on the support set; nearest centroids of the encoder's sentence vectors. All are tested on the same unseen intents.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft import LoRA, LoRAMixin, MAMLMixin, MetaConfig
from lightning_peft.data import EpisodicDataModule
from lightning_peft.data.packaged import load_encoder, minilm
from lightning_peft.meta import AdaptationCurve, Episode
from lightning_peft.meta.adaptation_curve import curve_figure, interval
from lightning_peft.recipes.maml_page import (
    HEADING,
    adaptation,
    pooled,
    quiet,
    save_picture,
    seeds_told,
    tables,
    told,
    trainer,
)
from lightning_peft.recipes.maml_record import FREE, Record
from lightning_peft.reporting import write_section

__all__ = ["IntentRun", "main", "run"]

ARMS = ("maml", "joint", "specialist", "fresh", "probe")
RATES = (0.1, 0.3, 1.0, 3.0)
SHOWN = (0, 1, 3, 5, 10)


@dataclass
class IntentRun:
    """Learn to tell five unseen intents apart from a few examples each, with an adapter over a frozen encoder.

    Args:
        data: CLINC150's data_full.json, or any JSON whose values are lists of (text, intent).
        arms: Which of maml, joint, specialist, fresh, probe.
        shots: Examples of each intent.
        steps: Meta-steps; joint and specialist take as many ordinary ones.
        meta_batch: Tasks of a meta-step.
        test_tasks: Tasks of unseen intents.
        rank: Rank of the LoRA.
        seeds: Runs, from seed 0 on; weights, episodes and the split of intents differ.
        quick: A smoke run.
        resume: Go on with the killed run in this folder; arms, shots and seeds may be added.
        accelerator: Any Lightning accelerator.
        out: Folder for results, logs and pictures.
        page: A page to write the tables into; unset, maml.md in the folder.
    """

    data: str = ""
    arms: tuple[str, ...] = ARMS
    shots: tuple[int, ...] = (1, 5)
    steps: int = 60
    meta_batch: int = 4
    test_tasks: int = 100
    rank: int = 4
    seeds: int = 1
    quick: bool = False
    resume: bool = False
    accelerator: str = "cpu"
    out: str = "runs/maml_adapters"
    page: str | None = None


class IntentNet(pl.LightningModule):
    """Sentence vectors, the mean over tokens, and a linear head that begins at zero."""

    def __init__(self, encoder: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.backbone = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def vectors(self, batch: dict[str, Tensor]) -> Tensor:
        """Return sentence vectors of length 1, ``(rows, width)``; a batch may bring them along."""
        if "vectors" in batch:
            return batch["vectors"]
        mask = batch["attention_mask"]
        # transformers looks into a mask of two dimensions (is it all ones?), which cannot run on stacked tasks; four it takes.
        seen = mask[:, None, None].expand(-1, 1, mask.shape[1], -1).bool()
        hidden: Tensor = self.backbone(input_ids=batch["input_ids"], attention_mask=seen).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weights).sum(-2) / weights.sum(-2), dim=-1)

    @override
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(10 * self.vectors(batch))
        return logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["label"])
        self.log("learn/loss", loss)
        return loss

    def query_accuracy(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the share of texts whose intent is the most probable one."""
        right: Tensor = self(batch).argmax(1) == batch["label"]
        return right.float().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3)


class AdaptedIntentNet(LoRAMixin, IntentNet):
    """A LoRA over the encoder."""


class MetaIntentNet(MAMLMixin, LoRAMixin, IntentNet):
    """A LoRA and a head whose start is meta-learned."""

    @override
    def query_accuracy(self, batch: Any) -> Tensor:
        return IntentNet.query_accuracy(self, batch)


def split_by_intent(file: str, seed: int) -> dict[str, list[dict[str, str]]]:
    """Return texts of training, validation and test intents: 60 %, 15 % and 25 %."""
    texts: dict[str, list[str]] = {}
    for rows in json.loads(Path(file).read_text()).values():
        for text, intent in rows:
            if intent != "oos":
                texts.setdefault(intent, []).append(text)
    intents = sorted(texts)
    order = torch.randperm(len(intents), generator=torch.Generator().manual_seed(seed)).tolist()
    cuts = [0, round(0.6 * len(order)), round(0.75 * len(order)), len(order)]
    parts = {}
    for number, name in enumerate(("train", "validation", "test")):
        chosen = [intents[i] for i in order[cuts[number] : cuts[number + 1]]]
        parts[name] = [{"text": text, "label": intent} for intent in chosen for text in texts[intent]]
    return parts


class Tokens:
    """Makes a batch of texts; all are padded to one length, so that tasks stack."""

    def __init__(self, tokenizer: Any, length: int = 20) -> None:
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return token numbers, mask and labels."""
        texts = [row["text"] for row in rows]
        found = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        labels = torch.tensor([row["label"] for row in rows])
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "label": labels}


class Intents:
    """What the arms of a seed share: the encoder, the texts and their episodes."""

    def __init__(self, options: IntentRun, shots: int, seed: int) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

        self.options, self.shots, self.seed = options, shots, seed
        self.encoder = load_encoder(str(minilm())).eval()
        self.collate = Tokens(AutoTokenizer.from_pretrained(str(minilm())))
        self.parts = split_by_intent(options.data, seed)
        self.data = EpisodicDataModule(
            *self.parts.values(),
            k_shot=shots,
            n_query=5,
            meta_batch=options.meta_batch,
            episodes=options.steps * options.meta_batch,
            eval_episodes=options.test_tasks - options.test_tasks % options.meta_batch,
            seed=seed,
            collate=self.collate,
        )

    def fresh(self, kind: Callable[..., Any], classes: int = 5, **more: Any) -> Any:
        """Return a module on a copy of the encoder, its LoRA in place."""
        pl.seed_everything(self.seed, verbose=False)
        adapter = LoRA(rank=self.options.rank, targets=["*query", "*value"])
        module = kind(copy.deepcopy(self.encoder), classes, adapter=adapter, **more)
        module.configure_model()
        return module

    def plain(self, intents: list[str]) -> DataLoader[Any]:
        """Return batches of some intents' texts, of as many as a meta-step sees."""
        numbers = {intent: number for number, intent in enumerate(intents)}
        rows = [{**row, "label": numbers[row["label"]]} for row in self.parts["train"] if row["label"] in numbers]
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(rows, 128, shuffle=True, collate_fn=self.collate, generator=generator)  # type: ignore[arg-type]


def train(arm: str, shared: Intents, record: Record) -> tuple[Any, float]:
    """Train an arm; return its module and the seconds that it took. MAML's alone depends on the number of shots."""
    config = MetaConfig(inner_lr=1.0, adaptation_steps=2, learn_inner_lr="layer_step")
    loader: Any = None
    if arm == "maml":
        module, loader = shared.fresh(MetaIntentNet, meta=config), shared.data.train_dataloader()
    elif arm in ("joint", "specialist"):
        intents = sorted({row["label"] for row in shared.parts["train"]})
        intents = intents[:5] if arm == "specialist" else intents
        module, loader = shared.fresh(AdaptedIntentNet, len(intents)), shared.plain(intents)
    else:
        module = shared.fresh(AdaptedIntentNet)
    name = f"{arm} of {shared.shots}-{shared.seed}" if arm == "maml" else f"{arm}-{shared.seed}"
    options = shared.options

    def fit() -> None:
        if loader is not None:
            made = trainer(Path(options.out), name, options.steps, loader, accelerator=options.accelerator)
            made.fit(module, loader)

    return module, record.trained(name, module, fit)


def tested(module: Any, arm: str, rate: float, shared: Intents, episodes: Any) -> AdaptationCurve:
    """Return how an arm adapts to unseen intents, by ten steps; other heads than MAML's begin at zero."""
    if arm == "maml":
        module.meta = MetaConfig(adaptation_steps=2, eval_adaptation_steps=10, learn_inner_lr="layer_step")
        return adaptation(module, episodes)
    adapt = "head" if arm == "probe" else "all"
    other = shared.fresh(MetaIntentNet, meta=MetaConfig(inner_lr=rate, eval_adaptation_steps=10, adapt=adapt))
    other.backbone.load_state_dict(module.backbone.state_dict())
    return adaptation(other, as_vectors(other.eval(), episodes) if arm == "probe" else episodes)


@torch.no_grad()
def as_vectors(module: IntentNet, episodes: Any) -> list[Episode]:
    """Return episodes whose texts are sentence vectors already: a frozen encoder need not see them at every step."""

    def side(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = {key: value.flatten(0, 1) for key, value in batch.items()}
        return {"vectors": module.vectors(flat).view(*batch["label"].shape, -1), "label": batch["label"]}

    return [Episode(side(episode.support), side(episode.query)) for episode in episodes]


def chosen_rate(module: Any, arm: str, shared: Intents) -> float:
    """Return the rate with the best accuracy after any number of steps on eight tasks of validation intents or more."""
    least = -(-8 // shared.options.meta_batch)
    few = list(itertools.islice(shared.data.val_dataloader(), least))
    return max(RATES, key=lambda rate: max(tested(module, arm, rate, shared, few).means("accuracy")[1:]))


def by_centroid(module: IntentNet, episodes: Any) -> list[float]:
    """Return the accuracy of each task by the nearest mean of its support vectors."""
    found = []
    for episode in as_vectors(module, episodes):
        for task in episode.chunks(1):
            (vectors, labels), (queries, classes) = (
                (side["vectors"], side["label"]) for side in (task.only().support, task.only().query)
            )
            centres = F.normalize(torch.stack([vectors[labels == one].mean(0) for one in labels.unique()]), dim=1)
            found.append(float(((queries @ centres.T).argmax(1) == classes).float().mean()))
    return found


def run(options: IntentRun) -> dict[int, dict[str, list[AdaptationCurve]]]:
    """Train and test all arms at each number of shots; write tables and pictures; return the curves of each seed."""
    if not options.data:
        raise ValueError(
            "maml_adapters: --data is needed: CLINC150's data_full.json, or a JSON of lists of (text, intent)."
        )
    if options.quick:
        options.steps, options.test_tasks = min(options.steps, 4), min(options.test_tasks, 8)
    record = Record("maml_adapters", Path(options.out), options, free=FREE | {"shots"})
    nearest: dict[int, list[float]] = {shots: [] for shots in options.shots}
    for seed, shots in itertools.product(range(options.seeds), options.shots):
        shared = Intents(options, shots, seed)
        test = shared.data.test_dataloader()
        nearest[shots] += by_centroid(shared.fresh(AdaptedIntentNet).eval(), test)
        for arm in options.arms:
            module, seconds = train(arm, shared, record)
            if not record.has(name := f"{arm} of {shots}-{seed}"):
                rate = 1.0 if arm == "maml" else chosen_rate(module, arm, shared)
                record.add(name, tested(module, arm, rate, shared, test), {"seconds": seconds, "rate": rate})
    return report(options, record, nearest)


def report(
    options: IntentRun, record: Record, nearest: dict[int, list[float]]
) -> dict[int, dict[str, list[AdaptationCurve]]]:
    """Print the tables, and write page and picture."""
    out = Path(options.out)
    page = Path(options.page) if options.page else out / "maml.md"
    everything, parts = {}, []
    for shots, centre in nearest.items():
        by_name, told_of = record.by_arm([f"{arm} of {shots}" for arm in options.arms], options.seeds)
        curves = {arm: by_name[f"{arm} of {shots}"] for arm in options.arms}
        facts = {arm: told_of[f"{arm} of {shots}"] for arm in options.arms}
        title = f"Accuracy on unseen intents, {shots} example{'s' if shots > 1 else ''} each"
        found = tables(f"{title}: mean ± 95 % over tasks (median)", curves, "accuracy", SHOWN)
        for one in found:
            one.show()
        said = f"Nearest centroid of MiniLM's vectors: {sum(centre) / len(centre):.3f} ± {interval(centre):.3f}. {told(facts)}"
        print(said)
        picture = page.with_name(f"maml_adapters_{shots}.png")
        drawn = curve_figure({arm: pooled(seeds) for arm, seeds in curves.items()})
        save_picture(picture, drawn, out, f"meta/adaptation_{shots}_shots")
        parts += [*(one.markdown() for one in found), said, f"![loss and accuracy against steps]({picture.name})"]
        everything[shots] = curves
    shots_told = " ".join(map(str, options.shots))
    lines = [
        "## Intents from a few examples",
        f"5-way, {options.steps} steps of {options.meta_batch} tasks, LoRA of rank {options.rank} on queries and values of MiniLM, "
        f"{seeds_told(options.seeds)}. The baselines' rate is chosen on validation intents. MAML learns a rate for each tensor and "
        "each of two steps; later ones take the second's, for which nobody trained them.",
        *parts,
        f"Made by `lightning-peft maml_adapters --data data_full.json --shots {shots_told} --seeds {options.seeds} "
        f"--test_tasks {options.test_tasks} --page docs/meta-learning.md`.",
    ]
    write_section(page, "maml_adapters", "\n\n".join(lines), heading=HEADING)
    print(f"Page      {page}\nCurves    tensorboard --logdir {out / 'logs'}")
    return everything


def main(args: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser("lightning-peft maml_adapters", description=(IntentRun.__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="CLINC150's data_full.json, or a JSON of lists of (text, intent)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms")
    parser.add_argument("--shots", nargs="+", type=int, default=list(IntentRun.shots), help="examples of each intent")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the killed run in --out; more may be asked of it"
    )
    parser.add_class_arguments(IntentRun, skip={"arms", "quick", "resume", "data", "shots"})
    quiet()
    found = parser.parse_args(args).as_dict()
    run(IntentRun(**found | {"arms": tuple(found["arms"]), "shots": tuple(found["shots"])}))


if __name__ == "__main__":
    main()

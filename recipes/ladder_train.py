"""The rungs of the ladder on which something trains inside the network: soft prompt, prefix, LoRA, everything."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lightning_peft import (
    Adapter,
    FullFinetune,
    KVPrefix,
    LoRA,
    SoftPrompt,
    adapter_disabled,
    merge_adapter,
    nearest_tokens,
    save_adapter,
)
from lightning_peft.freezing import trainable_count
from lightning_peft.old_task import untouched
from lightning_peft.recipes.ladder_bench import Bench, Job, Kind, Measured, judged, labels_said
from lightning_peft.recipes.ladder_measures import PeakMemory, call_seconds, folder_bytes, language_loss, retrieval
from lightning_peft.recipes.ladder_net import (
    AdaptedAnswerNet,
    AdaptedSentenceNet,
    AnswerRows,
    EncoderRows,
    texts_and_labels,
)
from lightning_peft.recipes.ladder_task import Row

VIRTUAL_TOKENS = 20
RATES: dict[Kind, float] = {"soft_prompt": 3e-2, "prefix": 1e-2, "lora": 1e-3, "full": 5e-5}
"""Learning rates of a language model."""
ENCODER_RATES: dict[Kind, float] = {"lora": 2e-3, "full": 1e-4}


def train(job: Job, bench: Bench, before: float) -> Measured:
    """Train a copy of the network under the budget, keep what was best on validation rows, and measure it."""
    adapter, rows, memory = adapter_for(job, bench), bench.task.labelled(job.shots, job.seed), PeakMemory()
    net, collate = network_for(job, bench, adapter, rows)
    folder = bench.out / "logs" / job.slug
    checkpoint = ModelCheckpoint(folder / "best", monitor="learn/accuracy", mode="max", save_weights_only=True)
    trainer = pl.Trainer(
        **bench.trainer,
        max_steps=net.steps,
        max_epochs=-1,
        callbacks=[checkpoint],
        logger=TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False),
        val_check_interval=max(1, net.steps // bench.checks),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    size = max(1, min(bench.batch_size, len(rows)) // trainer.world_size)
    loader: Any = DataLoader(rows, size, shuffle=True, collate_fn=collate, drop_last=True)  # type: ignore[arg-type]
    held: Any = DataLoader(bench.task.validation, 64, collate_fn=collate if job.encoder else texts_and_labels)  # type: ignore[arg-type]
    trainer.fit(net, loader, held)
    peak, trained = memory.read(), trainable_count(net)
    best = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=False)["state_dict"]
    net.load_state_dict(best, strict=False)
    trainer.strategy.barrier()
    Path(checkpoint.best_model_path).unlink(missing_ok=True)  # of a whole network it is large
    attached, detached = forgotten(job, bench, net, before)
    row = {
        **judged(sayer(job, bench, net), bench.task, rows),
        "trainable": trained,
        "stored bytes": stored_bytes(net, bench.out / "saved" / job.name, head=job.encoder),
        "seconds": sum(net.step_seconds),
        "peak memory": peak,
        "step ms": 1e3 * statistics.median(net.step_seconds),
        "extra tokens": VIRTUAL_TOKENS if job.rung in {"soft_prompt", "prefix"} else 0,
        "forgotten attached": attached,
        "forgotten detached": detached,
        "mergeable": {"lora": "yes", "full": "is merged"}.get(job.rung, "no"),
        "lr": net.lr,
        "steps": trainer.global_step,
    }
    if job.rung == "soft_prompt":
        near = nearest_tokens(net.backbone, bench.tokenizer, k=3)
        row["near"] = [[list(one.tokens), list(one.similarities)] for one in near]
    if job.rung == "lora":
        merge_adapter(net.backbone)
    say = sayer(job, bench, net)
    row["call ms"] = 1e3 * call_seconds(lambda text: say([(text, 0)]), [text for text, _ in bench.task.test[:10]])
    return row


def adapter_for(job: Job, bench: Bench) -> Adapter:
    """Return what is added; soft prompt and prefix begin as what the plain prompt asks."""
    if job.rung == "lora":
        return LoRA(rank=8, alpha=16)
    if job.rung == "full":
        return FullFinetune()
    task = bench.task
    text = f"{task.instructions[0]} The answer is one of: {', '.join(task.answers[0][:12])}."
    kind = SoftPrompt if job.rung == "soft_prompt" else KVPrefix
    return kind(tokens=VIRTUAL_TOKENS, init="text", text_ids=bench.tokenizer(text)["input_ids"])


def network_for(job: Job, bench: Bench, adapter: Adapter, rows: Sequence[Row]) -> tuple[Any, Any]:
    """Return a network that learns, and what makes its training batches."""
    backbone, tokenizer = copy.deepcopy(bench.network), bench.tokenizer
    if job.encoder:
        collate: Any = EncoderRows(tokenizer)
        steps = bench.steps([len(tokenizer(text)["input_ids"]) for text, _ in rows])
        rate = ENCODER_RATES[job.rung]
        return AdaptedSentenceNet(backbone, len(bench.task.labels), rate, steps, adapter=adapter), collate
    template, verbalizer = bench.task.template(), bench.task.verbalizer
    collate = AnswerRows(tokenizer, template, verbalizer)
    steps = bench.steps(
        [len(collate.row(row)["ids"]) for row in rows], VIRTUAL_TOKENS if job.rung == "soft_prompt" else 0
    )
    made = AdaptedAnswerNet(
        backbone, tokenizer, RATES[job.rung], steps,
        adapter=adapter, prompt=template, verbalizer=verbalizer,
    )  # fmt: skip
    return made, collate


def sayer(job: Job, bench: Bench, net: Any) -> Callable[[Sequence[Row]], list[int]]:
    """Return what gives the label of each text."""
    if not job.encoder:
        return lambda rows: labels_said(bench, net.backbone, rows, (bench.task.template(), bench.task.verbalizer))

    @torch.no_grad()
    def say(rows: Sequence[Row]) -> list[int]:
        device, found = next(net.parameters()).device, []
        with untouched(net, device):
            for start in range(0, len(rows), 32):
                batch = EncoderRows(bench.tokenizer)(rows[start : start + 32])
                found += net(move_data_to_device(batch, device)).argmax(1).tolist()
        return found

    return say


def forgotten(job: Job, bench: Bench, net: Any, before: float) -> tuple[float, float]:
    """Return what is lost on general text, with what was learned attached, and detached where it can be."""

    def lost() -> float:
        if job.encoder:
            return before - retrieval(net, bench.tokenizer, bench.task.halves)
        return language_loss(net.backbone, bench.tokenizer, bench.task.general) - before

    attached = lost()
    if job.rung == "full":
        return attached, attached
    with adapter_disabled(net.backbone):
        return attached, lost()


def stored_bytes(net: Any, folder: Path, *, head: bool) -> int:
    """Return what it takes to keep what was learned: an adapter's file, or all weights, and a head."""
    if isinstance(net.adapter, FullFinetune):
        own: dict[int, torch.Tensor] = {id(one): one for one in net.backbone.parameters()}
        count = sum(one.numel() * one.element_size() for one in own.values())
        return count + (sum(one.numel() * one.element_size() for one in net.head.parameters()) if head else 0)
    save_adapter(net.backbone, folder)
    if head:
        save_file(dict(net.head.state_dict()), folder / "head.safetensors")
    return folder_bytes(folder)

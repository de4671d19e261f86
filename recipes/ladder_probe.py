"""The rung of the ladder on which a head reads frozen features: which layer says most, and a head on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.data import FeatureCache
from lightning_peft.old_task import untouched
from lightning_peft.probes import fit_layers, layer_features
from lightning_peft.recipes.ladder_bench import Bench, Job, Measured, judged
from lightning_peft.recipes.ladder_measures import PeakMemory, call_seconds
from lightning_peft.recipes.ladder_net import EncoderRows
from lightning_peft.recipes.ladder_task import Row


def probe(job: Job, bench: Bench, before: float) -> Measured:
    """Fit a head to the layer and pooling that ridge regression finds best on validation rows."""
    del before  # nothing in the network moves
    task, rows, memory = bench.task, bench.task.labelled(job.shots, job.seed), PeakMemory()
    began = time.perf_counter()
    features = {use: kept(bench, job, some, use) for use, some in (("train", rows), ("validation", task.validation))}
    targets = {
        use: torch.tensor([label for _, label in some])
        for use, some in (("train", rows), ("validation", task.validation))
    }
    found = fit_layers(
        features["train"], targets["train"], (features["validation"], targets["validation"]), outputs=len(task.labels)
    )
    fit = found.fit
    seconds, peak = time.perf_counter() - began, memory.read()

    def say(some: Sequence[Row]) -> list[int]:
        said: list[int] = found(kept(bench, job, some, "judged")).argmax(1).tolist()
        return said

    def call(text: str) -> Any:
        with torch.no_grad(), untouched(bench.network, device_of(bench)):
            batch = collate_for(bench, job)([(text, 0)])
            return found(read(bench, batch))

    return {
        **judged(say, task, rows),
        "trainable": fit.weight.numel() + fit.bias.numel(),
        "stored bytes": 4 * (fit.weight.numel() + fit.bias.numel()),
        "seconds": seconds,
        "peak memory": peak,
        "step ms": None,
        "call ms": 1e3 * call_seconds(call, [text for text, _ in task.test[:10]]),
        "extra tokens": 0,
        "forgotten attached": 0.0,
        "forgotten detached": 0.0,
        "mergeable": "no",
        "layer": found.layer,
        "pooling": found.pooling,
        "penalty": fit.penalty,
        "by layer": list(found.by_layer),
    }


def kept(bench: Bench, job: Job, rows: Sequence[Row], use: str) -> Tensor:
    """Return the features of rows, ``(rows, poolings, layers, width)``, from the cache."""
    loader: DataLoader[Any] = DataLoader(list(rows), batch_size=32, collate_fn=collate_for(bench, job))  # type: ignore[arg-type]
    cache = FeatureCache(bench.out / "features", batch_size=32)
    with untouched(bench.network, device_of(bench)):
        return cache.rows(loader, lambda batch: (read(bench, batch), None), key=bench.network_key, name=use).all()


def read(bench: Bench, batch: dict[str, Tensor]) -> Tensor:
    """Return what every layer says of a batch, ``(rows, poolings, layers, width)``."""
    return layer_features(bench.network, move_data_to_device(batch, device_of(bench))).cpu()


def collate_for(bench: Bench, job: Job) -> Any:
    """Return what makes batches: of a language model the plain form of a prompt, so that the last token has been asked."""
    if job.encoder:
        return EncoderRows(bench.tokenizer)
    template = bench.task.template()

    def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
        texts = [template.prompt(text, bench.tokenizer) for text, _ in rows]
        return dict(bench.tokenizer(texts, padding=True, return_tensors="pt"))

    return collate


def device_of(bench: Bench) -> torch.device:
    """Return where the network is."""
    found: torch.device = next(bench.network.parameters()).device
    return found

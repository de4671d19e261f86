"""What a rung costs and what it forgets."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader

from lightning_peft.data.causal_batch import IGNORED, causal_batch
from lightning_peft.old_task import OldTask, evaluate
from lightning_peft.prompts import PromptTemplate
from lightning_peft.prompts.label_scores import prompt_tokens
from lightning_peft.ready_tasks import perplexity_task, retrieval_task

GENERAL_TOKENS = 96
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory that this process holds from now on, in bytes: of the GPU if there is one, else resident; None if unknown."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier rung has given back counts no more
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif RESET.exists():
            RESET.write_text("5")  # Linux: VmHWM begins anew

    def read(self) -> float | None:
        """Return it."""
        if torch.cuda.is_available():
            return float(torch.cuda.max_memory_allocated())
        if not RESET.exists():
            return None
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024


def language_loss(model: Any, tokenizer: Any, texts: Sequence[str], prompt: PromptTemplate | None = None) -> float:
    """Return the loss of a language model on texts, in nats per token.

    Args:
        model: The model, with whatever is attached to it.
        tokenizer: The model's.
        texts: Each counts up to 96 tokens.
        prompt: What stands before every text: its instruction and demonstrations.
    """
    before: list[int] = []
    if prompt is not None and (prompt.instruction or prompt.demonstrations):
        slot = dict.fromkeys(prompt.slots, "\0")
        ahead = prompt.prompt(slot, tokenizer).split(prompt.parts()[0].format(**slot))[0]
        before = tokenizer(ahead)["input_ids"]
    found = [tokenizer(text, truncation=True, max_length=GENERAL_TOKENS)["input_ids"] for text in texts]
    rows = [{"ids": before + ids, "labels": [IGNORED] * (len(before) + 1) + ids[1:]} for ids in found]
    loader: Any = DataLoader(rows, 8, collate_fn=causal_batch)  # type: ignore[arg-type]
    return math.log(measured(model, perplexity_task(loader, logits=_logits)))


def retrieval(net: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return how often an encoder finds the second half of a text from its first half, among those of all texts."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]

    def collate(rows: Sequence[tuple[str, str]]) -> list[Any]:
        options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        return [dict(tokenizer(list(side), **options)) for side in zip(*rows, strict=True)]

    loader: Any = DataLoader(halves, 32, collate_fn=collate)  # type: ignore[arg-type]
    return measured(net, retrieval_task(loader, lambda module, tokens: module.features(tokens)))


def measured(model: Any, task: OldTask) -> float:
    """Return the value of a task on a model, wherever that is."""
    device = next(model.parameters()).device
    return evaluate(model, task, to_device=lambda batch: move_data_to_device(batch, device), progress=False)


def _logits(model: Any, batch: Any) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def call_seconds(call: Callable[[str], Any], texts: Sequence[str]) -> float:
    """Return the median time of a call with one text; the first call warms up."""
    found = []
    for text in texts[:1] + list(texts):  # type: ignore[operator]
        start = time.perf_counter()
        call(text)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def prompt_length(template: PromptTemplate, text: str, tokenizer: Any) -> int:
    """Return how many tokens a call with a text has."""
    return len(prompt_tokens(template, text, tokenizer))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

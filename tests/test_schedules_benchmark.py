"""The page of schedules is that of its results; what is exact in them holds here too, in one process."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
NAMES = ("schedule_arms", "schedule_runs", "schedule_head", "schedule_tables", "step_tables")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))  # as python benchmarks/schedules.py has it
    spec = importlib.util.spec_from_file_location("benchmark_schedules", FOLDER / "schedules.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_schedules"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    for name in ("benchmark_schedules", *NAMES):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def arms(benchmark):
    return sys.modules["schedule_arms"]


@pytest.fixture(scope="module")
def runs(benchmark):
    return sys.modules["schedule_runs"]


@pytest.fixture(scope="module")
def results():
    return json.loads((FOLDER / "results" / "schedules.json").read_text())


def row_of(rows, arm):
    return next(row for row in rows if row["arm"] == arm)


def test_the_page_is_that_of_the_results(benchmark, results):
    assert (ROOT / "docs" / "schedules.md").read_text() == benchmark.page(results)


def test_the_targets_are_those_of_the_results(benchmark, results):
    assert json.loads(json.dumps(benchmark.targets(results))) == results["targets"]


def test_every_arm_is_in_the_results_and_ours_is_exact(benchmark, results):
    for part in ("arms", "schedulers", "steps"):
        assert set(benchmark.ARMS) <= {row["arm"] for row in results[part]}
    ours = row_of(results["arms"], "ours")
    assert ours["between_ranks"] == 0
    assert ours["from_single"] <= 1e-12
    assert {kill[count] for kill in ours["resume"].values() for count in ("one", "two")} == {0}
    assert set(row_of(results["schedulers"], "ours")["outcome"].values()) == {"same"}


def test_lightning_s_callback_is_wrong_on_two_ranks_and_says_nothing(results):
    """Should this fail after a new run, Lightning has mended it, and README must say so."""
    row = row_of(results["arms"], "BackboneFinetuning")
    assert row["between_ranks"] > 1e-2
    assert row["from_single"] > 1e-2


def test_every_arm_trains_what_the_plain_loop_trains(arms, runs, tmp_path):
    wanted = runs.by_hand()
    for name, arm in arms.installed().items():
        found = runs.weights(arms.fit(arm, arms.EXACT, tmp_path))
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) <= 1e-12, name


def test_a_run_is_killed_before_on_and_after_the_change(runs):
    assert list(runs.killed().items())[2:7] == [
        ("step 3", "before, mid-epoch"),
        ("step 4", "at the change, last batch"),
        ("end of epoch 0", "at the change, end of epoch"),
        ("step 5", "after, mid-epoch"),
        ("step 6", "after, mid-epoch"),
    ]
    assert len(runs.killed()) == 13


def test_ours_resumes_exactly_from_every_checkpoint_and_lightning_s_does_not(benchmark, runs, tmp_path):
    found = runs.train_and_resume(benchmark.ARMS["ours"], tmp_path / "ours")
    assert {benchmark.distance(weights, found["whole"]) for weights in found.values()} == {0}
    assert set(found) == {"whole", *runs.killed()}
    theirs = runs.train_and_resume(benchmark.ARMS["BackboneFinetuning"], tmp_path / "theirs")
    assert benchmark.distance(theirs["step 3"], theirs["whole"]) == 0
    assert benchmark.distance(theirs["step 5"], theirs["whole"]) > 1e-2
    assert theirs["step 4"].startswith("TypeError")


def test_a_scheduler_goes_on_if_its_rates_are_those_of_a_run_without_callback(
    benchmark, arms, runs, monkeypatch, tmp_path
):
    chosen = {name: benchmark.ARMS[name] for name in ("ours", "BackboneFinetuning")}
    monkeypatch.setattr(runs, "installed", lambda: chosen)
    rates = runs.try_schedulers(tmp_path)
    # By hand: halved every three steps, three epochs of four.
    assert rates[""]["StepLR"] == pytest.approx([0.1 * 0.5 ** (step // 3) for step in range(12)])
    rows = benchmark.scheduler_rows(rates)
    assert set(row_of(rows, "ours")["outcome"].values()) == {"same"}
    lost = {name: found for name, found in row_of(rows, "BackboneFinetuning")["outcome"].items() if found != "same"}
    assert lost == {
        "LambdaLR": "ValueError", "CosineAnnealingWarmRestarts": "ValueError", "OneCycleLR": "KeyError",
        "SequentialLR": "ValueError",
    }  # fmt: skip
    assert row_of(rows, "finetuning-scheduler")["missing"] == "not installed"


def test_a_curve_that_is_another_one_does_not_go_on(benchmark):
    assert benchmark.outcome([0.1, 0.05], [0.1, 0.05]) == "same"
    assert benchmark.outcome([0.1, 0.186], [0.1, 0.1]) == "off by 8.6e-02"
    assert benchmark.outcome("refused", [0.1]) == "refused"


def test_without_the_peer_its_rows_say_so(benchmark, arms, results, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.PEER not in arms.installed()
    found = {
        name: {kill: {"w": torch.zeros(1)} for kill in ("whole", *benchmark.killed())} for name in arms.installed()
    }
    rows = benchmark.arm_rows(found, [found, found], {"w": torch.zeros(1)})
    assert row_of(rows, benchmark.PEER) == {"arm": benchmark.PEER, "missing": "not installed"}
    steps = benchmark.step_rows(
        {name: [{"frozen": 1.0, "unfrozen": 2.0, "change": 3.0}] for name in (*arms.installed(), benchmark.AGAIN)}
    )
    schedulers = benchmark.scheduler_rows(
        {name: {key: [0.1] for key in benchmark.SCHEDULERS} for name in ("", *arms.installed())}
    )
    text = benchmark.page({**results, "arms": rows, "steps": steps, "schedulers": schedulers})
    assert text.count("| finetuning-scheduler | not installed | - |") >= 2
    assert "not installed" in next(
        line for line in text.splitlines() if line.startswith("| finetuning-scheduler | not")
    )


def test_the_worse_of_two_processes_counts(benchmark):
    def found(whole, resumed):
        kills = {kill: {"w": torch.tensor([resumed])} for kill in benchmark.killed()}
        return {name: {"whole": {"w": torch.tensor([whole])}, **kills} for name in benchmark.ARMS}

    one, first, second = found(1.0, 1.5), found(1.0, 1.0), found(1.25, 3.25)
    for ranks, apart in (([first, second], 0.25), ([second, first], 0.25), ([first, first], 0)):
        row = benchmark.arm_rows(one, ranks, {"w": torch.tensor([3.0])})[1]
        assert (row["between_ranks"], row["from_single"], row["single_from_loop"]) == (apart, apart, 2)
        assert row["resume"]["step 4"] == {"where": "at the change, last batch", "one": 0.5, "two": 2 if apart else 0}
        assert row["right"] is (apart == 0)


def test_every_arm_has_its_turn_in_every_round(arms, runs, monkeypatch, tmp_path):
    turns = []

    def fit(arm, task, folder, clock):
        turns.append(arm)
        clock.starts = list(range(2 * task.steps))

    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(runs, "installed", lambda: {"ours": "a", "other": "b"})
    times = runs.time_arms(4, tmp_path)
    assert "".join(turns) == "aba" + "baa" + "aab" + "aba"  # ours comes twice
    assert times == {name: [{"frozen": 1, "unfrozen": 1, "change": 0}] * 4 for name in ("ours", "other", runs.AGAIN)}


def test_two_processes_share_a_batch_as_a_distributed_sampler_deals_it(arms, monkeypatch):
    x, _ = arms.EXACT.rows()
    monkeypatch.setattr(arms, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(arms, "rank", lambda rank=rank: rank)
        dealt = list(DistributedSampler(range(x.shape[0] * x.shape[1]), 2, rank, shuffle=False))
        found = torch.cat([batch for batch, _ in arms.InOrder(arms.EXACT)])
        assert torch.equal(found, x.flatten(0, 1)[dealt])


def test_the_loader_goes_on_where_it_was(arms):
    loader, whole = arms.InOrder(arms.EXACT), [batch[0] for batch in arms.InOrder(arms.EXACT)]
    batches = iter(loader)
    next(batches), next(batches), next(batches)
    other = arms.InOrder(arms.EXACT)
    other.load_state_dict(loader.state_dict())
    assert torch.equal(torch.cat([batch[0] for batch in other]), whole[3])
    assert len(list(other)) == 4  # the next epoch is whole
    other.load_state_dict(other.state_dict())
    assert len(list(other)) == 4


def test_times_are_those_of_the_steps_between_the_ends_of_a_phase(runs):
    # Six steps an epoch: 2 s each, but the first ones slow and 5 s more at the end of the epoch; then 3 s, the first with 4 s more.
    taken = [9, 9, 9, 9, 2, 2 + 5, 3 + 4, 8, 8, 8, 3]
    starts = [float(sum(taken[:count])) for count in range(len(taken) + 1)]
    assert runs.phases(starts, steps=6) == {"frozen": 2, "unfrozen": 3, "change": 9}


def test_the_ratio_is_taken_round_by_round(benchmark):
    # The third round is slow for everybody.
    assert benchmark.ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == {"low": 2, "median": 2, "high": 2}


def test_ours_is_compared_with_the_fastest_that_is_right(benchmark):
    target = sys.modules["schedule_tables"].step_target
    ratios = {"wrong": 0.5, "fast": 0.9, "slow": 2.0}
    arms = [{"arm": "ours", "right": True}, *({"arm": name, "right": name != "wrong"} for name in ratios)]
    rows = [
        {"arm": name, "frozen_ms": value, "frozen_ratio": {"low": value - 0.1, "median": value, "high": value + 0.1}}
        for name, value in {"ours": 1.0, **ratios}.items()
    ]
    found = target("frozen", rows, arms)
    assert found["target"] == "frozen step, of the fastest right one (fast)"
    assert found["ours"] == pytest.approx(1 / 0.9)
    assert found["shown"] == "1.11 (1.00-1.25)"
    assert not found["met"]


def test_a_resumed_run_that_stops_is_shown_by_its_error(benchmark):
    tables = sys.modules["schedule_tables"]
    row = {"resume": {"a": {"one": 0.0}, "b": {"one": "TypeError: text"}, "c": {"one": 0.25}}}
    assert tables.resumed(row, "one") == "2.5e-01, TypeError"
    assert tables.worst([0.0, "KeyError: text", 1.0]) == "KeyError: text"
    assert tables.number(0.0) == "0"


def test_every_head_only_arm_has_its_turn(benchmark):
    head = sys.modules["schedule_head"]
    size = head.Encoder(hidden=32, layers=1, vocabulary=50, rows=2, tokens=4, steps=4)
    times = head.time_head_only(2, size)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys(head.HEAD_ARMS, 2)
    assert all(seconds > 0 for found in times.values() for seconds in found)
    assert row_of(benchmark.head_rows(times), head.HAND)["ratio"] == {"low": 1, "median": 1, "high": 1}


def test_no_part_of_a_head_only_step_computes_gradients_of_the_backbone(benchmark):
    """What the times say, exactly: the graph of the loss ends at the head."""
    head = sys.modules["schedule_head"]
    size = head.Encoder(hidden=32, layers=1, vocabulary=50, rows=2, tokens=4, steps=2)
    seen = []

    class Looks(head.pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            leaves, todo = set(), [loss.grad_fn]
            while todo:
                node = todo.pop()
                leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
                todo += [following for following, _ in node.next_functions if following is not None]
            seen.append(leaves == {id(parameter) for parameter in pl_module.head.parameters()})

    head.by_trainer(size, head.head_only(size), Looks())
    head.by_trainer(size, Looks(), no_grad=True)
    assert seen == [True] * 4

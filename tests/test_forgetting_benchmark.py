"""The tables of docs/forgetting.md are those of the results, and say what the results say."""

import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "forgetting_digits.json"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import forgetting_tables

    yield forgetting_tables
    sys.modules.pop("forgetting_tables", None)


def test_the_page_holds_the_tables_of_the_results(tables):
    made = tables.page(json.loads(RESULTS.read_text()))
    assert f"<!-- digits -->\n{made}<!-- /digits -->\n" in (ROOT / "docs" / "forgetting.md").read_text()


def test_every_arm_has_ten_seeds_in_both_scenarios(tables):
    rows = json.loads(RESULTS.read_text())
    for arm in {row["arm"] for row in rows}:
        for scenario in ("classes", "turned"):
            assert sorted(row["seed"] for row in tables.of(rows, arm, scenario)) == list(range(10))


def run(arm, scenario, seed, old, new, ratio=0.0):
    before = {"old": 100.0, "new": 0.0, "report": 100.0}
    after = {"old": 100.0 - old, "new": new, "report": 100.0 - old}
    return {"arm": arm, "scenario": scenario, "seed": seed, "before": before, "after": after, "ratio": ratio}


@pytest.mark.parametrize(
    ("drops", "new", "verdicts"),
    [((4, 6), 94.5, "ok ok ok"), ((4, 8), 94.5, "missed missed ok"), ((4, 5), 93.0, "ok ok missed")],
)
def test_a_target_that_is_missed_is_called_so(drops, new, verdicts, tables):
    rows = []
    for scenario in ("classes", "turned"):
        rows += [run("fixed 10%", scenario, seed, 20, 99) for seed in range(2)]  # keeps no budget
        rows += [run("fixed 40%", scenario, seed, 4, 95) for seed in range(2)]
        rows += [run("ForgettingBudget(0.05)", scenario, seed, drop, new) for seed, drop in enumerate(drops)]
    _, targets = tables.frontier(rows)
    assert [line.split("|")[-2].strip() for line in targets[2:]] == verdicts.split()


def test_mean_and_standard_error_are_the_usual_ones(tables):
    values = [1.0, 2.0, 4.0, 9.0]
    mean, error = tables.spread(values)
    assert mean == 4.0
    assert error == pytest.approx(statistics.stdev(values) / 2)

"""The benchmarks of decoding run small, and their committed figures hold what the page says."""

import json
import re
from pathlib import Path

import pytest

from lightning_peft.decoding.draft import Draft

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "decoding.md"


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grammar_task

    return grammar_task


def body(text: str) -> Draft:
    return Draft(text, prompt="def f(a, b):\n")


@pytest.mark.parametrize(
    ("text", "valid", "ok"),
    [
        ("    return a\n", True, True),
        ("    c = max(a, b)\n    return c\n", True, True),
        ("    return c\n", True, False),
        ("    return c\n    c = a\n", True, False),
        ("    x = a\n", True, False),
        ("    return\n", True, False),
        ("    return a\nb\n", True, False),
        ("    return (a\n", False, False),
        ("", False, False),
    ],
)
def test_the_verdicts_are_what_they_say(task, text, valid, ok):
    assert (task.is_valid(body(text)), task.is_ok(body(text))) == (valid, ok)


def test_every_program_of_the_task_is_ok_and_can_be_written(task):
    rng = task.random.Random(3)
    for _ in range(200):
        head, text = task.program(rng)
        assert task.is_ok(Draft(text, prompt=head))
        tokens = task.CharTokenizer()(head + text)["input_ids"]
        assert task.CharTokenizer().batch_decode([tokens]) == [head + text]


def test_the_comparison_runs_small(task, monkeypatch, tmp_path):
    import grammar_search

    page, out = tmp_path / "page.md", tmp_path / "out.json"
    options = ["--seeds", "1", "--prompts", "2", "--steps", "2", "--out", str(out), "--page", str(page)]
    monkeypatch.setattr("sys.argv", ["grammar_search", *options])
    monkeypatch.setattr(grammar_search, "LENGTH", 8)
    grammar_search.main()
    rows = json.loads(out.read_text())["rows"]
    assert rows.keys() == grammar_search.arms().keys()
    assert page.read_text().count("\n| ") == len(rows) + 2


@pytest.mark.parametrize(("name", "section"), [("grammar_search", "grammar"), ("beam_search", "speed")])
def test_the_page_shows_the_committed_figures(name, section):
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    part = re.search(rf"<!-- {section} -->(.*)<!-- end of {section} -->", PAGE.read_text(), re.DOTALL)
    assert part
    for setting, found in rows.items():
        line = next(line for line in part[1].splitlines() if line.startswith(f"| {setting} |"))
        if section == "speed":
            assert f"{found['ratio']:.2f} (" in line
        else:
            assert f"| {sum(row['valid'] for row in found) / len(found):.2f} (" in line

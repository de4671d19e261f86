"""The split of a weight's way is that of the sum over every step, to the order that it claims."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, NAdam, RAdam, RMSprop

from lightning_peft.drift import Drift, decay_rate


def constant(step: int) -> float:
    return 3e-3


def cosine(step: int) -> float:
    return 3e-3 * (1 + math.cos(math.pi * step / 480)) / 2


def warm_up(step: int) -> float:
    return cosine(step) * min(1.0, (step + 1) / 40)


def run(every: int, rate, *, steps: int = 480, noise: float = 0.0) -> float:
    """Train a weight on a smooth loss in float64; return the relative error of its decay."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, generator=generator, dtype=torch.float64)
    target = torch.randn(50, generator=generator, dtype=torch.float64)
    drift, start, exact = Drift(weight.clone()), weight.clone(), torch.zeros_like(weight)
    for step in range(steps):
        drift.count(rate(step))
        exact -= rate(step) * weight
        shaken = target + noise * torch.randn(50, generator=generator, dtype=torch.float64)
        weight = weight - rate(step) * weight - 0.02 * (weight - shaken)
        if (step + 1) % every == 0:
            norms = drift.look(weight)
            drift.settle(weight)
    decay = drift.decayed + drift.booked * weight  # without the share that is booked for what comes
    assert torch.allclose(norms["decay"], decay.norm(), rtol=1e-12)
    assert torch.allclose(norms["gradient"], (weight - start - decay).norm(), rtol=1e-12)
    assert torch.allclose(norms["distance"], (weight - start).norm(), rtol=1e-12)
    return float((decay - exact).norm() / exact.norm())


def test_looking_at_every_step_gives_the_sum_over_the_steps():
    assert run(1, constant) < 1e-13
    assert run(1, warm_up) < 2e-4  # each rate but the first is booked as large as the one before


@pytest.mark.parametrize(("rate", "most"), [(constant, 0.011), (cosine, 0.022), (warm_up, 0.016)])
def test_the_error_falls_with_the_square_of_the_interval(rate, most):
    """The weight moves by more than its own length here, nearly all of it in the first hundred steps."""
    errors = [run(every, rate) for every in (40, 20, 10)]
    assert errors[0] < most
    assert math.log2(errors[0] / errors[2]) / 2 > 1.8  # the order


def test_noise_between_looks_costs_an_order():
    errors = [run(every, cosine, noise=1.0) for every in (40, 10)]
    assert errors[1] < errors[0] / 2
    assert errors[0] < 0.03


def test_on_a_straight_line_the_split_is_exact_for_any_interval():
    weight, step_vector = torch.ones(3, dtype=torch.float64), torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    drift, exact = Drift(weight.clone()), torch.zeros(3, dtype=torch.float64)
    for step in range(30):
        drift.count(0.01)
        exact -= 0.01 * weight
        weight = weight + step_vector
        if step % 10 == 9:
            decay = drift.look(weight)["decay"]
            drift.settle(weight)
    assert float(decay) == pytest.approx(float(exact.norm()), rel=1e-13)


@pytest.mark.parametrize("sizes", [[0.01] * 5, [0.0, 0.01, 0.02, 0.04, 0.04], [0.04, 0.001, 0.0, 0.03, 0.01]])
def test_within_the_first_interval_the_rates_of_every_step_count(sizes):
    """On a straight line the first interval is exact also for rates that change from step to step."""
    weight = start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    drift, exact = Drift(start.clone()), torch.zeros(2, dtype=torch.float64)
    for size in sizes:
        drift.count(size)
        exact -= size * weight
        weight = weight + torch.tensor([0.3, 0.1], dtype=torch.float64)
    assert float(drift.look(weight)["decay"]) == pytest.approx(float(exact.norm()), rel=1e-13)


def test_decay_that_begins_late_is_taken_of_the_weights_that_stand_then():
    drift, weight = Drift(torch.zeros(2)), torch.tensor([3.0, 4.0])
    drift.count(0.0)
    drift.settle(weight)
    for _ in range(3):  # the weight stays, as if the gradient put back what decay takes
        drift.count(0.1)
    norms = drift.look(weight)
    assert float(norms["decay"]) == pytest.approx(0.3 * 5)
    assert float(norms["gradient"]) == pytest.approx(1.3 * 5)


def test_a_look_changes_nothing():
    drift, weight = Drift(torch.ones(2)), torch.tensor([1.0, 3.0])
    for _ in range(3):
        drift.count(0.1)
    first = drift.look(weight)
    assert drift.look(weight) == first
    drift.settle(weight)
    drift.count(0.2)
    before = {**drift.state_dict(), "decayed": drift.decayed.clone()}
    drift.look(weight + 1)
    assert torch.equal(before.pop("decayed"), drift.decayed)
    assert before == {key: value for key, value in drift.state_dict().items() if key != "decayed"}


def test_a_weight_that_never_decays_keeps_no_second_copy_and_owes_all_to_the_gradient():
    drift = Drift(torch.zeros(2))
    drift.count(0.0)
    norms = drift.look(torch.tensor([3.0, 4.0]))
    drift.settle(torch.tensor([3.0, 4.0]))
    assert drift.decayed is None
    assert {kind: float(norm) for kind, norm in norms.items()} == {
        "start": 0.0, "weight": 5.0, "distance": 5.0, "decay": 0.0, "gradient": 5.0,
    }  # fmt: skip


def test_one_step_of_unknown_decay_takes_the_split_away_for_good():
    drift = Drift(torch.ones(2))
    for rate in (0.1, None, 0.1):
        drift.count(rate)
        norms = drift.look(torch.zeros(2))
        drift.settle(torch.zeros(2))
        assert ("decay" in norms) is ("gradient" in norms) is drift.known
    assert not drift.known
    assert drift.decayed is None


def test_of_bfloat16_weights_the_decay_is_summed_in_float32():
    """Rates of 1e-5 would vanish in bfloat16, whose numbers are 1/128 apart at 1."""
    weight = torch.ones(4, dtype=torch.bfloat16)
    drift = Drift(weight.clone())
    for _ in range(100):
        drift.count(1e-5)
        norms = drift.look(weight)
        drift.settle(weight)
    assert float(norms["decay"]) == pytest.approx(2 * 100 * 1e-5, rel=1e-5)
    assert float(norms["distance"]) == 0.0


KNOWN = [
    lambda p: AdamW(p, lr=0.1, weight_decay=0.3),
    lambda p: AdamW(p, lr=torch.tensor(0.1), weight_decay=0.3),
    lambda p: Adam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    lambda p: NAdam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    lambda p: RAdam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    lambda p: Adafactor(p, lr=0.1, weight_decay=0.3),
    lambda p: Muon(p, lr=0.1, weight_decay=0.3),
    lambda p: SGD(p, lr=0.1, weight_decay=0.3),
]
UNKNOWN = [
    lambda p: Adam(p, lr=0.1, weight_decay=0.3),
    lambda p: NAdam(p, lr=0.1, weight_decay=0.3),
    lambda p: RAdam(p, lr=0.1, weight_decay=0.3),
    lambda p: SGD(p, lr=0.1, weight_decay=0.3, momentum=0.9),
    lambda p: RMSprop(p, lr=0.1, weight_decay=0.3),
    lambda p: type("Other", (AdamW,), {})(p, lr=0.1, weight_decay=0.3),
]


@pytest.mark.parametrize("make", KNOWN)
def test_a_step_without_gradient_takes_off_the_rate_and_nothing_else(make):
    weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    start, optimizer = weight.detach().clone(), make([weight])
    for _ in range(2):  # the second step too, where moments exist
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        rate = decay_rate(optimizer, optimizer.param_groups[0])
        assert torch.allclose(weight, before * (1 - rate), rtol=1e-6)
    assert rate == pytest.approx(0.03)
    assert not torch.allclose(weight, start)


@pytest.mark.parametrize("make", UNKNOWN)
def test_a_decay_that_passes_through_the_optimizer_is_not_guessed(make):
    optimizer = make([nn.Parameter(torch.randn(3))])
    assert decay_rate(optimizer, optimizer.param_groups[0]) is None
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert decay_rate(optimizer, optimizer.param_groups[0]) == 0.0

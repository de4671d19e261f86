"""Optimizer groups: everything that trains is in exactly one, and B learns at its own rate."""

import pytest
import torch
from torch import nn

from lightning_peft import FullFinetune, LinearProbe, LoRA, add_adapter, parameter_groups


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def test_every_parameter_that_trains_is_in_exactly_one_group():
    net = nn.ModuleDict({"backbone": add_adapter(network(), LoRA(rank=2)), "head": nn.Linear(4, 2)})
    grouped = [p for group in parameter_groups(net, lr=1e-3, lora_plus=16) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == 4 + 2
    assert {id(p) for p in grouped} == {id(p) for p in net.parameters() if p.requires_grad}


def test_b_steps_as_many_times_as_far_as_under_one_rate():
    # Adam's first step has the length of its learning rate, whatever the gradient.
    def moved(**options) -> dict[str, float]:
        torch.manual_seed(0)
        net = add_adapter(network(), LoRA(rank=2)).double()
        nn.init.ones_(net[0].lora_B["default"])  # else the gradient of A is zero
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        optimizer = torch.optim.Adam(parameter_groups(net, **options), eps=0)
        net(torch.randn(8, 6).double()).square().sum().backward()
        optimizer.step()
        return {name: (p - before[name]).abs().max().item() for name, p in net.named_parameters()}

    steps = moved(lr=1e-3, lora_plus=16)
    assert steps["0.lora_B.default"] == pytest.approx(16e-3)
    assert steps["0.lora_A.default"] == pytest.approx(1e-3)
    assert steps["0.weight"] == 0
    plain = moved(lr=1e-3)
    assert plain["0.lora_B.default"] == pytest.approx(1e-3)
    assert plain["0.lora_A.default"] == pytest.approx(1e-3)


def test_a_network_without_lora_is_one_group():
    net = add_adapter(network(), FullFinetune())
    assert [(group["name"], len(group["params"])) for group in parameter_groups(net, lr=0.1)] == [("other", 4)]


@pytest.mark.parametrize(
    ("options", "named"), [({"lr": 0.0}, "lr=0.0"), ({"lr": 1.0, "lora_plus": -2}, "lora_plus=-2")]
)
def test_rates_that_cannot_train_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        parameter_groups(network(), **options)


def test_a_network_that_is_all_frozen_is_refused():
    with pytest.raises(ValueError, match="no parameter of this Sequential requires a gradient"):
        parameter_groups(add_adapter(network(), LinearProbe()), lr=0.1)

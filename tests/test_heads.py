"""The output layer of a head, found and zeroed."""

import math

import pytest
import torch
from torch import nn

from lightning_peft.heads import output_layer, prior_bias, zero_init


def deep_head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softplus())


def test_a_linear_head_is_its_own_output_layer(net):
    assert output_layer(net, "head") is net.head


def test_the_last_linear_layer_of_a_deep_head_is_its_output_layer():
    head = deep_head()
    assert output_layer(nn.ModuleDict({"model": nn.ModuleDict({"head": head})}), "model.head") is head[2]


def test_an_unknown_head_names_the_nearest_modules(net):
    with pytest.raises(ValueError, match=r"Caller: head='haed' is no module of Toy. Nearest: head"):
        output_layer(net, "haed", owner="Caller")


@pytest.mark.parametrize("head", ["", "backbone.1"])
def test_a_head_without_a_linear_layer_is_refused(net, head):
    with pytest.raises(ValueError, match=rf"head='{head}'"):
        output_layer(net, head)


def test_a_head_that_shares_its_weight_with_an_embedding_is_refused(net):
    net.embed, net.head = nn.Embedding(9, 8), nn.Linear(8, 9)
    assert output_layer(net, "head") is net.head
    net.head.weight = net.embed.weight
    with pytest.raises(ValueError, match=r"Caller: head='head' shares its weight with \['embed'\], so zeroing it"):
        output_layer(net, "head", owner="Caller")


@pytest.mark.parametrize("bias", [True, False])
def test_a_zeroed_layer_gives_zeros_and_sends_no_gradient_back_but_learns(bias):
    layer = nn.Linear(8, 3, bias=bias)
    zero_init(layer)
    features = torch.randn(5, 8, requires_grad=True)
    logits = layer(features)
    assert torch.equal(logits, torch.zeros(5, 3))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 0])).backward()
    assert torch.equal(features.grad, torch.zeros(5, 8))
    assert layer.weight.grad.abs().sum() > 0


def test_zeroing_keeps_the_parameters_objects_and_their_gradient_flags():
    layer = nn.Linear(8, 3)
    weight, bias = layer.weight, layer.bias
    zero_init(layer)
    assert layer.weight is weight
    assert layer.bias is bias
    assert weight.requires_grad
    assert bias.requires_grad


@pytest.mark.parametrize(
    ("batches", "outputs", "expected"),
    [
        ([[0, 0, 2], [2, 2, 2, -100, 1, 1]], 3, [math.log(2 / 8), math.log(2 / 8), math.log(4 / 8)]),
        ([[0, 0, 0]], 2, [math.log(3 / 4), math.log(1 / 4)]),  # a class that no row has
        ([[0, 0, 0, 1]], 1, [math.log(1 / 3)]),
        ([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]], 2, [math.log(3), math.log(1 / 3)]),
        ([[True, False, False, False]], 1, [math.log(1 / 3)]),
        ([[[1.0, 0.0], [1.0, 1.0]], [[4.0, 0.5]]], 2, [2.0, 0.5]),
        ([[3.0], [4.0, 5.0]], 1, [4.0]),
        ([[[0, 1], [1, -100]]], 2, [math.log(1 / 3), math.log(2 / 3)]),  # a class for every token
    ],
)
def test_a_prior_is_what_predicts_the_average_target(batches, outputs, expected):
    found = prior_bias([torch.tensor(batch) for batch in batches], outputs)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("batches", "outputs", "message"),
    [
        ([], 2, "gave no target"),
        ([[-100, -100]], 2, "gave no target"),
        ([[0, 3]], 3, "a target is class 3, and the head has 3 outputs"),
        ([[0.5, 0.5, 0.1]], 2, r"targets of shape \(3,\) do not fit a head of 2 outputs"),
        ([[0, 1], [[0.5, 0.5]]], 2, "some batches have whole numbers"),
    ],
)
def test_targets_that_fit_no_head_are_refused(batches, outputs, message):
    with pytest.raises(ValueError, match=f"Caller: .*{message}"):
        prior_bias([torch.tensor(batch) for batch in batches], outputs, owner="Caller")

"""The output layer of a head, found and zeroed."""

import pytest
import torch
from torch import nn

from lightning_peft.heads import output_layer, zero_init


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

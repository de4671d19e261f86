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
        nn.init.ones_(net[0].adapters["default"].lora_B)  # else the gradient of A is zero
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        optimizer = torch.optim.Adam(parameter_groups(net, **options), eps=0)
        net(torch.randn(8, 6).double()).square().sum().backward()
        optimizer.step()
        return {name: (p - before[name]).abs().max().item() for name, p in net.named_parameters()}

    steps = moved(lr=1e-3, lora_plus=16)
    assert steps["0.adapters.default.lora_B"] == pytest.approx(16e-3)
    assert steps["0.adapters.default.lora_A"] == pytest.approx(1e-3)
    assert steps["0.weight"] == 0
    plain = moved(lr=1e-3)
    assert plain["0.adapters.default.lora_B"] == pytest.approx(1e-3)
    assert plain["0.adapters.default.lora_A"] == pytest.approx(1e-3)


def test_a_network_without_lora_is_one_group():
    net = add_adapter(network(), FullFinetune())
    assert [(group["name"], len(group["params"])) for group in parameter_groups(net, lr=0.1)] == [("other", 4)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": 1.0, "lora_plus": -2}, "lora_plus=-2"),
        ({"lr": 1.0, "layer_decay": 0.0}, "layer_decay=0.0"),
        ({"lr": 1.0, "layer_decay": 1.5}, "layer_decay=1.5"),
        ({"lr": 1.0, "layer_decay": 0.9}, "this Sequential has no nn.ModuleList or nn.Sequential .* layer_decay"),
    ],
)
def test_rates_that_cannot_train_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        parameter_groups(network(), **options)


def test_a_network_that_is_all_frozen_is_refused():
    with pytest.raises(ValueError, match="no parameter of this Sequential requires a gradient"):
        parameter_groups(add_adapter(network(), LinearProbe()), lr=0.1)


def bert():
    import transformers

    shared = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **shared))


def rates(module: nn.Module, **options) -> dict[str, float]:
    """The learning rate of every parameter by its name; each in exactly one group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, float] = {}
    for group in parameter_groups(module, **options):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"]
    assert found.keys() == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return found


def test_rates_fall_from_the_head_to_the_embeddings():
    decayed = rates(bert(), lr=1.0, layer_decay=0.5)
    for name, rate in decayed.items():
        place = name.removeprefix("bert.").split(".")
        expected = {"encoder": 0.5 ** (3 - int((place + ["0"] * 3)[2])) if place[0] == "encoder" else 0.0}
        assert rate == {**expected, "embeddings": 0.5**4, "pooler": 1.0, "classifier": 1.0}[place[0]], name


def test_groups_are_named_by_depth_and_kind():
    model = add_adapter(bert(), LoRA(rank=2, targets=["*.query", "classifier"], train_also=["bert.embeddings"]))
    groups = parameter_groups(model, lr=1.0, lora_plus=8, layer_decay=0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("embeddings.other", 0.5**4),
        ("layer0.lora_B", 1.0),
        ("layer0.other", 0.125),
        ("layer1.lora_B", 2.0),
        ("layer1.other", 0.25),
        ("layer2.lora_B", 4.0),
        ("layer2.other", 0.5),
        ("top.lora_B", 8.0),
        ("top.other", 1.0),
    ]
    rates(model, lr=1.0, lora_plus=8, layer_decay=0.5)


def test_without_decay_the_groups_are_the_two_of_old():
    groups = parameter_groups(add_adapter(bert(), LoRA(rank=2)), lr=1.0, layer_decay=1.0)
    assert [group["name"] for group in groups] == ["lora_B", "other"]


def test_a_head_that_is_registered_before_its_backbone_is_no_embedding():
    module = nn.ModuleDict({"head": nn.Linear(16, 2), "backbone": bert().bert})
    decayed = rates(module, lr=1.0, layer_decay=0.5)
    assert decayed["head.weight"] == 1.0
    assert decayed["backbone.embeddings.word_embeddings.weight"] == 0.5**4


def test_patch_embeddings_that_lie_further_out_than_the_stack_are_below_it():
    # torchvision's vision transformer: positions inside the encoder, the convolution and the class token outside of it
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 2, 4))
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.ln = nn.LayerNorm(4)

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.token = nn.Conv2d(3, 4, 2), nn.Parameter(torch.zeros(1, 1, 4))
            self.encoder, self.head = Encoder(), nn.Linear(4, 2)

    decayed = rates(Vision(), lr=1.0, layer_decay=0.5)
    below = {name for name, rate in decayed.items() if rate == 0.5**3}
    assert below == {"token", "patches.weight", "patches.bias", "encoder.positions"}
    assert {name for name, rate in decayed.items() if rate == 1.0} == {
        *("encoder.ln.weight", "encoder.ln.bias", "head.weight", "head.bias")
    }


def test_experts_inside_a_layer_are_no_layers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])

    decayed = rates(nn.Sequential(Block(), Block()), lr=1.0, layer_decay=0.5)
    assert decayed["1.experts.4.weight"] == 0.5
    assert decayed["0.experts.4.weight"] == 0.25


def test_layers_count_as_alike_though_some_are_adapted():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    add_adapter(net, LoRA(rank=2, targets=["1"]))
    assert rates(net, lr=1.0, layer_decay=0.5) == {
        "1.adapters.default.lora_A": 0.25,
        "1.adapters.default.lora_B": 0.25,
    }


def test_an_output_embedding_that_is_the_input_s_learns_like_the_input_s():
    import transformers

    config = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    decayed = rates(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)), lr=1.0, layer_decay=0.5)
    assert decayed["transformer.wte.weight"] == 0.5**3
    assert decayed["transformer.h.1.attn.c_attn.weight"] == 0.5
    assert decayed["transformer.ln_f.weight"] == 1.0


def test_a_layer_s_weight_that_is_an_embedding_s_too_learns_like_the_embedding_s():
    net = nn.ModuleDict({"embed": nn.Embedding(4, 4), "layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    net["layers"][1].weight = net["embed"].weight
    decayed = rates(net, lr=1.0, layer_decay=0.5)
    assert decayed["embed.weight"] == 0.5**3
    assert decayed["layers.1.bias"] == 0.5

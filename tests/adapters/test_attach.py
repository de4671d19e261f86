"""Adding, removing, merging, switching off: laws that hold for every adapter."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import (
    FullFinetune,
    LinearProbe,
    LoRA,
    adapter_disabled,
    adapter_state_dict,
    add_adapter,
    merge_adapter,
    remove_adapter,
    unmerge_adapter,
)
from tests.adapters.test_lora import small, trained
from tests.toy import same, weights

ADAPTERS = [LoRA(rank=2), LinearProbe(), FullFinetune()]


def names(adapter) -> str:
    return type(adapter).__name__


@pytest.mark.parametrize("adapter", ADAPTERS, ids=names)
def test_removing_gives_back_the_network_and_the_flags_found(adapter):
    model = small()
    model[2].weight.requires_grad_(False)
    before, flags = weights(model), [parameter.requires_grad for parameter in model.parameters()]
    remove_adapter(add_adapter(model, adapter))
    assert same(weights(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    add_adapter(model, adapter)


def test_what_trains_is_what_the_adapter_says():
    trains = {}
    for adapter in ADAPTERS:
        model = add_adapter(small(), adapter)
        trains[names(adapter)] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains["LoRA"] == [
        "0.adapters.default.lora_A",
        "0.adapters.default.lora_B",
        "2.adapters.default.lora_A",
        "2.adapters.default.lora_B",
    ]
    assert trains["LinearProbe"] == []
    assert trains["FullFinetune"] == ["0.weight", "0.bias", "2.weight"]


def test_merging_keeps_outputs_and_unmerging_restores_bits():
    model, x = trained(small().double()), torch.randn(5, 6, dtype=torch.float64)
    before, output = weights(model), model(x)
    merge_adapter(merge_adapter(model))
    assert torch.allclose(model(x), output, rtol=0, atol=1e-12)
    assert not torch.equal(model[0].weight, before["0.weight"])
    unmerge_adapter(unmerge_adapter(model))
    assert same(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_restores_bits_in_every_dtype(dtype):
    model = trained(small().to(dtype))
    before = weights(model)
    unmerge_adapter(merge_adapter(model))
    assert same(weights(model), before)


def test_a_merged_weight_is_rounded_once():
    model = trained(small().to(torch.bfloat16))
    layer = model[0]
    a, b = (layer.adapters["default"].lora_A.double(), layer.adapters["default"].lora_B.double())
    exact = (layer.weight.double() + 8 * b @ a).detach()
    merge_adapter(model)
    assert ((layer.weight.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_a_merged_and_unloaded_network_is_plain():
    model, x = trained(small().double()), torch.randn(5, 6, dtype=torch.float64)
    output = model(x)
    merge_adapter(model, unload=True)
    assert set(model.state_dict()) == set(small().state_dict())
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(x), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("merged", [False, True])
def test_a_disabled_adapter_leaves_the_pretrained_network(merged):
    base = small()
    model, x = trained(copy.deepcopy(base)), torch.randn(5, 6)
    output = (merge_adapter(model) if merged else model)(x)
    with adapter_disabled(model):
        assert torch.equal(model(x), base(x))
        with adapter_disabled(model):
            pass
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), output)


def test_a_network_that_trained_itself_cannot_pretend_to_be_pretrained():
    model = add_adapter(small(), FullFinetune())
    with (
        pytest.raises(ValueError, match="adapter_disabled: 3 weights of the network itself train"),
        adapter_disabled(model),
    ):
        pass


def test_removing_a_merged_adapter_restores_the_pretrained_weights():
    base = small()
    model = copy.deepcopy(base)
    remove_adapter(merge_adapter(trained(model)))
    assert same(weights(model), weights(base))


def test_the_adapter_state_is_what_trains():
    model = trained(small())
    assert set(adapter_state_dict(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(adapter_state_dict(add_adapter(small(), FullFinetune()))) == set(small().state_dict())


def test_a_plain_checkpoint_of_the_base_loads_before_and_after():
    base = small()
    model = add_adapter(small(), LoRA(rank=2))
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(model(torch.ones(1, 6)), base(torch.ones(1, 6)))


@pytest.mark.parametrize("function", [remove_adapter, merge_adapter, unmerge_adapter, adapter_state_dict])
def test_functions_refuse_a_network_without_adapter(function):
    with pytest.raises(ValueError, match="Sequential carries no adapter. add_adapter puts one on"):
        function(small())
    with pytest.raises(ValueError, match="Its module '0' does"):
        function(nn.Sequential(add_adapter(small(), LoRA(rank=2))))


def test_a_network_is_adapted_once():
    model = add_adapter(small(), LoRA(rank=2))
    with pytest.raises(ValueError, match="the network already carries an adapter 'default'"):
        add_adapter(model, LoRA(rank=2))
    with pytest.raises(ValueError, match="'0' inside already carries"):
        add_adapter(nn.Sequential(model), LoRA(rank=2))
    with pytest.raises(ValueError, match="name='a.b' must be a plain identifier"):
        add_adapter(small(), LoRA(rank=2), name="a.b")


def test_a_shared_layer_is_adapted_once_and_works_at_both_places():
    layer = nn.Linear(4, 4)
    model = add_adapter(nn.Sequential(layer, nn.Tanh(), layer), LoRA(rank=2))
    assert len([name for name, p in model.named_parameters() if p.requires_grad]) == 2
    assert model[0] is model[2]


@pytest.mark.parametrize("around", [False, True])
def test_a_base_loaded_after_the_adapter_is_what_comes_back_without_it(around):
    model, other = small(), small()
    add_adapter(model, LoRA(rank=2, targets=["0"], train_also=["2"]))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for net in (model, copied):
        pair = (nn.ModuleDict({"net": net}), nn.ModuleDict({"net": other})) if around else (net, other)
        pair[0].load_state_dict(pair[1].state_dict(), strict=False)
        with torch.no_grad():
            net[2].weight.add_(1.0)
        trained_state = copy.deepcopy(net.state_dict())
        net.load_state_dict(trained_state)  # of an adapted network: what was found stays
        x = torch.randn(3, 6)
        with adapter_disabled(net):
            assert torch.equal(net(x), other(x))
        remove_adapter(net)
        assert same(weights(net), weights(other))
        assert not net._load_state_dict_post_hooks

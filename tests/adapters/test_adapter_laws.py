"""Laws that hold for every way to adapt a network."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import add_adapter, merge_adapter, remove_adapter
from lightning_peft.adapters import adapter_disabled, adapter_state_dict, set_adapter, unmerge_adapter
from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.bitfit import BitFit
from lightning_peft.adapters.ia3 import IA3
from lightning_peft.adapters.layer_norm_tuning import LayerNormTuning
from lightning_peft.adapters.vera import VeRA
from tests.toy import same, weights

METHODS = [
    IA3(targets=["0", "2", "4"], feedforward=["4"]),
    VeRA(rank=3, targets=["0", "2", "4"]),
    BitFit(),
    LayerNormTuning(),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def move(model: nn.Module) -> nn.Module:
    """Let everything that trains be somewhere else."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@every_method
def test_adding_changes_no_output_bit_and_no_base_key(method):
    model = network()
    before, keys = model(X), set(model.state_dict())
    add_adapter(model, method)
    assert torch.equal(model(X), before)
    assert keys <= set(model.state_dict())


@every_method
def test_it_learns_and_nothing_else_moves(method):
    model = add_adapter(network(), method)
    before = weights(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert {name for name, value in weights(model).items() if not torch.equal(value, before[name])} == trains


@every_method
def test_merging_keeps_outputs_and_comes_undone_bit_for_bit(method):
    model = move(add_adapter(network(), method))
    before, values = model(X), weights(model)
    merge_adapter(model)
    assert torch.allclose(model(X), before, rtol=0, atol=1e-12)
    unmerge_adapter(model)
    assert same(weights(model), values)
    merge_adapter(model, unload=True)
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert torch.allclose(model(X), before, rtol=0, atol=1e-12)


@every_method
def test_removing_restores_the_network_bit_for_bit(method):
    model = network()
    before = weights(model)
    move(add_adapter(model, method))
    remove_adapter(model)
    assert same(weights(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]


@every_method
def test_the_pretrained_network_is_there_while_disabled(method):
    model = network()
    before = model(X)
    move(add_adapter(model, method))
    adapted = model(X)
    assert not torch.allclose(adapted, before, atol=1e-2)
    with adapter_disabled(model):
        assert torch.equal(model(X), before)
    assert torch.equal(model(X), adapted)


@every_method
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_shares_nothing(method, again):
    model = move(add_adapter(network(), method))
    other, before = again(model), model(X)
    assert torch.equal(other(X), before)
    move(other)
    assert not torch.equal(other(X), before)
    assert torch.equal(model(X), before)
    assert torch.equal(remove_adapter(other)(X), remove_adapter(model)(X))


@every_method
def test_of_two_each_acts_alone_and_keeps_its_values(method):
    model = network()
    base = model(X)
    move(add_adapter(model, method, name="one"))
    first = model(X)
    add_adapter(model, method, name="two")
    assert torch.equal(model(X), first)
    set_adapter(model, "two")
    assert torch.equal(model(X), base)
    second = move(model)(X)
    set_adapter(model, "one")
    assert torch.equal(model(X), first)
    set_adapter(model, "two")
    assert torch.equal(model(X), second)
    set_adapter(model, None)
    assert torch.equal(model(X), base)
    remove_adapter(model, "one")
    assert torch.equal(set_adapter(model, "two")(X), second)


@every_method
def test_saved_values_make_a_fresh_network_the_same(method):
    torch.manual_seed(5)
    base = network()
    model = move(add_adapter(copy.deepcopy(base), method))
    other = add_adapter(copy.deepcopy(base), method)
    missing, unexpected = other.load_state_dict(adapter_state_dict(model), strict=False)
    assert not unexpected
    assert torch.equal(other(X), model(X))


@every_method
def test_plain_data_describes_it(method):
    assert Adapter.from_plain(method.to_plain()) == method
    assert hash(method) == hash(copy.deepcopy(method))


@every_method
def test_a_network_that_does_not_fit_is_refused_and_left_alone(method):
    model = nn.Sequential(nn.Embedding(4, 3))
    assert method.refusal(model)
    with pytest.raises(ValueError, match=f"^{type(method).__name__}"):
        add_adapter(model, method)
    assert type(model[0]) is nn.Embedding
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_stays_one(method, dtype):
    model, x = network().to(dtype), X.to(dtype)
    before = model(x)
    add_adapter(model, method)
    assert torch.equal(model(x), before)
    model(x).float().sum().backward()
    added = [p for name, p in model.named_parameters() if ".adapters." in name]
    assert {p.dtype for p in added} <= {torch.float32}


@every_method
def test_autocast_runs_forward_and_backward(method):
    model = move(add_adapter(network().float(), method))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X.float())
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

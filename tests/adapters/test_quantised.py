"""LoRA on a base of int8 or int4 weights: it acts, trains, is copied and stored; what needs the weights is refused."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, add_adapter, merge_adapter, remove_adapter
from lightning_peft.adapters import adapter_disabled, adapter_state_dict
from lightning_peft.adapters.ia3 import IA3
from lightning_peft.adapters.quantised import is_quantised
from lightning_peft.adapters.vera import VeRA

quantization = pytest.importorskip("torchao.quantization")
granularity = pytest.importorskip("torchao.quantization.granularity")

METHODS = [LoRA(rank=2), VeRA(rank=3), IA3(targets=["0", "2"], feedforward=["2"])]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


BITS = {
    "int8": quantization.Int8WeightOnlyConfig,
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(32)),
}
CHOSEN = {"config": BITS["int8"]}


@pytest.fixture(autouse=True, params=BITS)
def bits(request, monkeypatch):
    """Every test with every width of the weights."""
    monkeypatch.setitem(CHOSEN, "config", BITS[request.param])


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    quantization.quantize_(net, CHOSEN["config"]())
    return net


def move(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return net


def test_the_base_is_recognised():
    net = network()
    assert is_quantised(net[0])
    assert is_quantised(add_adapter(net, LoRA(rank=2))[0])
    assert not is_quantised(nn.Linear(2, 2))


@every_method
def test_adding_changes_no_output_bit_and_removing_restores_it(method):
    net, x = network(), torch.randn(5, 64)
    before = net(x)
    add_adapter(net, method)
    assert torch.equal(net(x), before)
    adapted = move(net)(x)
    assert not torch.allclose(adapted, before, atol=1e-3)
    with adapter_disabled(net):
        assert torch.equal(net(x), before)
    remove_adapter(net)
    assert type(net[0]) is nn.Linear
    assert torch.equal(net(x), before)


def test_the_update_is_the_formula_on_the_int8_output():
    net, x = network(), torch.randn(5, 64)
    base = net[0](x)
    update = move(add_adapter(net, LoRA(rank=2, alpha=6.0)))[0].adapters["default"]
    assert torch.allclose(net[0](x), base + 3.0 * x @ update.lora_A.T @ update.lora_B.T, atol=1e-5)


@every_method
def test_gradients_reach_the_adapter_and_the_input_and_a_step_lowers_the_loss(method):
    net, x = add_adapter(network(), method), torch.randn(5, 64, requires_grad=True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in net.named_parameters() if ".adapters." not in name)


@every_method
def test_copies_and_checkpoints_carry_it(method):
    net, x = move(add_adapter(network(), method)), torch.randn(5, 64)
    other = copy.deepcopy(net)
    assert torch.equal(other(x), net(x))
    assert type(other[0].weight) is type(net[0].weight)
    move(other)
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    move(other)
    other.load_state_dict(adapter_state_dict(net), strict=False)
    assert torch.equal(other(x), net(x))


def test_masters_stay_float32_beside_a_bfloat16_base():
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    quantization.quantize_(net, CHOSEN["config"]())
    add_adapter(net, LoRA(rank=2))
    assert net[0].adapters["default"].lora_A.dtype == torch.float32
    assert net(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16


def test_eva_needs_no_weights_and_starts():
    net = add_adapter(network(), LoRA(rank=2, init="eva"), batches=[torch.randn(40, 64)])
    first = net[0].adapters["default"].lora_A
    assert torch.allclose(first @ first.T, torch.eye(len(first)), atol=1e-5)


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}, {"init": "orthogonal"}])
def test_starts_and_magnitudes_that_need_the_weights_are_refused(options):
    with pytest.raises(ValueError, match=r"LoRA: '0' cannot .*exclude=\['0'\]"):
        add_adapter(network(), LoRA(rank=2, **options))


@every_method
def test_merging_is_refused_and_changes_nothing(method):
    net, x = move(add_adapter(network(), method)), torch.randn(5, 64)
    before = net(x)
    with pytest.raises(ValueError, match="merge_adapter: .*quantised"):
        merge_adapter(net)
    assert torch.equal(net(x), before)

"""Combining LoRAs: sums are exact, merges are PEFT's, and what comes out is an ordinary LoRA."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, add_adapter, merge_adapter
from lightning_peft.adapters import set_adapter
from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.bitfit import BitFit
from lightning_peft.adapters.combine import compressed, dare, merge_adapters, ties


class Net(nn.Module):
    """One layer of every kind that can be combined."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 7, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(7, 10), Conv1D(6, 10)])
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).tanh()
        return self.blocks[1](self.blocks[0](hidden).tanh())


IDS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 8]])
EVERYWHERE = ("embed", "conv", "blocks.0", "blocks.1")


def network(**ranks: int) -> Net:
    """A network with a LoRA of every name, none of them zero."""
    torch.manual_seed(1)
    net = Net()
    for name, rank in ranks.items():
        add_adapter(net, LoRA(rank=rank, alpha=3.0, targets=EVERYWHERE, rank_pattern={"blocks.0": 1}), name=name)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return net


def delta(net: nn.Module, layer: str, name: str) -> torch.Tensor:
    """The update of a weight as a matrix, written out."""
    update = net.get_submodule(layer).adapters[name]
    return update.scale * update.lora_B.detach().flatten(1) @ update.lora_A.detach().flatten(1)


def test_the_linear_method_is_the_weighted_sum_of_the_updates():
    net = network(one=2, two=3)
    merge_adapters(net, {"one": 0.7, "two": -1.3}, "both")
    for layer in EVERYWHERE:
        expected = 0.7 * delta(net, layer, "one") - 1.3 * delta(net, layer, "two")
        assert torch.allclose(delta(net, layer, "both"), expected, rtol=0, atol=1e-12)
    both = attachment_of(net).adapters["both"]
    assert {layer: both.rank_of(layer) for layer in EVERYWHERE} == dict(zip(EVERYWHERE, (5, 5, 2, 5), strict=True))
    assert {both.scale_of(layer) for layer in EVERYWHERE} == {1.0}


def test_the_new_adapter_waits_acts_and_merges_like_any_other():
    net = network(one=2, two=3)
    before = net(IDS)
    merge_adapters(net, {"one": 1.0}, "copy")
    assert torch.equal(net(IDS), before)
    set_adapter(net, "copy")
    assert torch.allclose(net(IDS), before, rtol=0, atol=1e-12)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        f"{layer}.adapters.copy.lora_{matrix}" for layer in EVERYWHERE for matrix in "AB"
    }
    merge_adapter(net)
    assert torch.allclose(net(IDS), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_its_plain_data_makes_an_adapter_that_takes_its_values(method):
    net = merge_adapters(network(one=2, two=3), {"one": 0.5, "two": 0.5}, "both", method=method)
    again = add_adapter(network(), Adapter.from_plain(attachment_of(net).adapters["both"].to_plain()), name="both")
    again.load_state_dict(
        {key: value for key, value in net.state_dict().items() if "one" not in key and "two" not in key}
    )
    assert torch.equal(again(IDS), set_adapter(net, "both")(IDS))


def test_layers_that_one_adapter_leaves_out_take_the_other_alone():
    net = network(one=2)
    add_adapter(net, LoRA(rank=1, targets=["conv"]), name="two")
    nn.init.normal_(net.conv.adapters["two"].lora_B)
    merge_adapters(net, {"one": 1.0, "two": 2.0}, "both")
    assert torch.allclose(delta(net, "embed", "both"), delta(net, "embed", "one"), rtol=0, atol=1e-12)
    expected = delta(net, "conv", "one") + 2 * delta(net, "conv", "two")
    assert torch.allclose(delta(net, "conv", "both"), expected, rtol=0, atol=1e-12)


def test_a_start_other_than_zero_counts_from_there():
    net = nn.Sequential(nn.Linear(6, 5)).double()
    add_adapter(net, LoRA(rank=2, init="pissa"), name="one")
    nn.init.normal_(net[0].adapters["one"].lora_B)
    x = torch.randn(3, 6, dtype=torch.float64)
    before = net(x)
    merge_adapters(net, {"one": 1.0}, "two")
    assert torch.allclose(set_adapter(net, "two")(x), before, rtol=0, atol=1e-12)


def test_a_rank_compresses_to_the_best_approximation():
    net = network(one=2, two=3)
    merge_adapters(net, {"one": 1.0, "two": 1.0}, "both", rank=2)
    for layer in EVERYWHERE:
        full = delta(net, layer, "one") + delta(net, layer, "two")
        u, s, vt = torch.linalg.svd(full)
        expected = u[:, :2] @ torch.diag(s[:2]) @ vt[:2]
        assert torch.allclose(delta(net, layer, "both"), expected, rtol=0, atol=1e-12)
        assert net.get_submodule(layer).adapters["both"].rank == 2


def test_ranks_stop_at_the_size_of_a_layer_without_loss():
    net = network(a=4, b=4, c=4)
    merge_adapters(net, dict.fromkeys("abc", 1.0), "all")
    expected = sum(delta(net, "blocks.1", name) for name in "abc")
    assert attachment_of(net).adapters["all"].rank_of("blocks.1") == 6
    assert torch.allclose(delta(net, "blocks.1", "all"), expected, rtol=0, atol=1e-12)


def test_ties_is_the_paper_s_three_steps_written_out():
    net = network(one=2, two=3, three=1)
    weights = {"one": 0.5, "two": 1.0, "three": 2.0}
    merge_adapters(net, weights, "merged", method="ties", density=0.3, rank=6)
    trimmed = {}
    for name in weights:
        entries = delta(net, "blocks.1", name)
        border = entries.abs().flatten().sort(descending=True).values[int(0.3 * entries.numel()) - 1]
        trimmed[name] = torch.where(entries.abs() >= border, entries, 0.0)
    expected = torch.zeros(6, 10, dtype=torch.float64)
    for row in range(6):
        for column in range(10):
            entries = {name: one[row, column].item() for name, one in trimmed.items()}
            sign = 1 if sum(entries.values()) >= 0 else -1
            agreeing = [weights[name] * entry for name, entry in entries.items() if entry * sign > 0]
            expected[row, column] = sum(agreeing) / max(len(agreeing), 1)
    assert torch.allclose(delta(net, "blocks.1", "merged"), expected, rtol=0, atol=1e-12)


def test_ties_and_dare_are_peft_s():
    from peft.utils import merge_utils

    deltas, weights = [torch.randn(7, 5, dtype=torch.float64) for _ in range(3)], [0.5, -1.0, 2.0]
    theirs = merge_utils.ties(deltas, torch.tensor(weights, dtype=torch.float64), 0.4)
    assert torch.allclose(ties(deltas, weights, 0.4), theirs, rtol=0, atol=1e-12)
    torch.manual_seed(11)
    theirs = merge_utils.dare_linear(deltas, torch.tensor(weights, dtype=torch.float64), 0.4)
    ours = dare(deltas, weights, 0.4, torch.Generator().manual_seed(11))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_what_dare_drops_is_the_seed_s_and_the_mean_is_kept():
    def drawn(seed: int) -> torch.Tensor:
        net = merge_adapters(network(one=4), {"one": 1.0}, "two", method="dare", density=0.5, rank=6, seed=seed)
        return delta(net, "blocks.1", "two")

    full = delta(network(one=4), "blocks.1", "one")
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.allclose(drawn(1), drawn(2))
    doubled = (drawn(3) / full).round(decimals=6)
    assert set(doubled.abs().unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "cat"), ("linear", "svd"), ("ties", "ties_svd")])
def test_outputs_are_those_of_peft_s_weighted_adapter(ours, theirs):
    import peft

    torch.manual_seed(2)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]), "one"
    )
    wrapped.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]))
    net = add_adapter(add_adapter(copy.deepcopy(base), LoRA(rank=2, alpha=3), "one"), LoRA(rank=2, alpha=3), "two")
    for layer in (0, 2):
        for name in ("one", "two"):
            for matrix in ("lora_A", "lora_B"):
                value = getattr(wrapped.base_model.model[layer], matrix)[name].weight
                nn.init.normal_(value)
                getattr(net[layer].adapters[name], matrix).data.copy_(value)
    rank = {"svd_rank": 4} if theirs.endswith("svd") else {}
    wrapped.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type=theirs, density=0.5, **rank)
    wrapped.set_adapter("both")
    merge_adapters(net, {"one": 0.5, "two": 2.0}, "both", method=ours, density=0.5, rank=4)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(set_adapter(net, "both")(x), wrapped(x), rtol=0, atol=1e-10)


def test_compression_never_builds_the_product():
    # 200,000 x 200,000 numbers would be 320 GB
    down, up = compressed(torch.randn(3, 200_000), torch.randn(200_000, 3), 2)
    assert down.shape == (2, 200_000)
    assert up.shape == (200_000, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {}}, "weights={} names no adapter"),
        ({"weights": {"one": float("nan")}}, r"weights\['one'\]=nan"),
        ({"weights": {"on": 1.0}}, r"'on' is none of the adapters \['one'\]. Nearest: one"),
        ({"method": "sum"}, "method='sum' must be one of"),
        ({"density": 0.0}, "density=0.0 must lie in"),
        ({"rank": 0}, "rank=0 must be"),
        ({"name": "one"}, "already carries an adapter 'one'"),
    ],
)
def test_bad_input_names_the_value(options, message):
    net = network(one=2)
    with pytest.raises(ValueError, match=message):
        merge_adapters(net, **{"weights": {"one": 1.0}, "name": "new", **options})
    assert list(attachment_of(net).adapters) == ["one"]


def attention() -> nn.Module:
    return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})


@pytest.mark.parametrize(
    ("make", "adapter", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), LoRA(rank=2, dora=True), "'x' at '0' has dora=True"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), BitFit(), r"'x' is BitFit\(\); only LoRA"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), LoRA(rank=2, bias="all"), r"also trains 1 parameters .* \['0.bias'\]"),
        (lambda: nn.Sequential(nn.Conv1d(8, 8, 1, groups=2)), LoRA(rank=2, targets=["0"]), "in 2 groups"),
        (attention, LoRA(rank=2, targets=["*"]), "'x' at 'attention' updates parameters inside"),
    ],
)
def test_what_has_no_sum_is_named(make, adapter, message):
    net = add_adapter(make(), adapter, name="x")
    with pytest.raises(ValueError, match=message):
        merge_adapters(net, {"x": 1.0}, "new")


def test_a_merged_adapter_must_be_taken_out_first():
    net = merge_adapter(network(one=2))
    with pytest.raises(ValueError, match="Call unmerge_adapter first"):
        merge_adapters(net, {"one": 1.0}, "new")

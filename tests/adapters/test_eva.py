"""EVA: directions are singular vectors of the inputs, ranks go where they explain most, nothing else changes."""

import fnmatch

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, add_adapter
from lightning_peft.adapters import set_adapter
from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.eva import InputMoments, eva_start, input_moments, share_ranks


class Net(nn.Module):
    """Two layers on the same input, one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 5), nn.Linear(6, 5)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(5, 7)
        self.double()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.out(self.drop(self.query(x) * self.key(x)))


def batches(count: int = 3, lengths: tuple[float, ...] = (9.0, 5.0, 3.0, 1.0, 0.5, 0.1)) -> list[torch.Tensor]:
    stretch = torch.tensor(lengths, dtype=torch.float64)
    mix, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    return [torch.randn(4, 3, 6, dtype=torch.float64) * stretch @ mix for _ in range(count)]


def adapted(net: nn.Module | None = None, **options) -> nn.Module:
    return add_adapter(net or Net(), LoRA(rank=2, init="eva", **options))


def started(data: list, **options) -> tuple[nn.Module, LoRA]:
    net, lora = adapted(), LoRA(rank=2, init="eva")
    return net, eva_start(net, "default", lora, data, **options)


def same_space(rows: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether orthonormal rows are those of another matrix up to their signs."""
    return torch.allclose((rows @ other.T).abs(), torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=1e-8)


def test_a_holds_the_right_singular_vectors_of_the_inputs_and_b_is_zero():
    data = batches()
    net, _ = started(data)
    inputs = torch.cat(data).reshape(-1, 6)
    hidden = (net.query(torch.cat(data)) * net.key(torch.cat(data))).detach().reshape(-1, 5)
    for layer, seen in ((net.query, inputs), (net.key, inputs), (net.out, hidden)):
        update = layer.adapters["default"]
        directions = torch.linalg.svd(seen).Vh[: update.rank]
        assert same_space(update.lora_A.detach(), directions)
        assert torch.count_nonzero(update.lora_B) == 0


def test_ranks_follow_the_shares_of_the_squared_singular_values_and_keep_their_sum():
    data, net = batches(lengths=(9.0, 8.0, 7.0, 1.0, 0.5, 0.1)), adapted()
    for layer in (net.query, net.key):
        layer.weight.data[1:] = layer.weight[:1] * 1.001  # the last layer's inputs are all but one direction
        layer.bias.data.zero_()
    lora = eva_start(net, "default", LoRA(rank=2, init="eva"), data)
    inputs = torch.cat(data).reshape(-1, 6)
    hidden = (net.query(torch.cat(data)) * net.key(torch.cat(data))).detach().reshape(-1, 5)
    shares = []
    for name, seen in (("query", inputs), ("key", inputs), ("out", hidden)):
        squares = torch.linalg.svdvals(seen).square()
        shares += [(share.item(), name) for share in (squares / squares.sum())[1:4]]
    expected = {"query": 1, "key": 1, "out": 1}
    for _, name in sorted(shares, key=lambda one: -one[0])[:3]:
        expected[name] += 1
    found = {name: lora.rank_of(name) for name in expected}
    assert sorted(found.values()) == sorted(expected.values()) == [1, 2, 3]
    assert found["out"] == expected["out"] == 1


def test_no_layer_gets_more_than_rho_times_its_rank():
    _, lora = started(batches(), rho=1.0)
    assert lora.rank_pattern == {"query": 2, "key": 2, "out": 2}


def test_shares_are_given_out_largest_first_and_no_layer_goes_without():
    shares = {
        "a": torch.tensor([0.5, 0.3, 0.2]),
        "b": torch.tensor([0.9, 0.06, 0.04]),
        "c": torch.tensor([0.6, 0.4, 0.0]),
    }
    ranks, limits = dict.fromkeys("abc", 2), dict.fromkeys("abc", 3)
    assert share_ranks(shares, ranks, limits) == {"a": 3, "b": 1, "c": 2}
    assert share_ranks(shares, ranks, {**limits, "a": 2}) == {"a": 2, "b": 2, "c": 2}


def test_the_start_changes_no_output_bit_and_layers_know_their_new_rank_and_scale():
    net, data = Net().eval(), batches(lengths=(9.0, 8.0, 7.0, 1.0, 0.5, 0.1))
    for layer in (net.query, net.key):
        layer.weight.data[1:] = layer.weight[:1] * 1.001
    before = net(data[0])
    add_adapter(net, LoRA(rank=2, init="eva"))
    lora = eva_start(net, "default", LoRA(rank=2, init="eva"), data)
    assert torch.equal(net(data[0]), before)
    assert len(set(lora.rank_pattern.values())) > 1
    for name in ("query", "key", "out"):
        update = net.get_submodule(name).adapters["default"]
        assert update.rank == lora.rank_of(name) == len(update.lora_A)
        assert update.scale == lora.scale_of(name) == 16 / 2  # as before the ranks were shared out anew
        assert update.lora_A.requires_grad
        assert update.lora_B.requires_grad


def test_the_adapter_that_comes_back_rebuilds_the_network():
    net, lora = started(batches())
    again = add_adapter(Net(), Adapter.from_plain(lora.to_plain()))
    again.load_state_dict(net.state_dict())


def test_adding_with_batches_starts_it_and_a_waiting_adapter_stays_waiting():
    net = add_adapter(Net(), LoRA(rank=1), name="first")
    nn.init.normal_(net.query.adapters["first"].lora_B)
    data = batches()
    add_adapter(net, LoRA(rank=2, init="eva"), name="second", batches=data)
    update = net.out.adapters["second"]
    assert not update.lora_A.requires_grad
    # The first adapter acts, but what counts is the pretrained network.
    set_adapter(net, None)
    hidden = (net.query(torch.cat(data)) * net.key(torch.cat(data))).detach().reshape(-1, 5)
    assert same_space(update.lora_A.detach(), torch.linalg.svd(hidden).Vh[: update.rank])
    set_adapter(net, "second")
    assert update.lora_A.requires_grad


def test_dropout_rests_meanwhile_and_every_module_gets_its_mode_back():
    net = adapted().train()
    net.key.eval()
    moments = [input_moments(net, ["out"], batches)["out"] for batches in [[torch.ones(2, 6).double()]] * 2]
    assert torch.equal(*moments)
    assert net.training
    assert net.drop.training
    assert not net.key.training
    assert not net.query._forward_pre_hooks


def test_masked_rows_do_not_count():
    x, mask = batches(1)[0], torch.tensor([[1, 1, 0]] * 4)
    net = adapted()
    masked = input_moments(net, ["query", "out"], [{"x": x, "attention_mask": mask}])
    alone = input_moments(net, ["query", "out"], [{"x": x[:, :2]}])
    for name in alone:
        assert torch.allclose(masked[name], alone[name], rtol=1e-12)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "labels"), lambda x: [x, 1], lambda x: {"x": x}])
def test_batches_come_as_tensors_tuples_or_mappings(wrap):
    net, x = adapted(), batches(1)[0]
    found = input_moments(net, ["query"], [wrap(x)])["query"]
    assert torch.allclose(found, x.reshape(-1, 6).T @ x.reshape(-1, 6), rtol=1e-12)


def test_layers_with_the_very_same_inputs_share_one_sum():
    found = input_moments(adapted(), ["query", "key", "out"], batches())
    assert found["query"] is found["key"]
    assert found["out"] is not found["key"]


def test_sums_are_right_where_layers_share_some_inputs_only():
    moments, first, second = InputMoments(), torch.randn(4, 3), torch.randn(5, 3)
    moments.see("a", first)
    moments.see("b", first)
    first.mul_(2)  # the same tensor, another value
    moments.see("a", first)
    moments.commit()
    moments.see("b", second)
    found = moments.of(["a", "b", "never"])
    assert torch.allclose(found["a"], 1.25 * first.T @ first)
    assert torch.allclose(found["b"], 0.25 * first.T @ first + second.T @ second)
    assert set(found) == {"a", "b"}


def test_half_precision_inputs_are_summed_in_float32():
    net = adapted(Net().bfloat16())
    eva_start(net, "default", LoRA(rank=2, init="eva"), [batch.bfloat16() for batch in batches()])
    assert net.query.adapters["default"].lora_A.dtype == torch.float32


def test_names_with_brackets_stay_names():
    class Listed(nn.ModuleDict):
        def forward(self, x):
            return self["a[0]"](x)

    net = add_adapter(Listed({"a[0]": nn.Linear(6, 5)}), LoRA(rank=2, init="eva"))
    lora = eva_start(net, "default", LoRA(rank=2, init="eva"), [torch.randn(9, 6)])
    (glob,) = lora.rank_pattern
    assert fnmatch.fnmatchcase("a[0]", glob)


def test_no_batches_and_layers_that_are_never_called_are_errors():
    with pytest.raises(ValueError, match="batches= is empty"):
        started([])
    net = Net()
    net.unused = nn.Linear(6, 6).double()
    with pytest.raises(
        ValueError, match=r"1 layers were called in none of the 3 batches, first 'unused'.*\['unused'\]"
    ):
        add_adapter(net, LoRA(rank=2, init="eva"), batches=batches())

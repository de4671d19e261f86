"""Several adapters on one network: which acts, what trains, and what each keeps for itself."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import (
    LoRA,
    adapter_disabled,
    adapter_rows,
    adapter_state_dict,
    add_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from tests.adapters.test_lora import small
from tests.adapters.zoo import stir
from tests.toy import same, weights


def two(**options) -> nn.Module:
    model = add_adapter(small(), LoRA(rank=2, **options), name="first")
    stir(model)
    add_adapter(model, LoRA(rank=1, targets=["2"], **options), name="second")
    stir(set_adapter(model, "second"))
    return set_adapter(model, "first")


def trains(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_further_adapter_waits_until_it_is_set():
    model, x = stir(add_adapter(small(), LoRA(rank=2), name="first")), torch.randn(3, 6)
    output, training = model(x), trains(model)
    add_adapter(model, LoRA(rank=1), name="second")
    assert torch.equal(model(x), output)
    assert trains(model) == training
    set_adapter(model, "second")
    assert trains(model) == {f"{layer}.adapters.second.lora_{m}" for layer in (0, 2) for m in "AB"}
    assert torch.equal(set_adapter(model, "first")(x), output)


def test_no_adapter_is_the_pretrained_network():
    base = small()
    model, x = add_adapter(copy.deepcopy(base), LoRA(rank=2, train_also=["2"], exclude=["2"])), torch.randn(3, 6)
    stir(model)
    assert not torch.equal(model(x), base(x))
    assert torch.equal(set_adapter(model, None)(x), base(x))
    assert trains(model) == set()


def test_base_values_that_adapters_train_are_each_one_s_own():
    base, x = small(), torch.randn(3, 6)
    model = add_adapter(copy.deepcopy(base), LoRA(rank=2, targets=["0"], train_also=["2"]), name="first")
    stir(model)
    first = model(x)
    add_adapter(model, LoRA(rank=2, targets=["0"], bias="all"), name="second")
    assert torch.equal(model(x), first)
    set_adapter(model, "second")
    assert torch.equal(model(x), base(x))
    second = stir(model)(x)
    assert torch.equal(set_adapter(model, "first")(x), first)
    assert torch.equal(set_adapter(model, "second")(x), second)
    with adapter_disabled(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), second)
    remove_adapter(model)
    assert same(weights(model), weights(base))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_can_be_switched_apart_from_the_original(again):
    model, x = two(), torch.randn(3, 6)
    other = again(model)
    set_adapter(other, "second")
    assert not torch.equal(other(x), model(x))
    assert torch.equal(set_adapter(model, "second")(x), other(x))


def test_one_of_several_can_be_taken_off():
    model, x = two(), torch.randn(3, 6)
    first = model(x)
    remove_adapter(model, "second")
    assert torch.equal(model(x), first)
    with pytest.raises(ValueError, match=r"set_adapter: 'second' is none of the adapters \['first'\]"):
        set_adapter(model, "second")
    add_adapter(model, LoRA(rank=1), name="second")
    remove_adapter(model, "first")
    assert torch.equal(set_adapter(model, "second")(x), small_like(model)(x))
    remove_adapter(model, "second")
    assert type(model[0]) is nn.Linear


def small_like(model) -> nn.Module:
    base = small()
    base.load_state_dict({key: value for key, value in model.state_dict().items() if "adapters" not in key})
    return base


def test_the_active_adapter_is_merged_and_none_other():
    model, x = two().double(), torch.randn(3, 6, dtype=torch.float64)
    outputs = {name: set_adapter(model, name)(x) for name in ("first", "second")}
    merge_adapter(model)
    assert torch.allclose(model(x), outputs["second"], rtol=0, atol=1e-12)
    for refused in (lambda: set_adapter(model, "first"), lambda: add_adapter(model, LoRA(rank=1), name="third")):
        with pytest.raises(ValueError, match="merged"):
            refused()
    assert torch.equal(set_adapter(unmerge_adapter(model), "first")(x), outputs["first"])


def test_optimizer_steps_move_the_active_adapter_alone():
    model = two()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(3, 6)).sum().backward()
    set_adapter(model, "second")
    before = weights(model)
    optimizer.zero_grad(set_to_none=False)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {"2.adapters.second.lora_A", "2.adapters.second.lora_B"}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: set_adapter(m, "frist"), "'frist' is none of the adapters .*Nearest: first"),
        (lambda m: set_adapter(small(), "first"), "carries no adapter"),
        (lambda m: add_adapter(m, LoRA(rank=1), name="first"), "already carries an adapter 'first'"),
        (lambda m: add_adapter(m, LoRA(rank=1), name="items"), "name='items' is an attribute of torch's modules"),
        (lambda m: add_adapter(m, LoRA(rank=1), name="x", batches=[torch.ones(1, 6)]), "starts without data"),
        (lambda m: adapter_rows(m, ["first", "other"]).__enter__(), "'other' is none of the adapters"),
    ],
)
def test_bad_input_names_the_value(act, message):
    with pytest.raises(ValueError, match=message):
        act(two())


def test_rows_need_one_name_each_and_adapters_of_their_own():
    model = two()
    with adapter_rows(model, ["first", None]), pytest.raises(ValueError, match="2 names for an input of 3 rows"):
        model(torch.randn(3, 6))
    shared = two(bias="all")
    with pytest.raises(ValueError, match="trains parameters of the network itself"), adapter_rows(shared, ["first"]):
        pass
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    add_adapter(net, LoRA(rank=2, targets=["attention"]))
    with pytest.raises(ValueError, match="'attention' cannot have another adapter"), adapter_rows(net, ["default"]):
        pass


def test_an_adapter_whose_batches_fail_leaves_the_network_as_it_was():
    model = small()
    with pytest.raises(ValueError, match="starts without data"):
        add_adapter(model, LoRA(rank=1), batches=[torch.ones(1, 6)])
    add_adapter(model, LoRA(rank=1))


def test_tied_weights_stay_tied_when_they_train_beside_an_adapter():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "layer": nn.Linear(4, 4), "output": nn.Linear(4, 9, bias=False)})
    net["output"].weight = net["embed"].weight
    add_adapter(net, LoRA(rank=2, train_also=["output"]))
    assert net["output"].weight is net["embed"].weight
    assert "embed.weight" in trains(net)
    remove_adapter(net)
    assert net["output"].weight is net["embed"].weight


def test_an_embedding_that_was_resized_since_is_noticed():
    from tests.adapters.test_lora import tiny

    model = add_adapter(tiny("llama")[0], LoRA(rank=2, targets=["model.embed_tokens"]))
    model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"had the shape \(50, 16\) when the adapter came and has \(60, 16\) now"):
        set_adapter(model, None)


def with_heads(**second):
    """A network with two adapters, each with a head of its own; the second has never acted."""
    model = add_adapter(small(), LoRA(rank=2, targets=["0"], train_also=["2"]), name="first")
    return add_adapter(model, LoRA(rank=2, targets=["0"], train_also=["2"], **second), name="second")


def test_a_file_with_a_head_loads_beside_another_adapter_and_one_that_never_acted_saves(tmp_path):
    base, x = with_heads(), torch.randn(3, 6)
    plain = set_adapter(copy.deepcopy(base), "second")(x)
    save_adapter(base, tmp_path / "second", name="second")
    stir(base)
    expected = base(x)
    save_adapter(base, tmp_path / "first")
    other = remove_adapter(copy.deepcopy(base))
    add_adapter(other, LoRA(rank=1, targets=["0"]), name="there")
    for name, output in (("first", expected), ("second", plain)):
        load_adapter(other, tmp_path / name, name=name)
        assert torch.equal(set_adapter(other, name)(x), output)
        set_adapter(other, "there")


def test_inside_adapter_disabled_nothing_is_saved_or_changed(tmp_path):
    model, x = stir(with_heads()), torch.randn(3, 6)
    expected = model(x)
    calls = {
        "save_adapter": lambda: save_adapter(model, tmp_path),
        "adapter_state_dict": lambda: adapter_state_dict(model),
        "set_adapter": lambda: set_adapter(model, "second"),
        "merge_adapter": lambda: merge_adapter(model),
        "unmerge_adapter": lambda: unmerge_adapter(model),
        "remove_adapter": lambda: remove_adapter(model),
        "add_adapter": lambda: add_adapter(model, LoRA(rank=1), name="third"),
    }
    for name, call in calls.items():
        with adapter_disabled(model), adapter_disabled(model), pytest.raises(ValueError, match=f"{name}: not inside"):
            call()
    assert torch.equal(model(x), expected)
    save_adapter(model, tmp_path)


def test_rows_are_refused_while_a_prompt_acts():
    from lightning_peft import KVPrefix
    from tests.adapters.prompt_nets import network

    model = add_adapter(network("llama"), LoRA(rank=2), name="rows")
    set_adapter(add_adapter(model, KVPrefix(tokens=2), name="prefix"), "prefix")
    for names in (["rows", None], [None, None]):
        with pytest.raises(ValueError, match="cannot have another adapter for each row"), adapter_rows(model, names):
            pass


def test_layers_that_no_adapter_is_left_on_are_plain_again():
    model = add_adapter(small(), LoRA(rank=2, targets=["0"]), name="first")
    add_adapter(model, LoRA(rank=2), name="second")
    remove_adapter(model, "second")
    assert [type(layer) for layer in model][1:] == [nn.ReLU, nn.Linear]
    assert type(model[0]) is not nn.Linear
    assert not hasattr(model[2], "adapters")

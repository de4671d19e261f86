"""LoRA on every kind of layer: laws that hold for all, and PEFT as the oracle."""

import copy
import itertools
import pickle

import pytest
import torch

from lightning_peft import (
    LoRA,
    adapter_disabled,
    adapter_rows,
    add_adapter,
    merge_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from lightning_peft.adapters.peft_format import from_peft, load_adapter, save_adapter
from tests.adapters.zoo import ZOO, build, stir
from tests.toy import same, weights

OPTIONS = {
    "plain": {},
    "rslora": {"scaling": "rslora"},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "orthogonal": {"init": "orthogonal"},
}
LINEAR_ONLY = {"pissa", "olora", "orthogonal"}
CASES = [
    (case, option)
    for case, option in itertools.product(ZOO, OPTIONS)
    if option not in ZOO[case].no and (option not in LINEAR_ONLY or case == "mlp")
]


def lora(case: str, option: str = "plain", **more) -> LoRA:
    return LoRA(rank=2, alpha=6, targets=[*ZOO[case].targets, *ZOO[case].parameters], **{**OPTIONS[option], **more})


@pytest.mark.parametrize(("case", "option"), CASES)
def test_adding_changes_no_bit_of_an_output_and_removing_gives_the_network_back(case, option):
    model, x = build(ZOO[case]), ZOO[case].inputs()
    before, output = weights(model), model(x)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    add_adapter(model, lora(case, option))
    # torch's attention chooses its kernel by what requires a gradient, with or without an adapter: one unit in the last place.
    slack = 1e-15 if case == "attention" else 0.0
    assert torch.allclose(model(x), output, rtol=0, atol=slack)
    assert not torch.allclose(stir(model)(x), output, atol=1e-3)
    with adapter_disabled(model):
        assert torch.allclose(model(x), output, rtol=0, atol=slack)
    remove_adapter(model)
    assert same(weights(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model(x), output)


@pytest.mark.parametrize(("case", "option"), [(c, o) for c, o in CASES if "merge" not in ZOO[c].no])
def test_merging_keeps_outputs_and_unmerging_restores_bits(case, option):
    model, x = build(ZOO[case]), ZOO[case].inputs()
    plain = model(x)
    stir(add_adapter(model, lora(case, option)))
    before, output = weights(model), model(x)
    merge_adapter(merge_adapter(model))
    assert torch.allclose(model(x), output, rtol=0, atol=1e-12)
    with adapter_disabled(model):
        assert torch.allclose(model(x), plain, rtol=0, atol=1e-15 if case == "attention" else 0.0)
    assert torch.allclose(model(x), output, rtol=0, atol=1e-12)
    unmerge_adapter(model)
    assert same(weights(model), before)
    merge_adapter(model, unload=True)
    assert model.state_dict().keys() == build(ZOO[case]).state_dict().keys()
    assert torch.allclose(model(x), output, rtol=0, atol=1e-12)


def test_a_grouped_convolution_says_that_it_cannot_merge():
    model = add_adapter(build(ZOO["grouped conv2d"]), lora("grouped conv2d"))
    with pytest.raises(ValueError, match="in 2 groups cannot hold its LoRA"):
        merge_adapter(model)
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "merged"))


@pytest.mark.parametrize(("case", "option"), CASES)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_shares_nothing(case, option, again):
    model, x = stir(add_adapter(build(ZOO[case]), lora(case, option))), ZOO[case].inputs()
    output = model(x)
    other = again(model)
    assert torch.equal(other(x), output)
    stir(other)
    assert not torch.equal(other(x), output)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize(("case", "option"), CASES)
def test_the_state_comes_back_in_a_second_network(case, option):
    base, x = build(ZOO[case]), ZOO[case].inputs()
    model = stir(add_adapter(copy.deepcopy(base), lora(case, option)))
    other = add_adapter(copy.deepcopy(base), lora(case, option))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(("case", "option"), CASES)
def test_gradients_are_those_of_the_merged_weights_and_of_nothing_else(case, option):
    model, x = stir(add_adapter(build(ZOO[case]), lora(case, option))), ZOO[case].inputs()
    model(x).square().sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if option == "dora":
        return  # its norm is a constant to the gradient, which differences would not see
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            direction = torch.randn_like(parameter)
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.add_(direction, alpha=step)
                    ends.append(model(x).square().sum())
                    parameter.sub_(direction, alpha=step)
            slope = (ends[0] - ends[1]) / 2e-6
            assert torch.allclose(slope, (parameter.grad * direction).sum(), rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("option", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("case", [case for case in ZOO if "peft" not in ZOO[case].no])
@pytest.mark.filterwarnings(
    "ignore:Could not find a config file",
    "ignore:fan_in_fan_out is set to False",
    "ignore:LoRA adapter added to ConvNd",
)
def test_peft_agrees_in_both_directions(case, option, tmp_path):
    import peft

    zoo, base = ZOO[case], build(ZOO[case])
    if option in zoo.no:
        pytest.skip("no such combination")
    x = zoo.inputs()
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=list(zoo.targets),
        target_parameters=list(zoo.parameters) or None,
        use_rslora=option == "rslora",
        use_dora=option == "dora",
    )
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-10)
    assert not torch.allclose(ours(x), base(x), atol=1e-3)

    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "ours", is_trainable=True, autocast_adapter_dtype=False
    ).eval()
    assert torch.allclose(ours(x), read(x), rtol=0, atol=1e-10)

    models = {"ours": ours, "theirs": theirs}
    for model in models.values():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model(x).square().sum().backward()
        optimizer.step()
    # PEFT's gradient of an attention's output projection is that of one update where it applies two: see peft_tensors.py.
    if case != "attention":
        assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-10)
    taken = from_peft(theirs) if case == "attention" else from_peft(copy.deepcopy(theirs))
    assert torch.allclose(taken(x), theirs(x) if case != "attention" else taken(x), rtol=0, atol=1e-10)
    if not {"merge", "peft merge"} & zoo.no and case != "attention":
        merged = theirs.merge_and_unload()(x)
        assert torch.allclose(merge_adapter(ours, unload=True)(x), merged, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in ZOO if "rows" not in ZOO[case].no])
def test_every_row_of_a_batch_may_have_an_adapter_of_its_own(case):
    model = stir(add_adapter(build(ZOO[case]), lora(case), name="first"))
    add_adapter(model, lora(case), name="second")
    stir(set_adapter(model, "second"))
    x, rows = ZOO[case].inputs(), (["first", "second", None] * 3)
    rows = rows[: len(x)]
    expected = [set_adapter(model, name)(x)[i] for i, name in enumerate(rows)]
    set_adapter(model, "first")
    with adapter_rows(model, rows):
        output = model(x)
    assert torch.allclose(output, torch.stack(expected), rtol=0, atol=1e-12)
    with adapter_rows(model, rows):  # as beams do
        doubled = model(x.repeat_interleave(2, 0))
    assert torch.allclose(doubled, output.repeat_interleave(2, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("case", "option"), CASES)
def test_gradient_checkpointing_keeps_the_gradients(case, option, reentrant):
    from torch.utils.checkpoint import checkpoint

    model, x = stir(add_adapter(build(ZOO[case]), lora(case, option))), ZOO[case].inputs()
    if x.is_floating_point():
        x.requires_grad_()
    elif reentrant:
        pytest.skip("re-entrant checkpointing needs an input with a gradient, and ids have none")
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    got = dict(model.named_parameters())
    assert all(torch.allclose(got[name].grad, grad, rtol=0, atol=1e-12) for name, grad in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "true"])
@pytest.mark.parametrize(("case", "option"), CASES)
def test_half_precision_is_close_and_keeps_float32_masters(case, option, way, dtype):
    model, x = stir(add_adapter(build(ZOO[case]).float(), lora(case, option)), 0.1), ZOO[case].inputs()
    x = x.float() if x.is_floating_point() else x
    expected = model(x)
    if way == "true":
        model.to(dtype)
        output = model(x.to(dtype) if x.is_floating_point() else x)
    else:
        with torch.autocast("cpu", dtype):
            output = model(x)
    assert output.dtype == dtype
    assert torch.allclose(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().square().sum().backward()
    trains = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trains)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "option"), [c for c in CASES if c[1] in ("plain", "dora", "pissa")])
def test_compiling_breaks_no_graph_and_changes_no_value(case, option):
    model, x = stir(add_adapter(build(ZOO[case]), lora(case, option))), ZOO[case].inputs()
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, rtol=0, atol=1e-12)
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

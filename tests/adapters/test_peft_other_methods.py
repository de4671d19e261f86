"""IA3 and VeRA in PEFT's files, heads beside every method, and the network that a file belongs to."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import (
    IA3,
    BitFit,
    LayerNormTuning,
    LinearProbe,
    LoRA,
    VeRA,
    add_adapter,
    remove_adapter,
    set_adapter,
)
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.peft_format import from_peft, load_adapter, save_adapter
from tests.adapters.test_lora import small, tiny, trained
from tests.adapters.zoo import ZOO, build, stir

TOKENS = torch.arange(12).view(2, 6)
FITS_IA3 = [name for name, case in ZOO.items() if "ia3" not in case.no and not case.parameters]


def peft_ia3(base, targets, feedforward, **options):
    import peft

    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, **options)
    return stir(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)).eval()


def read_by_peft(base, folder):
    import peft

    return peft.PeftModel.from_pretrained(
        copy.deepcopy(base), folder, is_trainable=True, autocast_adapter_dtype=False
    ).eval()


def stepped(model, output):
    """The gradients of what trains, and the output after a step of SGD."""
    output().square().sum().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = sorted(p.grad.norm().item() for p in parameters)
    torch.optim.SGD(parameters, lr=1e-3).step()
    return torch.tensor([*grads]), output().detach()


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("case", [c for c in FITS_IA3 if c in {"mlp", "embedding and Conv1D", "conv2d", "conv3d"}])
def test_both_libraries_compute_the_same_with_each_other_s_ia3(case, tmp_path):
    base, x = build(ZOO[case]), ZOO[case].inputs()
    targets = [name for name in ZOO[case].targets if name != "embed"]
    theirs = peft_ia3(base, targets, targets[-1:])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-10)
    assert not torch.allclose(ours(x), base(x), atol=1e-3)
    save_adapter(ours, tmp_path / "ours")
    again = read_by_peft(base, tmp_path / "ours")
    assert torch.allclose(again(x), theirs(x), rtol=0, atol=1e-10)
    live = from_peft(copy.deepcopy(theirs))
    assert torch.allclose(live(x), theirs(x), rtol=0, atol=1e-10)
    for one, two in zip(stepped(ours, lambda: ours(x)), stepped(again, lambda: again(x)), strict=True):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-10)


def test_ia3_on_a_transformer_with_its_head_goes_both_ways(tmp_path):
    base = tiny("bert")[0].double().eval()
    theirs = peft_ia3(base, ["key", "value", "output.dense"], ["output.dense"], task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=TOKENS).logits
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(ours(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-10)
    assert {"classifier.weight", "classifier.bias"} <= {n for n, p in ours.named_parameters() if p.requires_grad}
    save_adapter(ours, tmp_path / "ours")
    assert torch.allclose(read_by_peft(base, tmp_path / "ours")(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_both_libraries_compute_the_same_with_each_other_s_vera(kind, tmp_path):
    import peft

    base = tiny(kind)[0].double().eval()
    names = ["query", "intermediate.dense"] if kind == "bert" else ["q_proj", "up_proj"]
    config = peft.VeraConfig(r=3, target_modules=names, projection_prng_key=5, d_initial=0.3)
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).double()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=TOKENS).logits
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(ours(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(base(input_ids=TOKENS).logits, expected, atol=1e-3)
    save_adapter(ours, tmp_path / "ours")
    again = read_by_peft(base, tmp_path / "ours").double()
    assert torch.allclose(again(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-6)
    assert torch.allclose(from_peft(theirs)(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-6)


def rewritten(folder, change):
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_random_matrices_that_are_not_those_of_the_key_are_refused_and_may_be_left_out(tmp_path):
    base, x = small(), torch.randn(3, 6)
    ours = stir(add_adapter(copy.deepcopy(base), VeRA(rank=2, seed=3)))
    save_adapter(ours, tmp_path)
    rewritten(tmp_path, lambda weights: (weights.pop("base_model.vera_A"), weights.pop("base_model.vera_B")))
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(x), ours(x))
    save_adapter(ours, tmp_path)
    rewritten(tmp_path, lambda weights: weights["base_model.vera_B"].add_(0.1))
    net = copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"base_model.vera_B in the file is not what its projection_prng_key gives"):
        load_adapter(net, tmp_path)
    assert attachment_of(net) is None


@pytest.mark.parametrize(
    ("adapter", "change", "message"),
    [
        (IA3(targets=["0"], feedforward=["2"]), {"feedforward_modules": None}, r"lacks \['feedforward_modules'\]"),
        (VeRA(rank=2), {"projection_prng_key": None}, r"lacks \['projection_prng_key'\]"),
        (VeRA(rank=2), {"bias": "all"}, "asks for bias='all' beside VeRA"),
    ],
)
def test_fields_that_would_have_to_be_guessed_are_asked_for(adapter, change, message, tmp_path):
    from tests.adapters.test_peft_format import edited

    save_adapter(add_adapter(small(), adapter), tmp_path)
    edited(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        load_adapter(small(), tmp_path)


@pytest.mark.parametrize(
    "adapter",
    [
        IA3(targets=["0"], train_also=["2"]),
        VeRA(rank=2, targets=["0"], train_also=["2"]),
        BitFit(targets=["0.bias"], train_also=["2"]),
        LinearProbe(train_also=["2"]),
        LoRA(rank=2, targets=["0"], train_also=["2"]),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_a_head_inside_the_network_trains_beside_every_method_and_belongs_to_it(adapter):
    base, x = small(), torch.randn(3, 6)
    net = add_adapter(copy.deepcopy(base), adapter)
    trains = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in net.named_parameters() if name.startswith("2.")} <= trains
    first = stir(net)(x)
    add_adapter(net, LoRA(rank=1, targets=["0"]), name="second")
    set_adapter(net, "second")
    assert torch.equal(net(x), base(x))
    set_adapter(net, "default")
    assert torch.equal(net(x), first)
    remove_adapter(net)
    assert torch.equal(net(x), base(x))


@pytest.mark.parametrize("heads", [[], ["2"]])
@pytest.mark.parametrize("kind", [IA3, VeRA])
def test_a_head_and_a_dropout_go_through_the_file_to_peft_and_back(kind, heads, tmp_path):
    import peft

    more = {"rank": 2, "dropout": 0.25} if kind is VeRA else {}
    base = small()
    ours = stir(add_adapter(copy.deepcopy(base), kind(targets=["0"], train_also=heads, **more)))
    save_adapter(ours, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["modules_to_save"] == (heads or None)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(again.eval()(x), ours.eval()(x))
    assert getattr(attachment_of(again).adapters["default"], "dropout", 0.25) == 0.25
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.allclose(theirs(x), ours(x), atol=1e-6)


@pytest.mark.parametrize(("kind", "more"), [(IA3, {}), (VeRA, {}), (LoRA, {"rank": 2})])
def test_what_gets_an_update_cannot_train_itself(kind, more):
    net = small()
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: train_also covers '2.weight', which has an update already"
    ):
        add_adapter(net, kind(targets=["0", "2"], train_also=["2"], **more))
    assert attachment_of(net) is None
    with pytest.raises(ValueError, match=rf"{kind.__name__}: train_also='2' must be a list of globs"):
        kind(train_also="2")
    with pytest.raises(ValueError, match=rf"{kind.__name__}: train_also.*'4'"):
        add_adapter(net, kind(targets=["0"], train_also=["4"], **more))
    assert attachment_of(net) is None


def test_a_file_does_not_load_on_another_network(tmp_path):
    base, x = small(), torch.randn(3, 6)
    save_adapter(trained(copy.deepcopy(base)), tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[2].weight[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"trained on another network than this Sequential, in 1 tensors:\n  2.weight: other"
    ):
        load_adapter(other, tmp_path)
    assert attachment_of(other) is None
    assert not torch.equal(load_adapter(other, tmp_path, check_base=False)(x), base(x))
    narrow = load_adapter(copy.deepcopy(base).bfloat16(), tmp_path)
    assert torch.allclose(
        narrow(x.bfloat16()).float(), load_adapter(copy.deepcopy(base), tmp_path)(x), rtol=0.02, atol=1
    )
    wide = load_adapter(copy.deepcopy(base).double(), tmp_path)
    assert wide(x.double()).dtype == torch.float64


def test_weights_that_train_beside_the_adapter_are_no_other_network(tmp_path):
    base, x = small(), torch.randn(3, 6)
    ours = stir(add_adapter(copy.deepcopy(base), LoRA(rank=2, targets=["0"], train_also=["2"])))
    save_adapter(ours, tmp_path)
    fresh = copy.deepcopy(base)
    nn.init.zeros_(fresh[2].weight)  # a head that every start draws anew
    assert torch.equal(load_adapter(fresh, tmp_path)(x), ours(x))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_trained_norms_and_a_head_go_both_ways(tmp_path):
    import peft

    base = tiny("bert")[0].double().eval()
    config = peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"])
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=TOKENS).logits
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(ours(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-10)
    save_adapter(ours, tmp_path / "ours")
    again = read_by_peft(base, tmp_path / "ours")
    assert torch.allclose(again(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-10)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name.replace("base_model.model.", "")
        .replace(".ln_tuning_layers.default", "")
        .replace(".modules_to_save.default", "")
        for name, p in again.named_parameters()
        if p.requires_grad
    }


def test_what_is_tuned_as_a_norm_must_be_one(tmp_path):
    from tests.adapters.test_peft_format import edited

    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    save_adapter(add_adapter(copy.deepcopy(base), LayerNormTuning()), tmp_path)
    for targets, message in (
        (["0"], "'0' is tuned as a normalisation layer"),
        (["3"], "matches no layer"),
        (None, "lacks"),
    ):
        edited(tmp_path, target_modules=targets)
        with pytest.raises(ValueError, match=message):
            load_adapter(copy.deepcopy(base), tmp_path)


def test_a_file_keeps_the_rules_of_vllm(tmp_path):
    # As its PEFTHelper has them: these fields, no modules beside, one scale; and its loader: these names and no others.
    base = tiny("llama")[0]
    save_adapter(add_adapter(base, LoRA(rank=4, alpha=8, scaling="rslora")), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"r": 4, "lora_alpha": 8.0, "use_rslora": True, "use_dora": False, "bias": "none"}.items() <= config.items()
    assert config["target_modules"]
    assert [key for key in ("modules_to_save", "rank_pattern", "alpha_pattern") if config[key]] == []
    weights = load_file(tmp_path / "adapter_model.safetensors")
    linear = {name for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
    keys = {f"base_model.model.{name}.lora_{side}.weight" for name in linear for side in "AB"}
    assert weights.keys() == keys
    assert {weights[key].shape[0 if "lora_A" in key else 1] for key in keys} == {4}

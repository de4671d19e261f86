"""LoRA: laws of the layer, choice of targets, PEFT as the oracle."""

import ast
import copy
import pickle
import re

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, add_adapter
from lightning_peft.adapters.layer import AdaptedLayer
from tests.adapters.zoo import three_steps


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))


def trained(model: nn.Module, **options) -> nn.Module:
    """An adapted network whose update is not zero."""
    add_adapter(model, LoRA(rank=2, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def test_adding_an_adapter_changes_no_output_and_no_base_key():
    model, x = small(), torch.randn(5, 6)
    before, keys = model(x), set(model.state_dict())
    add_adapter(model, LoRA(rank=2))
    assert torch.equal(model(x), before)
    assert keys < set(model.state_dict())
    assert set(model.state_dict()) - keys == {f"{i}.adapters.default.lora_{m}" for i in (0, 2) for m in "AB"}


def test_a_layer_stays_the_same_object_with_the_same_parameters():
    model = small()
    layer, weight, bias = model[0], model[0].weight, model[0].bias
    values = weight.detach().clone()
    add_adapter(model, LoRA(rank=2))
    assert model[0] is layer
    assert isinstance(layer, AdaptedLayer)
    assert layer.weight is weight
    assert layer.bias is bias
    assert torch.equal(weight, values)


def test_the_output_is_the_formula_in_float64():
    model, x = trained(small().double(), alpha=6.0), torch.randn(3, 5, 6, dtype=torch.float64)
    layer = model[0]
    a, b = layer.adapters["default"].lora_A, layer.adapters["default"].lora_B
    expected = x @ layer.weight.T + layer.bias + 6.0 / 2 * (x @ a.T @ b.T)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)


def test_only_the_adapter_gets_gradients():
    model = trained(small())
    model(torch.randn(5, 6)).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    model = add_adapter(small(), LoRA(rank=2, dropout=0.5))
    x = torch.randn(5, 6)
    assert torch.equal(model.train()(x), model.eval()(x))  # B is zero: nothing of the base may be dropped
    nn.init.normal_(model[0].adapters["default"].lora_B)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_float32_on_a_half_precision_base(dtype):
    model = add_adapter(small().to(dtype), LoRA(rank=2))
    assert model[0].adapters["default"].lora_A.dtype == torch.float32
    assert model(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    late = add_adapter(small(), LoRA(rank=2))
    value = late[0].adapters["default"].lora_A.detach().clone()
    late.to(dtype)
    assert late[0].weight.dtype == dtype
    assert torch.equal(late[0].adapters["default"].lora_A, value)


def test_a_wider_base_has_a_wider_adapter():
    assert add_adapter(small().double(), LoRA(rank=2))[0].adapters["default"].lora_A.dtype == torch.float64
    assert add_adapter(small(), LoRA(rank=2)).double()[0].adapters["default"].lora_A.dtype == torch.float64


def test_autocast_runs_forward_and_backward():
    model = trained(small())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(5, 6))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert model[0].adapters["default"].lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_shares_nothing(again):
    model, x = trained(small()), torch.randn(5, 6)
    other = again(model)
    assert torch.equal(other(x), model(x))
    nn.init.zeros_(other[0].adapters["default"].lora_B)
    assert not torch.equal(other(x), model(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_torch_encoders_does_not_skip_the_adapter():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
    trained(model, targets=["layers.*.linear1"])
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x, src_key_padding_mask=mask).detach()  # with gradients torch takes the slow path anyway
    keep = ~mask
    assert torch.allclose(fast[keep], slow[keep], atol=1e-6)
    assert not torch.allclose(fast[keep], plain[keep], atol=1e-2)


def test_attention_in_one_module_is_a_target_itself_and_none_of_all_linear():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(LoRA().select(model)) == ["linear1", "linear2"]
    assert list(LoRA(targets=["*"]).select(model)) == ["self_attn", "linear1", "linear2"]


def test_a_weight_that_belongs_to_another_module_too_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"\['0', '2'\] share their weight with other modules"):
        add_adapter(model, LoRA(rank=2))
    assert list(LoRA(rank=2, exclude=["0", "2"]).select(model)) == ["3"]


def test_all_layers_below_the_rank_are_named_at_once_and_the_cure_can_be_copied():
    net = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"size of '0' \(1 -> 8\), '2' \(8 -> 2\)\. .* exclude=\['0', '2'\]") as error:
        add_adapter(net, LoRA(rank=4))
    cure = str(error.value).rpartition("exclude=")[2].rstrip(".")
    assert add_adapter(net, LoRA(rank=4, exclude=ast.literal_eval(cure)))


def test_all_linear_leaves_an_output_embedding_that_is_tied_to_the_input_s_as_it_is():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "layer": nn.Linear(4, 4), "output": nn.Linear(4, 9, bias=False)})
    assert list(LoRA(rank=2).select(net)) == ["layer", "output"]
    net["output"].weight = net["embed"].weight
    assert list(LoRA(rank=2).select(net)) == ["layer"]
    with pytest.raises(ValueError, match=r"\['output'\] share their weight"):
        LoRA(rank=2, targets=["output"]).select(net)


def test_targets_and_exclude_choose_by_glob():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "Query": nn.Linear(4, 4)})
    assert list(LoRA(targets=["quer*"]).select(model)) == ["query"]
    assert list(LoRA(exclude=["key"]).select(model)) == ["query", "Query"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (lambda: LoRA(rank=0), "rank=0 must be a whole number of at least 1"),
        (lambda: LoRA(rank=2.5), "rank=2.5"),
        (lambda: LoRA(rank=True), "rank=True"),
        (lambda: LoRA(dropout=1.0), "dropout=1.0"),
        (lambda: LoRA(alpha=0), "alpha=0"),
        (lambda: LoRA(targets=[]), r"targets=\[\]"),
        (lambda: LoRA(targets="query"), "targets='query'"),
        (lambda: LoRA(exclude="query"), "exclude='query'"),
        (lambda: LoRA(targets=["00"]), "'00' matches none of 2 layers. Nearest: 0, 2"),
        (lambda: LoRA(exclude=["*"]), "leave none of the 2 layers"),
        (lambda: LoRA(rank=5, targets=["2"]), r"rank=5 is above the size of '2' \(8 -> 4\)"),
    ],
)
def test_bad_input_names_the_value_and_leaves_the_network_alone(lora, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        add_adapter(model, lora())
    assert all(not isinstance(layer, AdaptedLayer) and p.requires_grad for layer in model for p in layer.parameters())
    add_adapter(model, LoRA(rank=2))


def test_a_linear_layer_with_behaviour_of_its_own_is_refused():
    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match="'0' is a Doubling"):
        add_adapter(nn.Sequential(Doubling(4, 4)), LoRA(rank=2))


def tiny(kind: str):
    import transformers

    shared = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "initializer_range": 0.5,
    }
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **shared)), "SEQ_CLS"
    if kind == "roberta":
        config = transformers.RobertaConfig(vocab_size=50, **shared)
        return transformers.RobertaModel(config, add_pooling_layer=False), None
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **shared)), "CAUSAL_LM"


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_all_linear_chooses_what_peft_chooses(kind):
    import peft

    model, task = tiny(kind)
    ours = set(LoRA(rank=2).select(model))
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear", task_type=task)
    )
    theirs = {
        name.removeprefix("base_model.model.")
        for name, layer in wrapped.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    assert ours == theirs


def test_one_training_step_equals_peft_s():
    import peft

    torch.manual_seed(3)
    base = small().double()
    ours = add_adapter(copy.deepcopy(base), LoRA(rank=2, alpha=6, targets=["0", "2"]))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))
    state = {
        re.sub(r"base_model\.model\.(\d)\.(lora_.)\.default\.weight", r"\1.adapters.default.\2", name): value
        for name, value in theirs.state_dict().items()
        if "lora_" in name
    }
    ours.load_state_dict(state, strict=False)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    for model in (ours, theirs):
        three_steps(model, x, y)
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)
    assert not torch.allclose(ours(x), base(x), atol=1e-2)

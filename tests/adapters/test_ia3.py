"""IA3: the formula, the merged weights of every kind of layer, PEFT as the oracle."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import add_adapter, merge_adapter
from lightning_peft.adapters import adapter_rows
from lightning_peft.adapters.ia3 import IA3
from tests.adapters.zoo import three_steps


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scaled(layer: nn.Module, *, feedforward: bool) -> tuple[nn.Module, torch.Tensor]:
    """One layer with a random vector on it."""
    net = nn.ModuleDict({"layer": layer.double()})
    add_adapter(net, IA3(targets=["layer"], feedforward=["layer"] if feedforward else []))
    vector = nn.init.normal_(layer.adapters["default"].ia3_l)
    return net, vector


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    from transformers.pytorch_utils import Conv1D

    return {
        "linear": (nn.Linear(6, 4), double(3, 5, 6)),
        "without_bias": (nn.Linear(6, 4, bias=False), double(3, 6)),
        "conv1d_of_gpt": (Conv1D(4, 6), double(3, 5, 6)),
        "conv1d": (nn.Conv1d(6, 4, 3, stride=2), double(2, 6, 9)),
        "conv2d": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), double(2, 6, 5, 5)),
        "grouped": (nn.Conv2d(6, 4, (3, 1), groups=2), double(2, 6, 5, 5)),
        "conv3d": (nn.Conv3d(6, 4, 2), double(2, 6, 3, 3, 3)),
    }


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("kind", list(layers()))
def test_output_and_merged_weights_are_the_formula(kind, feedforward):
    layer, x = layers()[kind]
    plain = copy.deepcopy(layer).double()
    net, vector = scaled(layer, feedforward=feedforward)
    spread = vector.view(-1, *[1] * (x.ndim - 2)) if "conv" in kind and kind != "conv1d_of_gpt" else vector
    spread = vector.view(-1, 1, 1) if kind == "grouped" else spread
    expected = plain(x * spread) if feedforward else plain(x) * spread
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    merge_adapter(net, unload=True)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)


def tiny(kind: str) -> nn.Module:
    import transformers as hf

    same = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    gpt = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    return {
        "bert": lambda: hf.BertModel(hf.BertConfig(vocab_size=50, **same)),
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(vocab_size=50, **same)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, **same)),
        "mistral": lambda: hf.MistralModel(hf.MistralConfig(vocab_size=50, num_key_value_heads=2, **same)),
        "qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(vocab_size=50, num_key_value_heads=2, **same)),
        "distilbert": lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
        ),
        "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**gpt)),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **same)),
        "t5": lambda: hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1)),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "outputs", "inputs"),
    [
        ("bert", ["key", "value"], ["0.output.dense"]),
        ("roberta", ["key", "value"], ["0.output.dense"]),
        ("llama", ["k_proj", "v_proj"], ["down_proj"]),
        ("mistral", ["k_proj", "v_proj"], ["down_proj"]),
        ("qwen2", ["k_proj", "v_proj"], ["down_proj"]),
        ("distilbert", ["k_lin", "v_lin"], ["lin2"]),
        ("gpt2", ["c_attn"], ["mlp.c_proj"]),
        ("vit", ["k_proj", "v_proj"], ["fc2"]),
        ("t5", ["k", "v"], ["wo"]),
    ],
)
def test_without_targets_keys_values_and_the_last_projection_are_found_by_name(kind, outputs, inputs):
    model, ia3 = tiny(kind), IA3()
    chosen = list(ia3.select(model))
    assert len(chosen) == len(outputs) + len(inputs)
    assert all(any(name.endswith(f".{end}") for name in chosen) for end in outputs + inputs)
    assert [name for name in chosen if ia3.scales_input(name)] == [
        name for name in chosen if name.endswith(tuple(f".{end}" for end in inputs))
    ]
    add_adapter(model, ia3)


def test_a_network_of_unknown_names_must_be_told_its_targets():
    with pytest.raises(ValueError, match=r"no layer of this Sequential is called like .* targets="):
        add_adapter(nn.Sequential(nn.Linear(4, 4)), IA3())


def test_one_training_step_equals_peft_s():
    import peft

    torch.manual_seed(3)
    base = nn.ModuleDict({"first": nn.Linear(6, 8), "conv": nn.Conv2d(2, 3, 3), "last": nn.Linear(12, 4)}).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(base)

        def forward(self, x):
            hidden = self.net["first"](x).tanh().view(-1, 2, 2, 2)
            return self.net["last"](self.net["conv"](nn.functional.pad(hidden, [1, 1, 1, 1])).flatten(1))

    names, feedforward = ["net.first", "net.conv", "net.last"], ["net.last", "net.conv"]
    ours = add_adapter(Net(), IA3(targets=names, feedforward=feedforward))
    theirs = peft.get_peft_model(
        Net(), peft.IA3Config(target_modules=["first", "conv", "last"], feedforward_modules=["last", "conv"])
    )
    x, y = double(7, 6), double(7, 4)
    for model in (ours, theirs):
        three_steps(model, x, y)
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)
    assert not torch.allclose(ours(x), Net()(x), atol=1e-2)
    merge_adapter(ours)
    assert torch.allclose(ours(x), theirs.merge_and_unload()(x), rtol=0, atol=1e-12)


def test_rows_have_adapters_of_their_own():
    net = nn.Sequential(nn.Linear(4, 4)).double()
    add_adapter(net, IA3(targets=["0"]), name="one")
    nn.init.normal_(net[0].adapters["one"].ia3_l)
    x = double(2, 4)
    alone = net(x)
    with adapter_rows(net, ["one", None]):
        mixed = net(x)
    assert torch.allclose(mixed[0], alone[0], rtol=0, atol=1e-12)
    assert not torch.allclose(mixed[1], alone[1])


def test_networks_on_meta_can_be_adapted_before_they_have_values():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4))
    assert add_adapter(net, IA3(targets=["0"]))[0].adapters["default"].ia3_l.is_meta


@pytest.mark.parametrize(
    ("ia3", "message"),
    [
        (lambda: IA3(targets="0"), "targets='0' must be a list"),
        (lambda: IA3(targets=[]), r"targets=\[\] must be a list"),
        (lambda: IA3(feedforward="0"), "feedforward='0' must be a list"),
        (lambda: IA3(exclude="0"), "exclude='0' must be a list"),
        (lambda: IA3(targets=["key"]), "IA3: target: 'key' matches none of 2 layers"),
        (lambda: IA3(targets=["0"], feedforward=["wo"]), "IA3: feedforward: 'wo' matches none of 1 layers"),
        (lambda: IA3(targets=["*"]), r"'1' is a Embedding, which it does not fit.*exclude=\['1'\]"),
    ],
)
def test_bad_input_names_the_value_and_leaves_the_network_alone(ia3, message):
    net = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    with pytest.raises(ValueError, match=message):
        add_adapter(net, ia3())
    assert type(net[0]) is nn.Linear


def test_a_layer_with_behaviour_of_its_own_is_refused():
    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match="'0' is a Doubling"):
        add_adapter(nn.Sequential(Doubling(4, 4)), IA3(targets=["0"]))

"""LayerNorm tuning: which layers are norms, and that nothing else trains."""

import pytest
from torch import nn

from lightning_peft import add_adapter
from lightning_peft.adapters.layer_norm_tuning import LayerNormTuning


def trains(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("norm", "own"),
    [
        (nn.LayerNorm(4), ["weight", "bias"]),
        (nn.LayerNorm(4, bias=False), ["weight"]),
        (nn.RMSNorm(4), ["weight"]),
        (nn.GroupNorm(2, 4), ["weight", "bias"]),
        (nn.BatchNorm1d(4), ["weight", "bias"]),
        (nn.SyncBatchNorm(4), ["weight", "bias"]),
        (nn.InstanceNorm2d(4, affine=True), ["weight", "bias"]),
    ],
)
def test_the_weights_of_every_norm_of_torch_train(norm, own):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "norm": norm})
    assert trains(add_adapter(model, LayerNormTuning())) == [f"norm.{name}" for name in own]


def test_the_norms_of_transformers_are_known_by_their_names():
    import transformers

    shared = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    llama = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **shared))
    assert LayerNormTuning().select(llama) == [
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
        "norm.weight",
    ]
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1))
    assert LayerNormTuning().select(t5) == [
        "encoder.block.0.layer.0.layer_norm.weight",
        "encoder.block.0.layer.1.layer_norm.weight",
        "encoder.final_layer_norm.weight",
    ]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT about every norm of transformers
def test_peft_trains_the_same():
    import peft
    import transformers

    shared = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **shared))
    ours = LayerNormTuning().select(model)
    wrapped = peft.get_peft_model(model, peft.LNTuningConfig(task_type="FEATURE_EXTRACTION"))
    theirs = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in ours} == {
        name.removeprefix("base_model.model.").partition(".ln_tuning_layers")[0] for name in theirs
    }


def test_globs_choose_among_the_norms():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert trains(add_adapter(model, LayerNormTuning(targets=["*2"]))) == ["norm2.weight", "norm2.bias"]


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (lambda: LayerNormTuning(targets="norm1"), "LayerNormTuning: targets='norm1' must be a list of globs"),
        (lambda: LayerNormTuning(targets=["norm3"]), "'norm3' matches none of 2 .*Nearest: norm"),
    ],
)
def test_bad_input_names_the_value(tuning, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), tuning())


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)])
def test_a_network_without_weights_of_norms_is_refused(layer):
    with pytest.raises(ValueError, match="LayerNormTuning: this Sequential has no normalisation layer with weights"):
        add_adapter(nn.Sequential(layer, nn.Linear(2, 2)), LayerNormTuning())

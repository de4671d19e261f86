"""BitFit: which parameters are biases, and that nothing else trains."""

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, add_adapter
from lightning_peft.adapters import adapter_rows
from lightning_peft.adapters.bitfit import BitFit


def trains(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_every_bias_of_an_encoder_layer_trains_attention_and_norms_included():
    model = add_adapter(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), BitFit())
    assert trains(model) == [
        "self_attn.in_proj_bias",
        "self_attn.out_proj.bias",
        "linear1.bias",
        "linear2.bias",
        "norm1.bias",
        "norm2.bias",
    ]


def test_globs_choose_among_the_biases():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    assert trains(add_adapter(model, BitFit(targets=["query.*"]))) == ["query.bias"]


def test_a_table_that_is_called_a_bias_is_none():
    class Relative(nn.Module):
        def __init__(self):
            super().__init__()
            self.relative_attention_bias = nn.Embedding(4, 2)
            self.bias = nn.Parameter(torch.zeros(2))

    assert BitFit().select(Relative()) == ["bias"]


def test_a_second_adapter_beside_it_keeps_to_itself():
    model = add_adapter(nn.Sequential(nn.Linear(4, 4)), BitFit(), name="biases")
    add_adapter(model, LoRA(rank=2), name="matrices")
    model[0].adapters["matrices"].bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    assert trains(model) == ["0.bias"]
    assert BitFit().select(model) == ["0.bias"]
    with pytest.raises(ValueError, match="trains parameters of the network itself"), adapter_rows(model, ["biases"]):
        pass


@pytest.mark.parametrize(
    ("bitfit", "message"),
    [
        (lambda: BitFit(targets="*"), r"BitFit: targets='\*' must be a list of globs"),
        (lambda: BitFit(targets=[]), r"BitFit: targets=\[\]"),
        (lambda: BitFit(targets=["query.*"]), r"BitFit: targets: 'query\.\*' matches none of 1 bias.*Nearest: 0\.bias"),
    ],
)
def test_bad_input_names_the_value(bitfit, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(nn.Sequential(nn.Linear(4, 4)), bitfit())


def test_a_network_without_biases_is_refused():
    with pytest.raises(ValueError, match="BitFit: this Sequential has no bias"):
        add_adapter(nn.Sequential(nn.Linear(4, 4, bias=False)), BitFit())

"""Which child is the pretrained network."""

import pytest
from torch import nn

from lightning_peft import FullFinetune, LinearProbe, LoRA
from lightning_peft.adapters.backbone import find_backbone, submodule


def network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


@pytest.mark.parametrize("adapter", [LoRA(rank=2), LinearProbe(), FullFinetune()])
def test_the_only_network_among_the_children_is_found(adapter):
    module = nn.ModuleDict({"loss": nn.CrossEntropyLoss(), "encoder": network(), "head": nn.Linear(8, 2)})
    assert find_backbone(module, adapter) == "encoder"


def test_a_child_called_backbone_is_it_whatever_else_would_fit():
    assert find_backbone(nn.ModuleDict({"decoder": network(), "backbone": network()}), LoRA()) == "backbone"


def test_a_child_that_the_adapter_does_not_fit_is_no_candidate():
    assert find_backbone(nn.ModuleDict({"a": network(), "b": nn.Sequential(nn.PReLU())}), LoRA(rank=1)) == "a"


def test_several_candidates_are_listed_with_their_sizes():
    module = nn.ModuleDict({"left": network(8), "right": network(16)})
    with pytest.raises(ValueError, match=r"2 children fit .*") as error:
        find_backbone(module, LoRA(rank=2), owner="Net")
    assert "left (Sequential, 144)" in str(error.value)
    assert "right (Sequential, 544)" in str(error.value)


def test_where_none_fits_the_children_are_listed():
    with pytest.raises(ValueError, match=r'no child fits .*"\." for the module itself') as error:
        find_backbone(nn.ModuleDict({"layer": nn.Linear(3, 2), "loss": nn.MSELoss()}), LoRA(rank=2))
    assert "layer (Linear, 8): one layer, no network" in str(error.value)
    assert "loss" not in str(error.value)


def test_where_none_fits_each_child_s_reason_is_told():
    module = nn.ModuleDict({"net": nn.Sequential(nn.PReLU())})
    with pytest.raises(ValueError, match=r"net \(Sequential, 1\): LoRA: .* leave none of the 0 layers"):
        find_backbone(module, LoRA(rank=1))


def test_a_dot_is_the_module_itself():
    module = network()
    assert submodule(module, ".") is module
    assert submodule(module, "1") is module[1]
    assert submodule(module, "2") is None
    assert submodule(module, "") is None

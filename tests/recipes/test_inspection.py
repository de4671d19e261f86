"""What inspect shows of a network."""

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_peft import LoRA, adapted
from lightning_peft.matching import match_names
from lightning_peft.recipes.inspection import advice, load_model, main, model_tree
from tests.toy import Toy


def shown(model: nn.Module) -> list[str]:
    screen = io.StringIO()
    Console(width=200, file=screen).print(model_tree(model))
    return screen.getvalue().splitlines()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.ModuleDict({"layers": nn.ModuleList([layer, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])})


def test_every_layer_has_its_shape_its_count_and_its_glob():
    lines = shown(Toy())
    assert any("Linear (weight 8x4, bias 8) 40  backbone.0" in line for line in lines)
    assert any("Linear (weight 2x8, bias 2) 18  head" in line for line in lines)


def test_layers_of_one_form_stand_as_one_and_their_globs_select_them_all():
    lines = shown(encoder())
    (line,) = [line for line in lines if "linear1" in line]
    glob = line.split()[-2]
    assert glob == "layers.*.linear1"
    assert f"{2 * (8 * 16 + 16):,}" not in line  # the count of a layer is that of one
    assert match_names(dict(encoder().named_modules()), glob) == ["layers.0.linear1", "layers.1.linear1"]


def test_a_glob_selects_the_layers_of_its_line_and_no_other():
    wide = nn.ModuleDict({"q": nn.Linear(3, 3), "out": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    model = nn.ModuleDict({"enc": nn.ModuleList([wide, copy.deepcopy(wide)]), "[/] *": nn.Linear(5, 5)})
    model["net"] = nn.Sequential(*(nn.Linear(4, 4) for _ in range(23)), nn.Linear(4, 2))
    lines = shown(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    selected = []
    for line in lines:
        if "(weight" in line:
            selected += match_names(linear, line.rsplit("  ", 2)[1].split(", "))
    assert sorted(selected) == sorted(linear)
    assert any("net.[0-9], net.1[0-9], net.2[0-2]" in line for line in lines)


def test_lazy_layers_are_shown_as_such():
    lines = shown(nn.ModuleDict({"lazy": nn.LazyLinear(4), "layer": nn.Linear(2, 2)}))
    assert "6 parameters" in lines[0]
    assert any("LazyLinear (weight lazy, bias lazy) 0" in line for line in lines)


class Outer:
    class Inner(Toy): ...

    class Broken(Toy):
        def configure_model(self):
            raise RuntimeError("needs a trainer")


class TwoNetworks(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = self.backbone, nn.Sequential(nn.Linear(2, 2))
        del self.backbone


Adapted = adapted(TwoNetworks, LoRA(rank=2), backbone="left")


def test_a_nested_class_is_found_and_an_adapted_one_is_shown_as_its_adapter_finds_it():
    assert isinstance(load_model("tests.recipes.test_inspection:Outer.Inner"), Toy)
    network = load_model("tests.recipes.test_inspection:Adapted")
    assert [line for line in shown(network) if "lora" in line] == []
    assert sum("LoRA" in line for line in shown(network)) == 2
    assert "Adapters go on backbone='left'; their globs begin inside it." in advice(network)


def test_what_all_linear_adapts_is_marked_and_the_head_is_not():
    lines = shown(Toy())
    assert any("backbone.0  LoRA" in line for line in lines)
    assert not any("head" in line and "LoRA" in line for line in lines)


def test_it_says_where_adapters_go_and_what_they_cost():
    assert advice(Toy())[1:] == [
        "Adapters go on backbone='backbone'; their globs begin inside it.",
        'targets="all-linear" adapts 2 of its 2 linear layers: 28 x rank numbers.',
    ]
    assert "2 children fit" in advice(TwoNetworks())[-1]
    assert "does not fit" in advice(nn.Sequential(nn.Conv1d(1, 1, 1)))[-1]


def test_a_class_and_a_folder_are_made_without_reading_weights(tmp_path):
    from transformers import BertConfig

    BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16).save_pretrained(
        tmp_path
    )
    network = load_model(str(tmp_path))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert isinstance(load_model("tests.toy:Toy"), Toy)
    assert torch.equal(load_model("tests.toy:Toy").backbone[0].weight, Toy().backbone[0].weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:Net", "No module named 'no_such_module'"),
        ("tests.toy:rows", "needs no arguments"),
        ("tests.toy:Batches", "must give an nn.Module"),
        ("tests.recipes.test_inspection:Outer.Broken", "RuntimeError: needs a trainer"),
        ("tests.recipes.test_inspection:Outer.None", "cannot be made (AttributeError"),
        ("./no/such/folder", "package.module:Class"),
    ],
)
def test_what_cannot_be_made_is_said_on_the_command_line(capsys, model, message):
    with pytest.raises(SystemExit):
        main([model])
    assert message in capsys.readouterr().err

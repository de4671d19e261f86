"""A checkpoint loads whole and where it belongs, or not at all."""

import pytest
import torch
from lightning_peft import LoRA, LoRAMixin
from tests.toy import Toy, same, weights
from torch import nn


class LoRAToy(LoRAMixin, Toy):
    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))


@pytest.fixture
def checkpoint(fit, tmp_path):
    """A checkpoint's content, and a way to put another content into its file."""
    fit(LoRAToy(), steps=2).save_checkpoint(tmp_path / "net.ckpt")
    return torch.load(tmp_path / "net.ckpt", weights_only=True)


A, B = "backbone.0.lora_A.default", "backbone.0.lora_B.default"


def damage(checkpoint, change):
    state, record = checkpoint["state_dict"], checkpoint["lightning_peft"]
    match change:
        case "missing":
            del state[A]
        case "missing head":
            del state["head.weight"]
        case "extra":
            state["backbone.9.weight"] = torch.zeros(2)
        case "shape":
            state[A] = torch.zeros(3, 4)
        case "base values":
            record["base"]["0.weight"][2] = "0" * 16
        case "base shape":
            record["base"]["0.weight"][0] = [5, 5]
        case "foreign":
            del checkpoint["lightning_peft"]
        case "torn":
            del record["base"]
        case "newer":
            record["format"] = 7


@pytest.mark.parametrize("way", ["load_from_checkpoint", "fit"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", rf"1 missing from the checkpoint:\n\s+{A}"),
        ("missing head", "head.weight"),
        ("extra", r"1 in the checkpoint but not in the module:\n\s+backbone.9.weight"),
        ("shape", rf"{A}: \(3, 4\) in the checkpoint, \(2, 4\) in the module"),
        ("base values", r"1 different in the base network:\n\s+0.weight: other values"),
        ("base shape", r"0.weight: shape \(5, 5\) expected, \(8, 4\) at hand"),
        ("foreign", "has no 'lightning_peft' record"),
        ("torn", r"damaged: it lacks \['base'\]"),
        ("newer", "format 7, written by lightning_peft .* Upgrade"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_difference(change, message, way, checkpoint, fit, tmp_path):
    damage(checkpoint, change)
    path = tmp_path / "changed.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message):
        if way == "fit":
            fit(LoRAToy(), ckpt_path=path, steps=3)
        else:
            LoRAToy.load_from_checkpoint(path)


def test_a_checkpoint_of_the_bare_module_is_foreign(fit, tmp_path):
    fit(Toy(), steps=1).save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="no module with an adapter mixin wrote it"):
        LoRAToy.load_from_checkpoint(tmp_path / "bare.ckpt")


def test_another_pretrained_network_is_refused(checkpoint, fit, tmp_path):
    class OtherToy(LoRAToy):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.backbone[2].bias)

    torch.save(checkpoint, tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match="2.bias: other values"):
        OtherToy.load_from_checkpoint(tmp_path / "net.ckpt")


def test_another_adapter_is_refused(checkpoint, tmp_path):
    class WiderToy(LoRAMixin, Toy):
        pass

    torch.save(checkpoint, tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match=r"rank=2.*\n?.*rank=3"):
        WiderToy.load_from_checkpoint(tmp_path / "net.ckpt", adapter=LoRA(rank=3))


def test_loading_strictly_works_too(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "net.ckpt")
    net = LoRAToy.load_from_checkpoint(tmp_path / "net.ckpt", strict=True)
    assert torch.equal(net.state_dict()[B], checkpoint["state_dict"][B])
    assert same(weights(Toy().backbone), {k: v for k, v in weights(net.backbone).items() if "lora" not in k})


def test_weights_only_checkpoints_are_slim_too(fit, tmp_path):
    fit(LoRAToy(), steps=1).save_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    assert "backbone.0.weight" not in torch.load(tmp_path / "net.ckpt", weights_only=True)["state_dict"]

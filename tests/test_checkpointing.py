"""A checkpoint loads whole and where it belongs, or not at all."""

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, LoRAMixin, merge_adapter
from tests.toy import Toy, same, weights


class LoRAToy(LoRAMixin, Toy):
    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))


@pytest.fixture
def checkpoint(fit, tmp_path):
    """A checkpoint's content, and a way to put another content into its file."""
    fit(LoRAToy(), steps=2).save_checkpoint(tmp_path / "net.ckpt")
    return torch.load(tmp_path / "net.ckpt", weights_only=True)


A, B = "backbone.0.adapters.default.lora_A", "backbone.0.adapters.default.lora_B"


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
        case "unreadable":
            record["base"]["0.weight"] = 3
        case "headless":
            del checkpoint["state_dict"]
        case "alpha":
            record["adapters"]["default"]["alpha"] = 99
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
        ("torn", r"damaged: \['base'\] missing or unreadable"),
        ("unreadable", "damaged: 'base' is unreadable"),
        ("headless", r"damaged: \['state_dict'\]"),
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


def test_another_scale_is_refused_although_all_shapes_agree(checkpoint, fit, tmp_path):
    damage(checkpoint, "alpha")
    torch.save(checkpoint, tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match="alpha: 99 in the checkpoint, 16.0 in the module"):
        fit(LoRAToy(), ckpt_path=tmp_path / "net.ckpt", steps=3)


@pytest.mark.parametrize("content", [b"garbage", b""])
def test_a_file_that_is_no_checkpoint_says_so(content, tmp_path):
    path = tmp_path / "net.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        LoRAToy.load_from_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds a list, not a checkpoint"):
        LoRAToy.load_from_checkpoint(path)


def test_an_early_buffer_is_not_mixed_with_later_ones(fit, tmp_path):
    class BatchNormToy(LoRAToy):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.insert(1, nn.BatchNorm1d(8))

    net = BatchNormToy()
    net.configure_model()
    trainer = fit(net, steps=1)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    early = torch.load(tmp_path / "late.ckpt", weights_only=True)
    for key in [key for key in early["state_dict"] if "running" in key or "num_batches" in key]:
        del early["state_dict"][key]
    early["lightning_peft"]["keys"] = list(early["state_dict"])
    with pytest.raises(ValueError, match="moved here since the adapter came"):
        net.on_load_checkpoint(early)
    BatchNormToy().on_load_checkpoint(early)


def test_a_merged_module_neither_trains_nor_loads(checkpoint, fit, tmp_path):
    torch.save(checkpoint, tmp_path / "net.ckpt")
    net = LoRAToy.load_from_checkpoint(tmp_path / "net.ckpt")
    merge_adapter(net.backbone)
    with pytest.raises(ValueError, match="nothing of it would train. Call unmerge_adapter first"):
        fit(net)
    with pytest.raises(ValueError, match="merged into the base, so no checkpoint can be loaded"):
        net.on_load_checkpoint(checkpoint)
    fit(unmerged(net)).save_checkpoint(tmp_path / "again.ckpt")
    LoRAToy.load_from_checkpoint(tmp_path / "again.ckpt")


def unmerged(net):
    from lightning_peft import unmerge_adapter

    unmerge_adapter(net.backbone)
    return net


def test_saving_without_the_adapter_is_refused(fit, tmp_path):
    net = LoRAToy()
    trainer = fit(net)
    merge_adapter(net.backbone, unload=True)
    with pytest.raises(ValueError, match="carries no adapter"):
        trainer.save_checkpoint(tmp_path / "net.ckpt")


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


def test_a_module_that_has_grown_since_is_refused(checkpoint, tmp_path):
    class GrownToy(LoRAToy):
        def __init__(self) -> None:
            super().__init__()
            self.second_head = nn.Linear(8, 3)

    torch.save(checkpoint, tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match=r"2 missing from the checkpoint:\n\s+second_head.bias"):
        GrownToy.load_from_checkpoint(tmp_path / "net.ckpt")


def test_another_adapter_is_refused(checkpoint, tmp_path):
    class WiderToy(LoRAMixin, Toy):
        pass

    torch.save(checkpoint, tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match="rank: 2 in the checkpoint, 3 in the module"):
        WiderToy.load_from_checkpoint(tmp_path / "net.ckpt", adapter=LoRA(rank=3))


def test_loading_strictly_works_too(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "net.ckpt")
    net = LoRAToy.load_from_checkpoint(tmp_path / "net.ckpt", strict=True)
    assert torch.equal(net.state_dict()[B], checkpoint["state_dict"][B])
    assert same(weights(Toy().backbone), {k: v for k, v in weights(net.backbone).items() if "lora" not in k})


def test_weights_only_checkpoints_are_slim_too(fit, tmp_path):
    fit(LoRAToy(), steps=1).save_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    assert "backbone.0.weight" not in torch.load(tmp_path / "net.ckpt", weights_only=True)["state_dict"]

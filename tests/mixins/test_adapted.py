"""A module class adapted in one expression."""

import abc
import copy
import inspect
import pickle
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_peft import LinearProbe, LoRA, LoRAMixin, adapted
from tests.toy import Toy, rows, same, weights


class AbstractToy(Toy, abc.ABC):
    """A module with a metaclass of its own and hyper-parameters."""

    def __init__(self, width: int = 8, **options) -> None:
        super().__init__(width=width)
        self.save_hyperparameters()
        self.options = options


class Renamed(pl.LightningModule):
    """A pretrained network under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Toy().backbone
        self.classifier = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.classifier(self.encoder(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(rows(24), 6)


Chosen = adapted(Toy, LoRA(rank=2))  # found by its name in YAML


def test_the_class_keeps_its_name_docstring_and_arguments():
    net = adapted(AbstractToy, LoRA(rank=2))
    assert (net.__name__, net.__doc__) == (AbstractToy.__name__, AbstractToy.__doc__)
    assert list(inspect.signature(net).parameters) == ["width", "adapter", "backbone", "options"]
    assert issubclass(net, AbstractToy)
    assert net(width=6, extra=1).options == {"extra": 1}


def test_equal_arguments_give_the_same_class_others_another():
    assert adapted(Toy, LoRA(rank=2)) is adapted(Toy, LoRA(rank=2))
    assert adapted(Toy, LoRA(rank=2)) is not adapted(Toy, LoRA(rank=3))
    assert adapted(Toy, LoRA(rank=2)) is not adapted(Toy, LoRA(rank=2), backbone="backbone")


@pytest.mark.parametrize("module", [Toy, AbstractToy])
@pytest.mark.parametrize("attached", [False, True])
def test_class_and_instances_pickle_and_copy(module, attached):
    cls = adapted(module, LoRA(rank=2))
    net = cls(width=6)
    if attached:
        net.configure_model()
    for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert type(again) is cls
        assert same(weights(again), weights(net))
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert type(pickle.loads(pickle.dumps(module(width=6)))) is module


class Derived(Chosen):
    """What a user makes of an adapted class."""

    def __init__(self, width: int = 8, extra: int = 1) -> None:
        super().__init__(width=width)
        self.extra = extra

    def forward(self, x):
        return super().forward(x) + self.extra


class Heir(Chosen):
    """A derived class that takes what its base takes."""


def test_a_class_derived_from_an_adapted_one_pickles_as_itself_and_has_its_own_arguments():
    net = Derived(extra=3)
    for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert type(again) is Derived
        assert torch.equal(again(torch.ones(1, 4)), net(torch.ones(1, 4)))
    assert pickle.loads(pickle.dumps(Derived)) is Derived
    assert pickle.loads(pickle.dumps(Chosen)) is Chosen
    assert list(inspect.signature(Derived).parameters) == ["width", "extra"]
    assert inspect.signature(Heir) == inspect.signature(Chosen)


class OwnBackbone(Renamed):
    """A module that calls an argument of its own backbone."""

    def __init__(self, backbone: str = "resnet") -> None:
        super().__init__()
        self.kind = backbone


@pytest.mark.parametrize(("arguments", "options"), [((), {}), (("vit",), {}), ((), {"backbone": "vit"})])
def test_a_backbone_argument_of_the_module_stays_the_module_s(arguments, options):
    net = adapted(OwnBackbone, LoRA(rank=2), backbone="encoder")(*arguments, **options)
    net.configure_model()
    assert net.kind == ("vit" if arguments or options else "resnet")
    assert net.adapted_network is net.encoder


def test_it_trains_the_adapter_and_the_head_and_comes_back_from_its_checkpoint(fit, tmp_path):
    cls = adapted(Renamed, LoRA(rank=2))
    net = cls()
    before = weights(net)
    trainer = fit(net, epochs=1)
    moved = [name for name, value in weights(net).items() if not torch.equal(value, before.get(name, value + 1))]
    assert net.backbone_name == "encoder"
    assert all("lora" in name or name.startswith("classifier") for name in moved)
    assert len(moved) == 6
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "net.ckpt")
    assert same(weights(again), weights(net))


def test_the_whole_module_is_adapted_and_comes_back_from_its_checkpoint(fit, tmp_path):
    cls = adapted(Renamed, LoRA(rank=2, targets=["encoder.*"]), backbone=".")
    net = cls()
    head = net.classifier.weight.detach().clone()
    trainer = fit(net, epochs=1)
    assert torch.equal(net.classifier.weight, head)
    assert net.encoder[0].adapters["default"].lora_B.abs().max() > 0
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    stored = torch.load(tmp_path / "net.ckpt", weights_only=True)["state_dict"]
    assert sorted(stored) == [f"encoder.{i}.adapters.default.lora_{m}" for i in (0, 2) for m in "AB"]
    torch.manual_seed(0)
    base = Renamed()
    base.classifier.weight.data.copy_(head)
    base.classifier.bias.data.copy_(net.classifier.bias)
    with pytest.raises(ValueError, match="other values"):  # its head was drawn anew
        cls.load_from_checkpoint(tmp_path / "net.ckpt")
    again = cls()
    again.load_state_dict(base.state_dict())
    fit(again, epochs=2, ckpt_path=tmp_path / "net.ckpt")
    assert torch.equal(again.classifier.weight, head)


def test_what_would_leave_nothing_to_train_is_refused(fit):
    with pytest.raises(ValueError, match=r"backbone='\.' nothing is left to train"):
        fit(adapted(Renamed, LinearProbe(), backbone=".")())


class OwnAdapter(Toy):
    def __init__(self, adapter: str = "usb") -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: adapted(Toy()), "must be a LightningModule class"),
        (lambda: adapted(nn.Linear), "must be a LightningModule class"),
        (lambda: adapted(type("Net", (LoRAMixin, Toy), {})), "has an adapter mixin already"),
        (lambda: adapted(Toy, "lora"), "'lora' must be an adapter"),
        (lambda: adapted(Toy, LoRA), "LoRA'> must be an adapter"),
        (lambda: adapted(OwnAdapter), "OwnAdapter has an argument called adapter itself"),
    ],
)
def test_what_cannot_be_adapted_is_refused(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong()


def test_it_is_chosen_and_configured_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    options = ["--model=tests.mixins.test_adapted.Chosen", "--model.width=6"]
    options += ["--model.adapter=lightning_peft.LoRA", "--model.adapter.rank=3", "--trainer.accelerator=cpu"]
    cli = LightningCLI(Toy, subclass_mode_model=True, run=False, save_config_callback=None, args=options)
    assert type(cli.model) is Chosen
    assert cli.model.adapter == LoRA(rank=3)
    assert "tests.mixins.test_adapted.Chosen" in cli.parser.dump(cli.config)

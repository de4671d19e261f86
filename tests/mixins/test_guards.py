"""A run is stopped before its adapters fail to train, and told when somebody else changes what trains."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_peft import AdapterMixin, LoRA
from tests.toy import Toy


class Guarded(AdapterMixin, Toy):
    def __init__(self, **options) -> None:
        super().__init__(adapter=LoRA(rank=2, **options))


class WithUnused(Guarded):
    """A backbone with a pooler that the loss does not see."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.backbone.add_module("pooler", nn.Linear(8, 8))

    def forward(self, x):
        first, tanh, last, _ = self.backbone
        return self.head(last(tanh(first(x))))


def test_adapters_without_a_gradient_are_named_with_the_cure(fit):
    with pytest.raises(ValueError, match=r"2 adapter parameters got no gradient .* exclude=\['pooler'\]"):
        fit(WithUnused())
    fit(WithUnused(exclude=["pooler"]))


def test_a_network_that_uses_its_layers_by_turns_may_say_so(fit):
    class ByTurns(WithUnused):
        conditional_adapters = True

    fit(ByTurns())


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_a_callback_that_frees_the_backbone_is_named_at_the_next_checkpoint(fit, tmp_path):
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=0, verbose=False)
    with pytest.warns(
        UserWarning, match=r"4 freed \(first .*\); BackboneFinetuning among the trainer's callbacks does that"
    ):
        fit(Guarded(), callback).save_checkpoint(tmp_path / "net.ckpt")


def test_what_a_callback_froze_before_the_first_step_is_named_when_training_starts(fit):
    class Early(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.backbone[0].adapters["default"].requires_grad_(False)

    with pytest.warns(
        UserWarning, match=r"2 frozen \(first 0.adapters.default.lora_A, .*\); a callback or a call of your own"
    ):
        fit(Guarded(), Early(), steps=1)


def test_what_a_call_of_one_s_own_froze_is_named_at_the_next_checkpoint(fit, tmp_path):
    class Freezing(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.backbone[0].adapters["default"].lora_A.requires_grad_(False)

    trainer = fit(Guarded(), Freezing(), steps=2)
    with pytest.warns(
        UserWarning, match=r"1 frozen \(first 0.adapters.default.lora_A\); a callback or a call of your own"
    ):
        trainer.save_checkpoint(tmp_path / "net.ckpt")


def test_a_part_that_was_replaced_is_missed(fit, tmp_path):
    net = Guarded()
    trainer = fit(net)
    net.backbone[0] = nn.Linear(4, 8)
    with pytest.raises(ValueError, match="2 parameters of the adapter are gone"):
        trainer.save_checkpoint(tmp_path / "net.ckpt")


def test_several_adapters_come_back_with_the_one_that_acted(fit, tmp_path):
    from lightning_peft import add_adapter, set_adapter

    net = Guarded(train_also=["2.bias"])
    net.configure_model()
    add_adapter(net.backbone, LoRA(rank=1, train_also=["2.bias"]), name="second")
    set_adapter(net.backbone, "second")
    trainer = fit(net, steps=3)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = Guarded.load_from_checkpoint(tmp_path / "net.ckpt")
    x = torch.randn(3, 4)
    assert torch.equal(again(x), net(x))
    for module in (net, again):
        set_adapter(module.backbone, "default")
    assert torch.equal(again(x), net(x))
    with pytest.raises(AssertionError):
        assert torch.equal(set_adapter(net.backbone, "second")(x), set_adapter(net.backbone, "default")(x))

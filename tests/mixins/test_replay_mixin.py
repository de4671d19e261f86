"""A replay loss joins the training loss once, whatever the training step returns."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_peft import ReplayMixin
from tests.toy import Toy


class Rehearsal(Toy):
    """Defines replay_step itself: the mixin must not stand in its way."""

    def training_step(self, batch, batch_idx):
        return self.head.weight.sum() * 2

    def replay_step(self, batch):
        return self.head.bias.sum() * batch

    def log(self, *args, **kwargs):
        pass


class Replaying(ReplayMixin, Rehearsal):
    pass


def test_the_loss_is_the_sum_and_the_batch_is_used_once():
    net = Replaying()
    plain = Rehearsal.training_step(net, None, 0)
    net.replay = 3.0, 0.5, 1.0
    assert torch.equal(net.training_step(None, 0), plain + 0.5 * net.head.bias.sum() * 3.0)
    assert net.replay is None
    assert torch.equal(net.training_step(None, 0), plain)


def test_a_dictionary_keeps_its_other_entries():
    class Base(Rehearsal):
        def training_step(self, batch):
            return {"loss": self.head.weight.sum(), "extra": 7}

    class FromDictionary(ReplayMixin, Base):
        pass

    net = FromDictionary()
    net.replay = 1.0, 1.0, 1.0
    output = net.training_step(None, 0)
    assert output["extra"] == 7
    assert torch.equal(output["loss"], net.head.weight.sum() + net.head.bias.sum())


def test_a_skipped_step_stays_skipped():
    class Skipping(Rehearsal):
        def training_step(self, batch, batch_idx):
            return None

    class ReplaySkipping(ReplayMixin, Skipping):
        pass

    net = ReplaySkipping()
    net.replay = 1.0, 1.0, 1.0
    assert net.training_step(None, 0) is None
    assert net.replay is None


def test_the_mixin_must_stand_before_the_module():
    with pytest.raises(TypeError, match=r"Write class Wrong\(ReplayMixin, Rehearsal\)"):

        class Wrong(Rehearsal, ReplayMixin):
            pass


def test_mixins_may_stand_in_any_order_among_themselves(fit):
    from lightning_peft import LoRA, LoRAMixin

    class First(ReplayMixin, LoRAMixin, Toy):
        pass

    class Second(LoRAMixin, ReplayMixin, Toy):
        pass

    for kind in (First, Second):
        net = kind(adapter=LoRA(rank=2))
        fit(net)
        assert isinstance(net, pl.LightningModule)
        assert net.backbone[0].adapters["default"].lora_B.abs().max() > 0

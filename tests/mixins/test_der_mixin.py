"""Stored logits are those of the module as it was, and both terms are rehearsed."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, LoRAMixin
from lightning_peft.callbacks import ReplayMixing
from lightning_peft.mixins.der_mixin import DERMixin, LogitMemory, store_logits
from lightning_peft.mixins.distill_mixin import DistillMixin
from lightning_peft.randomness import random_state
from tests.toy import Toy, rows, same, weights

OLD = rows(20, seed=9)


class Base(Toy):
    def __init__(self, dropout=0.0):
        super().__init__(dropout=dropout)

    def distill_outputs(self, batch):
        return self(batch[0])


class Rehearsing(DERMixin, Base):
    pass


class WithLoRA(DERMixin, LoRAMixin, Base):
    pass


def test_the_memory_holds_each_row_its_logits_and_the_step(fit):
    net = Rehearsing()
    fit(net, ReplayMixing(LogitMemory(OLD, torch.zeros(20, 2), 0).loader(), ratio=0.5))
    memory = store_logits(OLD, net, batch_size=7)
    assert len(memory) == 20
    for index in (0, 13, 19):
        (x, y), logits, step = memory[index]
        assert torch.equal(x, OLD[index][0])
        assert torch.equal(y, OLD[index][1])
        torch.testing.assert_close(logits, net(x).detach())
        assert step == 4
    assert store_logits(OLD, net, step=70)[0][2] == 70
    assert not memory.logits.requires_grad
    assert torch.equal(pickle.loads(pickle.dumps(memory)).logits, memory.logits)


def test_storing_leaves_no_trace_and_has_no_dropout():
    net = Rehearsing(dropout=0.5)
    net.head.eval()
    modes, state, values = {n: m.training for n, m in net.named_modules()}, random_state(), weights(net)
    first, second = store_logits(OLD, net), store_logits(OLD, net, batch_size=3)
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(OLD.tensors[0])
    torch.testing.assert_close(first.logits, expected)
    torch.testing.assert_close(second.logits, expected)
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert torch.equal(random_state()["torch"], state["torch"])
    assert same(weights(net), values)


def test_the_step_is_the_sum_of_both_terms_with_its_weights():
    net = Rehearsing()
    memory = store_logits(OLD, net)
    with torch.no_grad():
        net.head.weight.add_(1)
    net.der_alpha, net.der_beta = 0.3, 0.7
    batch = next(iter(DataLoader(memory, 20, collate_fn=memory.loader().collate_fn)))
    logits = net(OLD.tensors[0]).detach()
    expected = 0.3 * ((logits - memory.logits) ** 2).mean() + 0.7 * F.cross_entropy(logits, OLD.tensors[1])
    torch.testing.assert_close(net.replay_step(batch).detach(), expected)
    net.der_beta = 0.0
    torch.testing.assert_close(net.replay_step(batch).detach(), 0.3 * ((logits - memory.logits) ** 2).mean())


def test_a_collate_function_of_the_memory_s_own_and_labels_by_name():
    class Named(DERMixin, Toy):
        def distill_outputs(self, batch):
            return self(batch["x"])

    def collate(items):
        return {"x": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}

    net = Named()
    memory = store_logits(DataLoader(OLD, collate_fn=collate), net)
    batch, stored, steps = next(iter(memory.loader()))
    assert batch.keys() == {"x", "labels"}
    assert (stored.shape, steps.tolist()) == ((1, 2), [0])
    assert net.replay_step((batch, stored, steps)).requires_grad
    assert store_logits(
        DataLoader(OLD, collate_fn=collate), net, lambda module, batch: module.backbone(batch["x"])
    ).logits.shape == (
        20,
        8,
    )


@pytest.mark.parametrize("kind", [Rehearsing, WithLoRA])
def test_a_fit_that_rehearses_stays_nearer_to_its_logits(fit, kind):
    far = {}
    for weight in (1e-6, 4.0):
        torch.manual_seed(0)
        net = kind(adapter=LoRA(rank=2)) if kind is WithLoRA else kind()
        net.lr = 0.02
        memory = store_logits(OLD, net, step=0)
        fit(net, ReplayMixing(memory.loader(), ratio=0.5, weight=weight), epochs=3)
        far[weight] = float((store_logits(OLD, net).logits - memory.logits).square().mean())
    assert far[4.0] < 0.5 * far[1e-6]


def test_what_does_not_fit_is_refused(fit):
    class Bare(DERMixin, Toy):
        pass

    class Unlabelled(DERMixin, Base):
        def distill_outputs(self, batch):
            return self(batch)

    memory = store_logits(OLD, Rehearsing())
    with pytest.raises(ValueError, match="Bare: has DERMixin but no distill_outputs"):
        fit(Bare(), ReplayMixing(memory.loader()))
    with pytest.raises(ValueError, match="store_logits: Bare has no distill_outputs"):
        store_logits(OLD, Bare())
    with pytest.raises(ValueError, match=r"Rehearsing: the memory's batch is no \(rows, logits, steps\)"):
        fit(Rehearsing(), ReplayMixing(OLD, ratio=0.5))
    with pytest.raises(ValueError, match=r"Unlabelled: a Tensor of old rows has no labels"):
        Unlabelled().replay_step((torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2)))
    with pytest.raises(ValueError, match="LogitMemory: 3 logits for 20 rows"):
        LogitMemory(OLD, torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="store_logits: batch_size=0 must be at least 1"):
        store_logits(OLD, Rehearsing(), batch_size=0)
    with pytest.raises(ValueError, match="for 20 rows. It needs one entry for each row"):
        store_logits(OLD, Rehearsing(), lambda module, batch: module(batch[0]).mean(0, keepdim=True))
    with pytest.raises(ValueError, match="store_logits: rows"):
        store_logits(TensorDataset(torch.zeros(0, 4)), Rehearsing())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"der_alpha": -1}, "Wrong: der_alpha=-1 must be a number of at least 0"),
        ({"der_alpha": 0, "der_beta": 0}, "der_alpha=0 and der_beta=0 rehearse nothing"),
    ],
)
def test_weights_out_of_range_are_refused_when_the_class_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        type("Wrong", (DERMixin, Base), settings)


def test_two_mixins_with_a_replay_step_are_refused():
    with pytest.raises(TypeError, match="Wrong: DERMixin would hide the replay_step of DistillMixin"):
        type("Wrong", (DERMixin, DistillMixin, Base), {})
    with pytest.raises(TypeError, match=r"Write class Wrong\(DERMixin, Base\)"):
        type("Wrong", (Base, DERMixin), {})

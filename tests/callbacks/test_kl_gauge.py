"""The gauge is the KL of the network as it was to the network as it is, and leaves no trace."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import LoRA, add_adapter
from lightning_peft.callbacks import ExactResume, FreezeSchedule, Phase
from lightning_peft.callbacks.kl_gauge import KLGauge
from tests.toy import Toy, same, weights


def logits(module, batch):
    return module(batch[0])


class Looks(pl.Callback):
    """Computes each value by itself, from a whole copy of the first network."""

    def __init__(self, gauge):
        self.gauge, self.found, self.expected = gauge, [], []

    def on_train_start(self, trainer, pl_module):
        self.first = copy.deepcopy(pl_module).double().eval()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(self.gauge.value)
        now = copy.deepcopy(pl_module).double().eval()
        with torch.no_grad():
            log_p, log_q = (F.log_softmax(net(batch[0].double()), -1) for net in (now, self.first))
        self.expected.append(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()))


def adapted():
    net = Toy(dropout=0.3)
    add_adapter(net.backbone, LoRA(rank=2, targets=["*"]))
    return net


@pytest.mark.parametrize("make", [lambda: Toy(dropout=0.3), adapted])
def test_it_is_the_divergence_from_the_first_network(make, fit):
    gauge = KLGauge(logits, every_n_steps=1)
    looks = Looks(gauge)
    fit(make(), looks, gauge, epochs=2)
    assert looks.found == pytest.approx(looks.expected, rel=1e-4, abs=1e-7)
    assert max(looks.found) > 1e-3


def test_with_an_adapter_no_weight_of_the_base_is_copied(fit):
    net = adapted()
    gauge = KLGauge(logits)
    fit(net, gauge)
    assert set(gauge.reference.parameters) == {name for name, _ in net.named_parameters() if name.startswith("head.")}


def test_what_a_schedule_frees_later_is_kept_in_time(fit):
    net, gauge = Toy(), KLGauge(logits, every_n_steps=1)
    first = weights(net)
    looks = Looks(gauge)
    fit(net, FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"])]), looks, gauge, epochs=2)
    assert looks.found == pytest.approx(looks.expected, rel=1e-4, abs=1e-7)
    assert all(torch.equal(gauge.reference.parameters[name], first[name]) for name in gauge.reference.parameters)


def test_rows_outside_the_mask_do_not_count(fit):
    def masked(module, batch):
        found = module(batch[0])
        return found, torch.arange(len(found)) < 2

    def cut(module, batch):
        return module(batch[0][:2])

    values = []
    for outputs in (masked, cut):
        torch.manual_seed(2)
        gauge = KLGauge(outputs, every_n_steps=1)
        fit(Toy(), gauge)
        values.append(gauge.value)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_it_looks_after_the_first_step_and_every_so_many(fit):
    steps = []

    class Steps(KLGauge):
        def _look(self, trainer, pl_module, batch):
            steps.append(trainer.global_step)
            return super()._look(trainer, pl_module, batch)

    fit(Toy(), Steps(logits, every_n_steps=3), epochs=3, accumulate_grad_batches=2)
    assert steps == [1, *range(3, steps[-1] + 1, 3)]
    assert len(steps) > 2


def test_training_is_bit_identical_with_it(fit):
    nets = [Toy(dropout=0.3), Toy(dropout=0.3)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, callbacks in zip(nets, ([], [KLGauge(logits, every_n_steps=1)]), strict=True):
        torch.manual_seed(2)
        fit(net, *callbacks, epochs=2)
    assert same(weights(nets[0]), weights(nets[1]))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_compares_with_the_same_network(fit, tmp_path):
    def run(folder, ckpt_path=None):
        torch.manual_seed(2)
        net, gauge = Toy(dropout=0.3), KLGauge(logits, every_n_steps=2)
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        fit(net, gauge, ExactResume(), keep, epochs=3, ckpt_path=ckpt_path)
        return gauge.value

    whole = run("whole")
    path = next((tmp_path / "whole").glob("*step=3.ckpt"))
    assert run("again", path) == whole


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_the_reference(twin, fit):
    gauge = KLGauge(logits)
    fit(Toy(), gauge)
    assert same(twin(gauge).reference.parameters, gauge.reference.parameters)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": 3}, r"outputs=3 must be a function of \(module, batch\)"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number of at least 1"),
        ({"every_n_steps": True}, "every_n_steps=True must be a whole number"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=f"KLGauge: {message}"):
        KLGauge(**{"outputs": logits, **arguments})


def test_what_is_no_logits_is_named(fit):
    with pytest.raises(ValueError, match="KLGauge: outputs returned int; it must return a tensor of logits"):
        fit(Toy(), KLGauge(lambda module, batch: 3))

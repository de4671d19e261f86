"""Losses against formulas written out, and a reference that nothing moves and that moves nothing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft import BitFit, FullFinetune, LoRA, add_adapter, merge_adapter
from lightning_peft.distillation import Reference, der_loss, kl_to_reference, mse_to_reference
from lightning_peft.randomness import random_state
from tests.toy import same, weights


def doubles(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(logits, reference, temperature=1.0, leave_out=None):
    """KL(reference || model) of one row, in plain Python floats."""
    kept = [c for c in range(len(logits)) if c != leave_out]
    p, q = (np.exp(np.asarray([row[c] for c in kept]) / temperature) for row in (logits, reference))
    p, q = p / p.sum(), q / q.sum()
    return temperature**2 * sum(float(b) * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))


def test_the_value_that_the_literature_agrees_on():
    model, reference = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(kl_to_reference(model, reference)) == pytest.approx(0.143841, abs=1e-6)
    assert float(kl_to_reference(reference, model)) == pytest.approx(
        0.130812, abs=1e-6
    )  # the other direction is another number


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("excluded", [False, True])
def test_kl_is_the_formula(temperature, excluded):
    logits, reference = doubles(6, 5), doubles(6, 5, seed=1)
    targets = torch.tensor([0, 4, 2, -100, 1, 3])
    left_out = [None if not excluded or target < 0 else int(target) for target in targets]
    rows = zip(logits.tolist(), reference.tolist(), left_out, strict=True)
    expected = np.mean([divergence(p, q, temperature, leave_out) for p, q, leave_out in rows])
    found = kl_to_reference(logits, reference, temperature=temperature, excluded=targets if excluded else None)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_kl_is_the_difference_of_the_distributions(temperature):
    logits, reference = doubles(4, 3, 5).requires_grad_(), doubles(4, 3, 5, seed=1).requires_grad_()
    kl_to_reference(logits, reference, temperature=temperature).backward()
    p, q = ((it.detach() / temperature).softmax(-1) for it in (logits, reference))
    torch.testing.assert_close(logits.grad, temperature * (p - q) / 12, rtol=1e-12, atol=1e-14)  # T of T^2 is left
    assert reference.grad is None


def test_the_gradient_of_kl_passes_a_numerical_check_with_everything_on():
    reference, mask = doubles(4, 5, seed=1), torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    targets = torch.tensor([0, 1, -100, 4])

    def loss(logits):
        return kl_to_reference(logits, reference, temperature=1.5, mask=mask, excluded=targets)

    assert torch.autograd.gradcheck(loss, doubles(4, 5).requires_grad_())


def test_a_class_that_is_left_out_has_no_gradient():
    logits, targets = doubles(3, 4).requires_grad_(), torch.tensor([1, -1, 3])
    kl_to_reference(logits, doubles(3, 4, seed=1), excluded=targets).backward()
    assert [logits.grad[0, 1], logits.grad[2, 3]] == [0, 0]
    assert (logits.grad[1] != 0).all()


@pytest.mark.parametrize("loss", [kl_to_reference, mse_to_reference])
def test_masked_tokens_do_not_count_and_each_token_counts_the_same(loss):
    outputs, reference = doubles(2, 3, 4), doubles(2, 3, 4, seed=1)
    outputs[0, 1], reference[1, 2] = math.nan, math.inf  # padding may hold anything
    mask = torch.tensor([[True, False, True], [True, False, False]])
    kept = outputs[mask].requires_grad_()
    outputs.requires_grad_()
    found = loss(outputs, reference, mask=mask)
    expected = loss(kept, reference[mask])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for each in (found, expected):
        each.backward()
    torch.testing.assert_close(outputs.grad[mask], kept.grad)


@pytest.mark.parametrize("loss", [kl_to_reference, mse_to_reference])
def test_without_a_token_that_counts_the_loss_is_zero_with_a_gradient(loss):
    outputs = doubles(2, 3).requires_grad_()
    value = loss(outputs, doubles(2, 3, seed=1), mask=torch.zeros(2))
    value.backward()
    assert float(value.detach()) == 0
    assert torch.equal(outputs.grad, torch.zeros_like(outputs))
    assert float(loss(doubles(0, 3), doubles(0, 3))) == 0


def test_a_class_that_the_reference_rules_out_counts_nothing():
    logits, reference = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 0.0, -math.inf]])
    value = kl_to_reference(logits, reference)
    value.backward()
    assert float(value.detach()) == pytest.approx(math.log(1.5))
    torch.testing.assert_close(logits.grad, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]))


def test_half_precision_is_computed_in_float32():
    logits, reference = doubles(8, 50).bfloat16(), doubles(8, 50, seed=1).bfloat16()
    assert kl_to_reference(logits, reference).dtype == mse_to_reference(logits, reference).dtype == torch.float32
    expected = kl_to_reference(logits.double(), reference.double())
    assert float(kl_to_reference(logits, reference)) == pytest.approx(float(expected), rel=1e-5)


def test_features_are_held_by_their_mean_squared_difference():
    features, reference = doubles(3, 4), doubles(3, 4, seed=1)
    assert float(mse_to_reference(features, reference)) == pytest.approx(np.mean((features - reference).numpy() ** 2))


def test_der_is_the_sum_of_both_terms_and_labels_may_be_missing():
    logits, stored, labels = doubles(4, 3), doubles(4, 3, seed=1), torch.tensor([0, 2, -100, 1])
    squares = np.mean((logits - stored).numpy() ** 2)
    entropy = np.mean(
        [math.log(np.exp(row).sum()) - row[y] for row, y in zip(logits.numpy(), labels, strict=True) if y >= 0]
    )
    assert float(der_loss(logits, stored, labels, alpha=0.3, beta=0.7)) == pytest.approx(0.3 * squares + 0.7 * entropy)
    none = torch.full((4,), -100)
    assert float(der_loss(logits, stored, none, alpha=0.3, beta=0.7)) == pytest.approx(0.3 * squares)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_to_reference(doubles(2, 3), doubles(2, 4)), r"kl_to_reference: shapes \(2, 3\) and \(2, 4\)"),
        (lambda: kl_to_reference(doubles(2, 3), doubles(2, 3), temperature=0), "temperature=0 must be above 0"),
        (lambda: kl_to_reference(doubles(2, 3), doubles(2, 3), mask=torch.ones(3)), r"mask has shape \(3,\)"),
        (lambda: kl_to_reference(doubles(2, 3), doubles(2, 3), excluded=torch.ones(2, 3)), "excluded has shape"),
        (lambda: mse_to_reference(doubles(2, 3), doubles(3, 3)), r"mse_to_reference: shapes"),
        (lambda: der_loss(doubles(2, 3), doubles(2, 3), torch.ones(3).long()), r"der_loss: labels has shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Careless(nn.Module):
    """Everything that a careless reference pass would disturb or miss."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6))
        self.frozen_norm = nn.BatchNorm1d(6).eval()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return F.dropout(self.head(self.frozen_norm(self.below(x))), 1e-12)  # draws in eval mode too


def move(net):
    """What training does to a network: parameters that train, adapters, and running statistics."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    net.train()
    net(torch.randn(20, 4).to(next(net.parameters())) + 3)


ADAPTERS = {
    "none": None,
    "full": FullFinetune(),
    "lora": LoRA(rank=2),
    "bias": BitFit(),
    "lora and norms": LoRA(rank=2, targets=["*0"], train_also=["1.*"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_is_the_network_before_whatever_trained(kind):
    torch.manual_seed(3)
    net, x = Careless(), torch.randn(5, 4)
    before = net.eval()(x).detach()
    net.train()
    if (adapter := ADAPTERS[kind]) is not None:
        add_adapter(net.below, adapter)
    reference = Reference()
    reference.keep(net)
    for _ in range(2):
        move(net)
        for record in [it for it in [vars(net.below).get("lightning_peft_attachment")] if it]:
            record.ever_trained |= record.expected
        assert not torch.allclose(net.eval()(x), before, atol=0.1)
        net.train()
        with reference.acting(net):
            assert torch.equal(net(x), before)
    assert all(not value.requires_grad for value in reference.parameters.values())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_may_have_the_adapter_as_an_earlier_task_left_it(kind):
    torch.manual_seed(3)
    net, x = Careless(), torch.randn(5, 4)
    if (adapter := ADAPTERS[kind]) is not None:
        add_adapter(net.below, adapter)
    move(net)  # the earlier task
    before = net.eval()(x).detach()
    reference = Reference(adapters_on=True)
    reference.keep(net)
    move(net)
    now = net.eval()(x).detach()
    assert not torch.allclose(now, before, atol=0.1)
    for kept in (reference, Reference(**reference.state_dict())):
        with kept.acting(net):
            assert torch.equal(net(x), before)
        assert torch.equal(net(x), now)


def test_a_merged_adapter_cannot_be_put_back_to_what_it_was():
    net = nn.Sequential(nn.Linear(4, 4))
    add_adapter(net, LoRA(rank=2))
    reference = Reference(adapters_on=True)
    reference.keep(net)
    merge_adapter(net)
    with pytest.raises(ValueError, match="the adapter is merged"), reference.acting(net):
        pass


def test_with_an_adapter_only_what_trains_beside_it_is_copied():
    net = Careless()
    add_adapter(net.below, LoRA(rank=2))
    reference = Reference()
    reference.keep(net)
    norms = {"frozen_norm.weight", "frozen_norm.bias"}
    assert reference.parameters.keys() == {"head.weight", "head.bias", *norms}
    assert reference.buffers.keys() == {name for name, _ in net.named_buffers()}


def test_a_merged_adapter_is_off_too():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(5, 4)
    before = net(x).detach()
    add_adapter(net, LoRA(rank=2))
    reference = Reference()
    reference.keep(net)
    move(net)
    merge_adapter(net)
    assert not torch.allclose(net(x), before)
    with reference.acting(net):
        assert torch.equal(net(x), before)
    assert not torch.allclose(net(x), before)


def test_the_network_is_untouched_by_its_reference():
    net, x = Careless(), torch.randn(5, 4)
    add_adapter(net.below, LoRA(rank=2, dropout=0.5))
    reference = Reference()
    reference.keep(net)
    move(net)
    net.frozen_norm.eval()
    objects = {name: (id(it), it.data_ptr()) for name, it in [*net.named_parameters(), *net.named_buffers()]}
    values, modes, state = weights(net), {name: it.training for name, it in net.named_modules()}, random_state()
    for stop in (False, True):
        try:
            with reference.acting(net):
                assert not any(module.training for module in net.modules())
                assert not net(x).requires_grad
                if stop:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert same(weights(net), values)
        assert {
            name: (id(it), it.data_ptr()) for name, it in [*net.named_parameters(), *net.named_buffers()]
        } == objects
        assert {name: it.training for name, it in net.named_modules()} == modes
        assert str(random_state()) == str(state)
        assert torch.equal(random_state()["torch"], state["torch"])
        assert torch.is_autocast_cache_enabled()


def test_a_loss_that_waits_for_its_backward_pass_has_the_same_gradient():
    def gradients(use):
        torch.manual_seed(1)
        net = Careless().double()
        reference = Reference()
        reference.keep(net)
        move(net)
        x = torch.randn(5, 4).double()
        loss = net(x).square().sum()
        if use:
            with reference.acting(net):
                net(x)
        loss.backward()
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    assert same(gradients(True), gradients(False))


def test_autocast_does_not_confuse_the_two():
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x).detach()
    reference = Reference()
    reference.keep(net)
    move(net)
    with torch.autocast("cpu", torch.bfloat16):
        mine = net(x)  # now autocast holds a copy of the weight
        with reference.acting(net):
            assert torch.equal(net(x), before)
        again = net(x)
        assert torch.equal(again, mine)
        again.float().sum().backward()
    assert net.weight.grad is not None


def test_what_is_freed_later_is_kept_as_it_was_then():
    net, x = Careless(), torch.randn(5, 4)
    before = net.eval()(x).detach()
    net.below.requires_grad_(False)
    reference = Reference()
    reference.keep(net)
    move(net)
    assert not any(name.startswith("below") for name in reference.parameters)
    net.below.requires_grad_(True)
    reference.keep(net)
    move(net)
    reference.keep(net)
    with reference.acting(net):
        assert torch.equal(net(x), before)


def test_tied_weights_are_copied_once_and_put_back_under_each_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 7, bias=False)
            self.backbone = nn.Module()
            self.backbone.embed = nn.Embedding(7, 4)
            self.backbone.embed.weight = self.out.weight

        def forward(self, x):
            return self.out(self.backbone.embed(x))

    for adapter in (None, FullFinetune()):
        net, x = Tied(), torch.arange(7)
        before = net(x).detach()
        if adapter is not None:
            add_adapter(net.backbone, adapter)
        reference = Reference()
        reference.keep(net)
        assert len({id(value) for value in reference.parameters.values()}) == 1
        with torch.no_grad():
            net.out.weight.add_(1)
        after = net(x).detach()
        with reference.acting(net):
            assert torch.equal(net(x), before)
        assert torch.equal(net(x), after)


def test_weights_below_an_adapter_that_nobody_kept_are_refused():
    net = nn.Sequential(nn.Linear(4, 4))
    add_adapter(net, FullFinetune())
    vars(net)["lightning_peft_attachment"].ever_trained |= {"0.weight"}
    with pytest.raises(ValueError, match="weights of the network itself train"), Reference().acting(net):
        pass


def test_it_survives_being_saved(tmp_path):
    net, x = Careless(), torch.randn(5, 4)
    before = net.eval()(x).detach()
    reference = Reference()
    reference.keep(net)
    torch.save(reference.state_dict(), tmp_path / "kept.pt")
    move(net)
    second = Reference(**torch.load(tmp_path / "kept.pt", weights_only=True))
    second.place(net)
    with second.acting(net):
        assert torch.equal(net(x), before)

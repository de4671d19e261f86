"""The diagonal of the Fisher information is that of the formula, whoever shares the rows out, and measuring leaves no trace."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft.fisher
from lightning_peft import LoRA, add_adapter
from lightning_peft.fisher import diagonal_fisher, score_vectors
from tests.toy import Toy, same, weights

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def call(module, batch):
    return module(batch[0])


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def test_of_softmax_regression_it_is_the_formula_written_out():
    net = linear()
    found = diagonal_fisher(net, TensorDataset(X, Y), call, ["weight", "bias"])
    weight, bias = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for x in X:
        z = net.weight.detach() @ x + net.bias.detach()
        p = [math.exp(z[c]) / sum(math.exp(v) for v in z) for c in range(3)]
        for k in range(3):  # sum_c p_c (delta_ck - p_k)^2 = p_k (1 - p_k)
            weight[k] += p[k] * (1 - p[k]) * x**2 / len(X)
            bias[k] += p[k] * (1 - p[k]) / len(X)
    assert torch.allclose(found["weight"], weight, rtol=1e-12, atol=0)
    assert torch.allclose(found["bias"], bias, rtol=1e-12, atol=0)


def by_jacobian(net, names):
    """Of a whole network, with torch.func, from the derivatives of the log-probabilities themselves."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def log_p(values, x):
        return torch.func.functional_call(net, {**parameters, **values}, (x[None],))[0].log_softmax(-1)

    chosen = {name: parameters[name] for name in names}
    sums = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for x in X:
        p = log_p(chosen, x).exp()
        for name, jacobian in torch.func.jacrev(log_p)(chosen, x).items():
            sums[name] += torch.einsum("c,c...->...", p, jacobian.square()) / len(X)
    return sums


def test_of_a_network_it_is_that_of_the_jacobian_of_the_log_probabilities():
    net = Toy().double()
    names = ["backbone.0.weight", "backbone.2.bias", "head.weight"]
    found, wanted = diagonal_fisher(net, TensorDataset(X, Y), call, names), by_jacobian(net, names)
    assert list(found) == names
    for name in names:
        assert torch.allclose(found[name], wanted[name], rtol=1e-10, atol=1e-16)


def test_of_an_adapter_it_is_that_of_its_matrices():
    net = Toy().double()
    add_adapter(net.backbone, LoRA(rank=2))
    names = [name for name, p in net.named_parameters() if "lora" in name]
    with torch.no_grad():
        for name in names:
            net.get_parameter(name).normal_()
    found, wanted = diagonal_fisher(net, TensorDataset(X, Y), call, names), by_jacobian(net, names)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-10, atol=1e-16) for name in names)


def test_labels_of_the_data_give_the_mean_square_of_the_gradients_of_the_loss():
    net, wanted = linear(), torch.zeros(3, 4, dtype=torch.float64)
    for x, y in zip(X, Y, strict=True):
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), net.weight)
        wanted += gradient.square() / len(X)
    found = diagonal_fisher(
        net, TensorDataset(X, Y), lambda module, batch: (module(batch[0]), batch[1]), ["weight"], labels="empirical"
    )
    assert torch.allclose(found["weight"], wanted, rtol=1e-12, atol=0)


def test_drawn_labels_give_the_exact_one_in_the_mean_and_the_same_draw_for_the_same_row():
    net, many = linear(), TensorDataset(X[:1].expand(1500, 4), Y[:1].expand(1500))
    exact = diagonal_fisher(net, TensorDataset(X[:1], Y[:1]), call, ["weight"])["weight"]
    drawn = diagonal_fisher(net, many, call, ["weight"], labels="sampled")["weight"]
    # standard error of a share of 1,500 draws: below 0.013
    assert torch.allclose(drawn, exact, rtol=0.15, atol=0)
    assert not torch.allclose(drawn, exact, rtol=1e-4, atol=0)
    assert torch.equal(drawn, diagonal_fisher(net, many, call, ["weight"], labels="sampled")["weight"])


def test_a_row_of_several_predictions_has_the_sum_over_them():
    net = linear()
    apart = diagonal_fisher(net, TensorDataset(X[:6]), call, ["weight"])["weight"]
    together = diagonal_fisher(net, TensorDataset(X[:6].view(2, 3, 4)), call, ["weight"])["weight"]
    assert torch.allclose(together, 3 * apart, rtol=1e-12, atol=0)


def test_the_scores_have_mean_zero_and_labels_that_do_not_count_have_none():
    z = torch.randn(2, 5, dtype=torch.float64)
    p = z.softmax(-1)
    scores = torch.stack(list(score_vectors(z, "exact"))).view(2, 5, 2, 5)
    for place in range(2):  # sum_c p_c (e_c - p) = sum_c sqrt(p_c) v_c = 0
        assert torch.einsum("c,cpk->pk", p[place].sqrt(), scores[place]).abs().max() < 1e-15
        assert not scores[place, :, 1 - place].any()
    (score,) = score_vectors(z, "empirical", torch.tensor([-100, 3]))
    assert not score[0].any()
    assert score[1, 3] > 0


@pytest.mark.parametrize("labels", ["exact", "sampled"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_sums_of_processes_with_uneven_shares_make_up_that_of_one(monkeypatch, world, labels):
    net, data = Toy().double(), TensorDataset(X, Y)
    names = ["backbone.0.weight", "head.bias"]
    whole = diagonal_fisher(net, data, call, names, labels=labels)
    monkeypatch.setattr(lightning_peft.fisher, "world_size", lambda: world)
    shares: list[list[torch.Tensor]] = []
    for number in range(world):
        monkeypatch.setattr(lightning_peft.fisher, "rank", lambda number=number: number)
        shares.append([])
        diagonal_fisher(net, data, call, names, labels=labels, reduce=lambda t: shares[-1].append(t.clone()) or t)
    sums = iter([sum(parts) for parts in zip(*shares, strict=True)])
    found = diagonal_fisher(net, data, call, names, labels=labels, reduce=lambda _: next(sums))
    assert all(torch.allclose(found[name], whole[name], rtol=1e-12, atol=0) for name in names)


class Shaken(TensorDataset):
    """Draws a random number for each row."""

    def __getitem__(self, index):
        torch.rand(1)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_measuring_leaves_no_trace(workers):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
    net[3].eval()
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    before, flags = weights(net), [p.requires_grad for p in net.parameters()]
    torch.manual_seed(5)
    loader = DataLoader(Shaken(X), 3, shuffle=True, num_workers=workers)
    found = diagonal_fisher(net, loader, call, ["0.weight"])
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert same(before, weights(net))
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [child.training for child in net] == [True, True, True, False]
    assert torch.equal(net[3].weight.grad, torch.ones_like(net[3].weight))
    assert net[0].weight.grad is None
    # neither dropout nor the statistics of a batch of one have a part in it
    assert same(found, diagonal_fisher(copy.deepcopy(net).eval(), TensorDataset(X), call, ["0.weight"]))


def test_a_loaders_batch_size_does_not_count_and_half_precision_sums_in_float32():
    net = linear()
    one, many = (diagonal_fisher(net, DataLoader(TensorDataset(X, Y), size), call, ["weight"]) for size in (1, 5))
    assert same(one, many)
    half = diagonal_fisher(net.bfloat16(), TensorDataset(X.bfloat16(), Y), call, ["weight"])["weight"]
    assert half.dtype == torch.float32
    assert torch.allclose(half.double(), one["weight"], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize(
    ("step", "labels", "message"),
    [
        (lambda module, batch: module(batch[0])[:, :1], "exact", r"step returned \(1, 1\).*at least two classes"),
        (lambda module, batch: 3, "exact", "step returned 'int'"),
        (
            call,
            "empirical",
            "labels='empirical' needs a step that returns logits and labels; the labels are 'NoneType'",
        ),
        (lambda m, b: (m(b[0]), b[0]), "empirical", r"the labels are \(1, 4\), and must be of the shape \(1,\)"),
        (lambda module, batch: module(batch[0]).detach(), "exact", "depend on none of the 1 parameters, first"),
    ],
)
def test_a_step_that_gives_something_else_is_refused(step, labels, message):
    with pytest.raises(ValueError, match=f"diagonal_fisher: .*{message}"):
        diagonal_fisher(linear(), TensorDataset(X, Y), step, ["weight"], labels=labels)

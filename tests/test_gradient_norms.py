"""The norm of many tensors is that of one vector, whatever they are made of."""

import pytest
import torch

from lightning_peft.gradient_norms import StepFlow, join_norms, norm_of


def joint(*tensors) -> float:
    return float(join_norms(map(norm_of, tensors)))


def test_the_joint_norm_is_that_of_the_concatenation():
    parts = [torch.randn(shape, dtype=torch.float64) for shape in ((), (3,), (4, 5), (2, 1, 3), (0, 2))]
    assert joint(*parts) == pytest.approx(float(torch.cat([part.flatten() for part in parts]).norm()), rel=1e-14)
    assert joint() == 0.0


def test_norms_of_narrow_tensors_are_float32():
    ones = torch.ones(10_007)
    assert joint(ones.bfloat16()) == pytest.approx(10_007**0.5, rel=1e-6)  # bfloat16 itself has 100 and 100.5
    assert joint(ones.half() * 256) == pytest.approx(256 * 10_007**0.5, rel=1e-6)
    assert joint(ones.bfloat16(), ones.double()) == pytest.approx(20_014**0.5, rel=1e-6)


def test_a_sparse_gradient_counts_repeated_rows_once_summed():
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    assert joint(table.weight.grad) == pytest.approx((2 * 2.0**2 + 2 * 1.0**2) ** 0.5)


def test_a_flow_holds_no_copy_once_it_is_finished():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    flow = StepFlow({"block": [weight]})
    assert not flow.finished
    torch.optim.SGD([weight], lr=0.5).step()
    flow.finish()
    assert flow.finished
    assert [float(part["block"]) for part in (flow.gradients, flow.weights, flow.moved)] == pytest.approx(
        [3**0.5, 3**0.5, 0.5 * 3**0.5]
    )
    assert not any(isinstance(found, torch.Tensor) for found in _leaves(vars(flow)["_before"]))


def _leaves(found):
    return [leaf for part in found.values() for leaf in part]

"""Second derivatives of convolution and batch normalisation equal torch's own, also under vmap."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from lightning_peft.meta.second_derivatives import Geometry, batch_norm, convolution

GEOMETRIES = [
    ((3, 4, 7), (6, 2, 3), Geometry([2], [1], [1], 2)),
    ((2, 3, 6, 5), (4, 3, 3, 2), Geometry([2, 1], [1, 0], [1, 2], 1)),
    ((2, 4, 5, 5), (4, 1, 3, 3), Geometry([1, 1], [1, 1], [1, 1], 4)),
    ((1, 2, 4, 4, 4), (2, 2, 2, 2, 2), Geometry([1, 2, 1], [0, 0, 0], [1, 1, 1], 1)),
]


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def torchs_convolution(x, w, b, geometry):
    return {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(geometry.stride)](x, w, b, *geometry)


def gradients_of_gradients(function, inputs, cotangent):
    """Return value, gradients, and the gradients of a weighted sum of those."""
    value = function(*inputs)
    first = torch.autograd.grad(value, inputs, cotangent, create_graph=True)
    weighted = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in first)
    return [value, *first, *torch.autograd.grad(weighted, [*inputs, cotangent], materialize_grads=True)]


def assert_equal_derivatives(ours, theirs, inputs):
    cotangent = torch.randn_like(theirs(*inputs)).requires_grad_()
    for mine, known in zip(
        gradients_of_gradients(ours, inputs, cotangent), gradients_of_gradients(theirs, inputs, cotangent), strict=True
    ):
        assert torch.allclose(mine, known, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("x", "w", "geometry"), GEOMETRIES)
def test_a_convolution_has_torchs_first_and_second_derivatives(x, w, geometry):
    assert_equal_derivatives(
        lambda *t: convolution(*t, geometry), lambda *t: torchs_convolution(*t, geometry), tensors(x, w, w[0])
    )


def test_finite_differences_agree():
    geometry = Geometry([2, 1], [1, 1], [1, 1], 1)
    assert gradgradcheck(lambda *t: convolution(*t, geometry), tensors((2, 2, 4, 3), (3, 2, 3, 2), (3,)))
    inputs = tensors((3, 2, 3), (2,), (2,))
    assert gradcheck(lambda *t: batch_norm(*t, 1e-3), inputs)
    assert gradgradcheck(lambda *t: batch_norm(*t, 1e-3), inputs)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (3, 3, 4, 2), (2, 3, 2, 3, 2)])
def test_a_normalisation_has_torchs_first_and_second_derivatives(shape):
    assert_equal_derivatives(
        lambda *t: batch_norm(*t, 1e-2),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.0, 1e-2),
        tensors(shape, (3,), (3,)),
    )


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 0, 0), (None, 0, 0), (0, None, 0), (0, 0, None), (2, 1, 0)])
def test_under_vmap_every_task_is_its_own(dims):
    def spread(tensor, dim):
        return tensor[0] if dim is None else tensor.movedim(0, dim)

    geometry = Geometry([2, 2], [1, 1], [1, 1], 1)
    sets = [tensors((5, 2, 3, 6, 6), (5, 4, 3, 3, 3), (5, 4)), tensors((5, 4, 3, 2, 2), (5, 3), (5, 3))]
    pairs = [
        (lambda *t: convolution(*t, geometry), lambda *t: torchs_convolution(*t, geometry)),
        (lambda *t: batch_norm(*t, 1e-3), lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.0, 1e-3)),
    ]
    for inputs, (ours, theirs) in zip(sets, pairs, strict=True):
        given = [spread(t, dim).detach().requires_grad_() for t, dim in zip(inputs, dims, strict=True)]
        assert_equal_derivatives(torch.vmap(ours, in_dims=dims), one_by_one(theirs, dims), given)


def one_by_one(function, dims):
    def run(*inputs):
        return torch.stack(
            [
                function(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)))
                for i in range(5)
            ]
        )

    return run


def test_a_third_derivative_of_a_normalisation_is_refused():
    x, w, b = tensors((4, 2), (2,), (2,))
    first = torch.autograd.grad(batch_norm(x, w, b, 1e-3).pow(2).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second.sum().backward()

"""The fused operation against float64 formulas, twice differentiated, under autocast and transforms."""

import pytest
import torch
import torch.nn.functional as F

from lightning_peft.adapters import low_rank
from lightning_peft.adapters.low_rank import HALF_PAYS, _drawn_again, gemm_dtype, low_rank_linear


@pytest.fixture(autouse=True, params=[True, False], ids=["merged", "beside"])
def merging(request, monkeypatch):
    """Both ways to add an update in float32 and float64, of which the shapes choose one."""
    monkeypatch.setattr(low_rank, "_merges", lambda dtype, rows, width: request.param and dtype.itemsize >= 4)
    return request.param


def parts(dtype=torch.float64, bias=True, gain=False):
    x, w = torch.randn(3, 5, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    a, b = torch.randn(2, 6, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    rest = [torch.randn(4, dtype=dtype) if bias else None, torch.randn(4, dtype=dtype) / 9 if gain else None]
    return [t if t is None else t.requires_grad_() for t in (x, w, rest[0], a, b, rest[1])]


def formula(x, w, bias, a, b, gain, scale=0.7):
    plain = x @ w.T + scale * x @ a.T @ b.T
    plain = plain if gain is None else plain * (1 + gain)
    return plain if bias is None else plain + bias


def fused(x, w, bias, a, b, gain, **options):
    return low_rank_linear(x, w, bias, a, b, scale=0.7, gain=gain, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [True, False])
def test_the_value_is_the_formula_and_all_first_and_second_derivatives_are_right(bias, gain):
    inputs = parts(bias=bias, gain=gain)
    assert torch.allclose(fused(*inputs), formula(*inputs), rtol=0, atol=1e-12)
    given = [t for t in inputs if t is not None]

    def function(*tensors):
        left = iter(tensors)
        return fused(*[t if t is None else next(left) for t in inputs])

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_second_derivatives_through_dropout_are_right():
    inputs = parts()

    def function(*tensors):
        torch.manual_seed(3)
        return fused(*tensors, None, dropout=0.4)

    assert torch.autograd.gradcheck(function, inputs[:-1])
    assert torch.autograd.gradgradcheck(function, inputs[:-1])


def test_an_inner_step_of_meta_learning_has_the_exact_outer_gradient():
    results = []
    for forward in (fused, formula):
        torch.manual_seed(0)
        x, w, bias, a, b, _ = parts()
        grads = torch.autograd.grad(forward(x, w, bias, a, b, None).square().sum(), (a, b), create_graph=True)
        stepped = [p - 0.01 * g for p, g in zip((a, b), grads, strict=True)]
        outer = forward(x, w, bias, *stepped, None).square().sum()
        results.append(torch.autograd.grad(outer, (a, b, x)))
    assert all(torch.allclose(one, two, rtol=1e-10, atol=1e-9) for one, two in zip(*results, strict=True))


def test_function_transforms_take_the_plain_form():
    x, w, bias, a, b, _ = [t if t is None else t.detach() for t in parts()]
    grad = torch.func.grad(lambda a: fused(x, w, bias, a, b, None).square().sum())
    expected = torch.func.grad(lambda a: formula(x, w, bias, a, b, None).square().sum())
    assert torch.allclose(grad(a), expected(a), rtol=0, atol=1e-10)
    each = torch.func.vmap(lambda row: fused(row, w, bias, a, b, None))(x)
    assert torch.allclose(each, formula(x, w, bias, a, b, None), rtol=0, atol=1e-12)


def test_forward_mode_raises_or_is_right():
    from torch.autograd import forward_ad

    x, w, bias, a, b, _ = [t if t is None else t.detach() for t in parts()]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward AD|forward mode"):
        fused(forward_ad.make_dual(x, torch.ones_like(x)), w, bias, a.requires_grad_(), b, None)


@pytest.fixture(params=[True, False], ids=["kept", "drawn again"])
def mask_kept(request, monkeypatch):
    """Both ways to a mask, of which each kind of device takes one."""
    monkeypatch.setattr(low_rank, "_keeps_mask", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_drops_whole_entries_of_the_update_s_input_and_keeps_its_mean(dropout, mask_kept):
    x, w = torch.ones(200, 50, dtype=torch.float64), torch.zeros(50, 50, dtype=torch.float64)
    eye = torch.eye(50, dtype=torch.float64, requires_grad=True)
    y = low_rank_linear(x, w, None, eye, eye.detach(), scale=1.0, dropout=dropout)
    assert set(y.detach().unique().tolist()) == ({0.0, 1 / (1 - 0.3)} if dropout else {1.0})
    assert abs(y.mean().item() - 1) < 0.03
    y.sum().backward()
    # d/dA of sum(drop(x) A^T) has in column i the sum of the dropped column i: the same mask in both directions.
    assert torch.allclose(eye.grad, y.detach().sum(0).expand(50, 50), rtol=0, atol=1e-9)


def test_dropout_follows_the_global_seed_and_changes_from_call_to_call(mask_kept):
    inputs = [t if t is None else t.detach() for t in parts()]
    torch.manual_seed(5)
    first, second = fused(*inputs, dropout=0.5), fused(*inputs, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(fused(*inputs, dropout=0.5), first)
    assert not torch.equal(first, second)


def test_a_dropout_of_almost_one_drops_almost_all():
    assert _drawn_again(torch.empty(1000, 103), 1 - 1e-6, 11).double().mean() < 1e-3


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_a_mask_keeps_the_share_that_was_asked_for_everywhere_alike(dropout):
    mask = _drawn_again(torch.empty(1000, 103), dropout, 11).double()
    spread = (dropout * (1 - dropout)) ** 0.5
    assert abs(mask.mean() - (1 - dropout)) < 4 * spread / mask.numel() ** 0.5
    for lane in range(4):  # four entries come from one random number
        lanes = mask.flatten()[lane::4]
        assert abs(lanes.mean() - (1 - dropout)) < 4 * spread / lanes.numel() ** 0.5
    pairs = mask.flatten()[:-1] * mask.flatten()[1:]
    assert abs(pairs.mean() - (1 - dropout) ** 2) < 6 * spread / pairs.numel() ** 0.5
    assert torch.equal(mask, _drawn_again(torch.empty(1000, 103), dropout, 11).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [True, False])
def test_halves_are_right_with_units_for_them_and_without(dtype, narrow, monkeypatch):
    monkeypatch.setattr("lightning_peft.adapters.low_rank.gemm_dtype", lambda _, d: d if narrow else torch.float32)
    x, w, bias, a, b, gain = [t.detach() for t in parts(torch.float32, gain=True)]
    inputs = [t.to(dtype).requires_grad_() for t in (x, w, bias)] + [t.requires_grad_() for t in (a, b, gain)]
    y = fused(*inputs)
    y.float().square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = formula(*exact)
    expected.square().sum().backward()
    assert y.dtype == dtype
    assert torch.allclose(y.double(), expected, rtol=0.05, atol=0.15)
    for ours, reference in zip(inputs, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert F.cosine_similarity(ours.grad.double().flatten(), reference.grad.flatten(), dim=0) > 0.998


@pytest.mark.parametrize("units", [True, False])
def test_halves_multiply_on_a_cpu_that_has_units_for_them_where_there_is_enough_to_do(units, monkeypatch):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: units)
    few, many = torch.empty(64, 128), torch.empty(HALF_PAYS // 128, 128)
    for dtype in (torch.bfloat16, torch.float16):
        assert gemm_dtype(few, dtype) == torch.float32
        assert gemm_dtype(many, dtype) == (dtype if units else torch.float32)
        assert gemm_dtype(torch.empty(64, 128, device="meta"), dtype) == dtype  # of another device nothing is known
    assert gemm_dtype(many, torch.float64) == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [True, False])
def test_autocast_computes_in_its_dtype_and_hands_gradients_back_in_the_parameter_s(dtype, gain):
    inputs = parts(torch.float32, gain=gain)
    with torch.autocast("cpu", dtype):
        y = fused(*inputs)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), formula(*inputs), rtol=0.05, atol=0.15)
    y.float().square().sum().backward()
    reference = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    formula(*reference).square().sum().backward()
    for ours, exact in zip(inputs, reference, strict=True):
        if ours is not None:
            assert ours.grad.dtype == torch.float32
            assert F.cosine_similarity(ours.grad.double().flatten(), exact.grad.flatten(), dim=0) > 0.998


def test_nothing_is_saved_but_references_and_what_is_rank_wide(mask_kept):
    x, w, bias, a, b, _ = parts(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(x, w, bias, a, b, None, dropout=0.5)
    given = {t.untyped_storage().data_ptr() for t in (x, w, bias, a, b)}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in given]
    kept = [((15, 6), torch.int8)] if mask_kept else []
    assert [(tuple(t.shape), t.dtype) for t in new] == [((15, 2), torch.float32), *kept]


def test_the_gradient_of_an_input_that_needs_none_is_not_computed(merging):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += "mm" in str(function)
            return function(*args, **(kwargs or {}))

    counts = []
    for needed in (True, False):
        x, w, bias, a, b, _ = parts()
        y = fused(x.detach().requires_grad_(needed), w.detach(), bias.detach(), a, b, None)
        with Counting() as counting:
            y.sum().backward()
        counts.append(counting.calls)
    assert counts == ([6, 4] if merging else [5, 3])


@pytest.mark.parametrize(("rows", "merged"), [(4, False), (40, True)])
def test_shapes_and_precision_choose_where_the_update_is_added(rows, merged, monkeypatch):
    monkeypatch.undo()
    for dtype in (torch.float32, torch.float64):
        assert low_rank._merges(dtype, rows, 20) is merged
    for dtype in (torch.bfloat16, torch.float16):
        assert not low_rank._merges(dtype, rows, 20)

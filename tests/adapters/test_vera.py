"""VeRA: the formula, the draw of the shared matrices, PEFT as the oracle."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import add_adapter, merge_adapter, remove_adapter
from lightning_peft.adapters.vera import VeRA
from lightning_peft.adapters.vera_update import Projections
from tests.adapters.zoo import three_steps


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()


def trained(model: nn.Module, **options) -> nn.Module:
    add_adapter(model, VeRA(rank=3, **options))
    for name, parameter in model.named_parameters():
        if "vera_" in name:
            nn.init.normal_(parameter)
    return model


def shared_of(model: nn.Module) -> Projections:
    (found,) = [module for module in model.modules() if isinstance(module, Projections)]
    return found


def wrapped(base: nn.Module, **options) -> nn.Module:
    import peft

    config = peft.VeraConfig(r=3, target_modules=["0", "2"], **options)
    return peft.get_peft_model(copy.deepcopy(base), config).double()


def test_the_output_is_the_formula_in_float64():
    model, x = trained(small()), torch.randn(3, 5, 6, dtype=torch.float64)
    shared, update = shared_of(model), model[2].adapters["default"]
    a, b = shared.vera_A[:, :8], shared.vera_B[:4]
    hidden = model[1](model[0](x))
    low = update.vera_lambda_d * (hidden @ a.T)
    expected = hidden @ model[2].weight.T + update.vera_lambda_b * (low @ b.T)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_matrices_are_those_of_peft_with_that_key(seed):
    theirs = wrapped(small(), projection_prng_key=seed).base_model
    ours = shared_of(add_adapter(small(), VeRA(rank=3, seed=seed)))
    assert torch.equal(ours.vera_A, theirs.vera_A["default"])
    assert torch.equal(ours.vera_B, theirs.vera_B["default"])


def test_training_equals_peft_s():
    torch.manual_seed(3)
    base = small()
    ours, theirs = add_adapter(copy.deepcopy(base), VeRA(rank=3, seed=5)), wrapped(base, projection_prng_key=5)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    for model in (ours, theirs):
        # PEFT's vectors were float32 until now: 0.1 is not the same number there
        for name, parameter in model.named_parameters():
            if "vera_lambda_d" in name:
                nn.init.constant_(parameter, 0.5)
        three_steps(model, x, y)
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)
    assert not torch.allclose(ours(x), base(x), atol=1e-2)


def test_a_draw_leaves_the_global_generator_alone():
    model, state = small(), torch.get_rng_state()
    add_adapter(model, VeRA(rank=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_all_layers_share_one_pair_that_no_state_dict_holds():
    model = add_adapter(small(), VeRA(rank=3))
    assert model[0].adapters["default"].shared[0] is model[2].adapters["default"].shared[0] is shared_of(model)
    assert not [key for key in model.state_dict() if "vera_A" in key or "vera_B" in key]
    assert [name for name, _ in model.named_buffers()] == [
        f"0.adapters.default.projections.vera_{matrix}" for matrix in "AB"
    ]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_one_pair_of_its_own(again):
    model = trained(small())
    other = again(model)
    assert other[0].adapters["default"].shared[0] is other[2].adapters["default"].shared[0] is shared_of(other)
    assert shared_of(other) is not shared_of(model)
    assert torch.equal(shared_of(other).vera_A, shared_of(model).vera_A)


def test_the_pair_follows_the_network_but_not_into_half_precision():
    model = add_adapter(small(), VeRA(rank=3)).float()
    assert shared_of(model).vera_A.dtype == torch.float32
    assert shared_of(model.bfloat16()).vera_A.dtype == torch.float32
    assert model(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert shared_of(model.to("meta")).vera_A.is_meta


def test_a_network_that_gets_its_values_late_has_the_matrices_of_its_seed():
    with torch.device("meta"):
        late = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    add_adapter(late, VeRA(rank=3, seed=2))
    early = trained(small().float(), seed=2)
    late.to_empty(device="cpu").load_state_dict(early.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(late(x), early(x))


def test_transformers_conv1d_is_a_linear_layer():
    from transformers.pytorch_utils import Conv1D

    model, x = trained(nn.Sequential(Conv1D(4, 6)).double()), torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    merge_adapter(model)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    model, x = add_adapter(small(), VeRA(rank=3, dropout=0.5)), torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(model.train()(x), model.eval()(x))
    nn.init.normal_(model[0].adapters["default"].vera_lambda_b)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_removing_one_of_two_leaves_the_other_its_matrices():
    model, x = trained(small()), torch.randn(5, 6, dtype=torch.float64)
    before = model(x)
    add_adapter(model, VeRA(rank=2, seed=1), name="other")
    remove_adapter(model, "other")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("vera", "message"),
    [
        (lambda: VeRA(rank=0), "rank=0 must be a whole number of at least 1"),
        (lambda: VeRA(rank=True), "rank=True"),
        (lambda: VeRA(seed=-1), "seed=-1"),
        (lambda: VeRA(d_initial=0.0), "d_initial=0.0"),
        (lambda: VeRA(dropout=1.0), "dropout=1.0"),
        (lambda: VeRA(targets="query"), "targets='query'"),
        (lambda: VeRA(targets=[]), r"targets=\[\]"),
        (lambda: VeRA(exclude="0"), "exclude='0'"),
        (lambda: VeRA(targets=["query"]), "VeRA: target: 'query' matches none of 1 layers"),
        (lambda: VeRA(targets=["0"]), "'0' is a Conv1d, which it does not fit"),
    ],
)
def test_bad_input_names_the_value(vera, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(nn.Sequential(nn.Conv1d(4, 4, 1)), vera())

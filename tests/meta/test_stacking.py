"""Stacked tasks see their own weights, by the short way where a layer has one and by vmap's own where not."""

import pytest
import torch
from torch import nn

from lightning_peft.meta.places import Places
from lightning_peft.meta.stacking import STACKED, over_tasks

TASKS = 3
LAYERS = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "linear without a bias": (nn.Linear(4, 3, bias=False), (5, 4)),
    "linear over more dimensions": (nn.Linear(4, 3), (2, 5, 4)),
    "linear over one row": (nn.Linear(4, 3), (4,)),
    "convolution": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 6, 6)),
    "convolution over time": (nn.Conv1d(2, 4, 3, groups=2, bias=False), (4, 2, 6)),
    "convolution with padding by name": (nn.Conv2d(2, 3, 3, padding="same"), (4, 2, 6, 6)),
    "convolution with reflections": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (4, 2, 6, 6)),
    "convolution of a single image": (nn.Conv2d(2, 3, 3), (2, 6, 6)),
    "convolution and an activation": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU("tanh")), (4, 2, 6, 6)),
    "linear between activations": (nn.Sequential(nn.Tanh(), nn.Linear(4, 3), nn.LeakyReLU(0.3)), (5, 4)),
    "an activation in place": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), (5, 4)),
    "normalisation": (nn.BatchNorm2d(2, track_running_stats=False), (4, 2, 3, 3)),
    "normalisation of vectors": (nn.BatchNorm1d(2, track_running_stats=False), (4, 2)),
}


@pytest.mark.parametrize("shared", [False, True], ids=["rows of each", "shared rows"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_every_task_gets_what_its_own_weights_give(layer, shape, shared):
    layer = layer.double()
    x = torch.randn(*([] if shared else [TASKS]), *shape, dtype=torch.float64)
    values = [torch.randn(TASKS, *p.shape, dtype=p.dtype) for p in layer.parameters()]
    places = Places(layer, [name for name, _ in layer.named_parameters()])

    def one(*tensors):
        with places.holding(tensors[: len(values)], stacked=True):
            return layer(*tensors[len(values) :] or (x,))

    found = over_tasks(one, values if shared else [*values, x])
    for task in range(TASKS):
        with places.holding([value[task] for value in values]):
            expected = layer(x if shared else x[task])
        assert torch.allclose(found[task], expected, atol=1e-12)
    assert not any("forward" in vars(child) for child in layer.modules())
    assert all(isinstance(p, nn.Parameter) for p in layer.parameters())


def test_a_forward_that_someone_replaced_is_left_alone():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x + 1
    places = Places(layer, ["weight"])
    with places.holding([torch.zeros(2, 2)], stacked=True):
        assert torch.equal(layer(torch.zeros(2)), torch.ones(2))
    assert "forward" in vars(layer)


def test_a_subclass_keeps_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert Doubled not in STACKED
    layer, weights = Doubled(2, 2, bias=False), torch.randn(TASKS, 2, 2)

    def one(weight):
        with Places(layer, ["weight"]).holding([weight], stacked=True):
            return layer(torch.ones(1, 2))

    assert torch.allclose(over_tasks(one, [weights]), 2 * weights.sum(2)[:, None])


def test_weights_come_back_after_an_error():
    layer = nn.Linear(2, 2)
    own = layer.weight
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        Places(layer, ["weight"]).holding([torch.zeros(2, 2)], stacked=True),
    ):
        raise RuntimeError("in the middle")
    assert layer.weight is own
    assert "forward" not in vars(layer)


def test_an_error_ends_the_vmap():
    with pytest.raises(ZeroDivisionError):
        over_tasks(lambda x: 1 // 0, [torch.zeros(2)])
    assert torch.equal(torch.vmap(torch.sin)(torch.zeros(2)), torch.zeros(2))
    assert torch._C._functorch.maybe_current_level() is None


def test_dropout_differs_from_task_to_task():
    found = over_tasks(lambda x: nn.functional.dropout(x, 0.5), [torch.ones(2, 64)])
    assert not torch.equal(found[0], found[1])


def test_one_row_has_no_statistics_in_stacked_tasks_either():
    layer = nn.BatchNorm1d(2, track_running_stats=False)
    places = Places(layer, ["weight", "bias"])

    def one(weight, bias, x):
        with places.holding([weight, bias], stacked=True):
            return layer(x)

    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        over_tasks(one, [torch.ones(TASKS, 2), torch.zeros(TASKS, 2), torch.randn(TASKS, 1, 2)])

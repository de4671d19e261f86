"""What torch says of a missing second derivative is told with its cure; anything else stays as it is."""

import pytest
import torch

from lightning_peft.meta.twice_differentiable import explained


@pytest.mark.parametrize(
    "said",
    [
        "derivative for aten::_fused_thing_backward is not implemented",
        "torch.compile with aot_autograd does not currently support double backward",
        "This backward function was compiled with non-empty donated buffers which requires create_graph=False",
    ],
)
def test_the_cure_stands_beside_what_torch_says(said):
    told = explained(RuntimeError(said), "FewShot")
    assert str(told).startswith("FewShot: second-order meta-gradients need second derivatives")
    assert said in str(told)
    assert "second_order=False" in str(told)


def test_another_error_stays_as_it_is():
    error = torch.OutOfMemoryError("no memory")
    assert explained(error, "FewShot") is error

"""Eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode; every part of it gets the mode back that it had.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with eval_mode(net):
    ...     net[0].training
    False
    >>> net[0].training, net[1].training
    (True, False)
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

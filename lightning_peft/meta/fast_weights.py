"""The weights of one task after adaptation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FastWeights:
    """What one task adapted.

    Args:
        parameters: Values by name, of the shapes of the module's own.
        steps: How many steps led there.
    """

    parameters: dict[str, Tensor]
    steps: int

"""BitFit: train the biases of a network and nothing else.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv:2106.10199, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lightning_peft.adapters.base_parameters import BaseParameters, required
from lightning_peft.adapters.own_parameters import base_parameters
from lightning_peft.matching import match_names


@dataclass(frozen=True, repr=False)
class BitFit(BaseParameters):
    """Train every bias of the network, those of normalisation layers included; everything else is frozen.

    The biases are the network's own: they are put away and brought back by ``set_adapter`` and ``remove_adapter``.

    **The trap:** many recent language models have no biases at all, or only in their normalisation layers. And biases of a
    bfloat16 network are bfloat16: a small optimizer step on a large bias is rounded away.

    Args:
        targets: Globs over the dotted names of the biases; the default is all of them.

    Raises:
        ValueError: If the network has no bias, or a glob matches none.

    >>> from lightning_peft import add_adapter
    >>> net = add_adapter(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), BitFit())
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['0.bias', '1.bias']
    """

    @override
    def select(self, model: nn.Module) -> list[str]:
        # in_proj_bias of attention in one module is a bias too
        biases = [name for name in base_parameters(model) if name.rpartition(".")[2].endswith("bias")]
        required(biases, model, owner="BitFit", kind="bias")
        return match_names(biases, self.targets, owner="BitFit: targets", kind="biases of the network, bias")

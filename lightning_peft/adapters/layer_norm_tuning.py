"""LayerNorm tuning: train the scales and shifts of normalisation layers and nothing else.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv:2312.11420,
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import override

from lightning_peft.adapters.base_parameters import BaseParameters, required
from lightning_peft.adapters.own_parameters import base_parameters
from lightning_peft.matching import match_names

NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


@dataclass(frozen=True, repr=False)
class LayerNormTuning(BaseParameters):
    """Train the weights and biases of normalisation layers; everything else is frozen.

    Normalisation layers are torch's (layer, group, batch, instance and RMS norms) and every module whose class has a name
    that ends in ``Norm``, as transformers' own have. Their values are put away and brought back by ``set_adapter`` and
    ``remove_adapter``.

    **The trap:** the running statistics of batch norms are no parameters. They move whenever the network is in train
    mode, under any adapter, and are not brought back.

    Args:
        targets: Globs over the dotted names of the layers; the default is all of them.

    Raises:
        ValueError: If the network has no such layer, or a glob matches none.

    >>> from lightning_peft import add_adapter
    >>> net = add_adapter(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LayerNormTuning())
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['1.weight', '1.bias']
    """

    @override
    def select(self, model: nn.Module) -> list[str]:
        norms = {name for name, module in model.named_modules() if is_norm(module)}
        parameters = [name for name in base_parameters(model) if name.rpartition(".")[0] in norms]
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
        required(layers, model, owner="LayerNormTuning", kind="normalisation layer with weights")
        chosen = match_names(layers, self.targets, owner="LayerNormTuning: targets", kind="normalisation layer")
        return [name for name in parameters if name.rpartition(".")[0] in chosen]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer.

    >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.Linear(2, 2))
    (True, False)
    """
    return isinstance(module, NORMS) or type(module).__name__.endswith("Norm")

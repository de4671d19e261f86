"""Freeze and free parameters by name, and remember what was ever free, so that a checkpoint can hold it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import LBFGS, Optimizer

from lightning_peft.adapters.attachment import attachment_of


def trainable_names(module: nn.Module) -> list[str]:
    """List the dotted names of the parameters that require a gradient."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def trainable_count(module: nn.Module) -> int:
    """Count the numbers (not tensors) that require a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def set_trainable(module: nn.Module, names: Collection[str]) -> bool:
    """Let exactly the named parameters train; return whether that changed anything.

    A frozen parameter also loses its gradient: optimizers skip ``grad=None``, whereas a zero gradient would still
    be moved by momentum and weight decay.

    Args:
        module: The root of the names.
        names: Parameter names, as ``module.named_parameters()`` gives them.
    """
    wanted, changed = set(names), False
    for name, parameter in module.named_parameters():
        train = name in wanted
        if parameter.requires_grad is not train:
            parameter.requires_grad_(train)
            changed = True
        if not train:
            parameter.grad = None
    record_trained(module)
    for child in module.modules():
        if (attachment := attachment_of(child)) is not None:
            attachment.expected = set(trainable_names(child))
    return changed


def drop_frozen_state(optimizers: Iterable[Optimizer]) -> None:
    """Forget momentum and moments of what does not train; a parameter that is freed again begins without any."""
    for optimizer in optimizers:
        for parameter in [parameter for parameter in optimizer.state if not parameter.requires_grad]:
            del optimizer.state[parameter]


def forget_directions(optimizers: Iterable[Optimizer]) -> None:
    """Let ``LBFGS`` begin its history anew: its past directions would go on moving what no longer trains."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            optimizer.state.clear()


def record_trained(module: nn.Module) -> None:
    """Tell every adapted network inside ``module`` which of its parameters train now.

    A base weight that trained for a while has left the pretrained network for good: checkpoints must hold it, also
    when it is frozen again.
    """
    for child in module.modules():
        attachment = attachment_of(child)
        if attachment is not None:
            attachment.ever_trained.update(trainable_names(child))


def frozen_layers(module: nn.Module, *, dropout: bool) -> list[str]:
    """List the layers that must run in eval mode for a frozen part to be really frozen.

    Batch normalisation moves its running statistics also without a gradient. A layer without parameters of its own is frozen
    if those of the nearest module around it are.

    Args:
        module: The root of the names.
        dropout: Whether dropout of frozen parts is one of them.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    >>> frozen_layers(net.requires_grad_(False), dropout=True)
    ['1']
    """
    kinds = (_BatchNorm, _DropoutNd) if dropout else (_BatchNorm,)
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, kinds):
            around: nn.Module = layer
            path = name
            while path and next(around.parameters(), None) is None:
                path = path.rpartition(".")[0]
                around = module.get_submodule(path)
            if not any(parameter.requires_grad for parameter in around.parameters()):
                found.append(name)
    return found


class StillLayers:
    """Keep the layers of a frozen part in eval mode, and give back those that were in training mode."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._turned: set[str] = set()

    def choose(self, module: nn.Module, *, dropout: bool) -> None:
        """Hold what is frozen now, and wake what no longer is.

        Args:
            module: The root of the names.
            dropout: Whether dropout of frozen parts is held too.
        """
        self._names = frozen_layers(module, dropout=dropout)
        self._wake(module, self._turned.difference(self._names))
        self.keep(module)

    def keep(self, module: nn.Module) -> None:
        """Put what is held into eval mode again: any call of ``train()`` undoes it."""
        for name in self._names:
            layer = module.get_submodule(name)
            if layer.training:
                layer.eval()
                self._turned.add(name)

    def release(self, module: nn.Module) -> None:
        """Hold nothing any more."""
        self._names = []
        self._wake(module, set(self._turned))

    def _wake(self, module: nn.Module, names: Collection[str]) -> None:
        for name in names:
            module.get_submodule(name).train()
        self._turned.difference_update(names)

"""Add an adapter to any network, take it off, merge it, switch it off: the bookkeeping, once for all adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attachment import Attachment, attachment_of, set_attachment
from lightning_peft.adapters.fingerprint import fingerprint
from lightning_peft.adapters.layer import AdaptedLayer


def add_adapter(model: nn.Module, adapter: Adapter, name: str = "default") -> nn.Module:
    """Adapt a network in place and return it; its outputs stay what they were.

    Every parameter that the adapter does not train is frozen. The layers stay the same objects with the same keys:
    a plain checkpoint of the base still loads, before or after.

    Args:
        model: Any module. Targets of the adapter are globs over its module names.
        adapter: What to add, for instance ``LoRA(rank=8)``.
        name: Name of the adapter, part of the keys of what it adds.

    Raises:
        ValueError: If the network carries an adapter already, is sharded already, or does not fit the adapter.

    >>> from lightning_peft import LoRA
    >>> net = add_adapter(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), LoRA(rank=2, targets=["0"]))
    >>> [key for key, parameter in net.named_parameters() if parameter.requires_grad]
    ['0.lora_A.default', '0.lora_B.default']
    """
    if not name.isidentifier():
        raise ValueError(f"add_adapter: name={name!r} must be a plain identifier: it becomes part of parameter names.")
    for path, child in model.named_modules():
        if (found := attachment_of(child)) is not None:
            raise ValueError(
                f"add_adapter: {path or 'the network'!r} already carries the adapter {found.name!r} "
                f"({found.adapter!r}). Take it off with remove_adapter first."
            )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            "add_adapter: the network is sharded already (its parameters are DTensors), so the adapter would not be "
            "kept in step over ranks. Add the adapter before fully_shard; in a module with an adapter mixin, call "
            "self.attach_adapter() in configure_model before fully_shard."
        )
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    attachment = Attachment(adapter, name, fingerprint(model), flags)
    trained = set(adapter.insert(model, name))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)
    attachment.ever_trained = trained
    _leave_fast_paths(model, attachment)
    set_attachment(model, attachment)
    return model


def remove_adapter(model: nn.Module) -> nn.Module:
    """Take the adapter off, and give back the flags found: the network is bit for bit the pretrained one again.

    That is so while the base stayed frozen; base weights that trained (full fine-tuning, a thawed base) stay trained.

    Raises:
        ValueError: If the network carries no adapter.
    """
    unmerge_adapter(model)
    return _unload(model, _attachment(model, "remove_adapter"))


def merge_adapter(model: nn.Module, *, unload: bool = False) -> nn.Module:
    """Add the adapter's update to the base weights, so that it costs nothing at inference; twice is once.

    Args:
        model: An adapted network, changed in place.
        unload: Also turn it into the plain network it was, with the merged weights, ready for ``save_pretrained``.
            Without it the base weights are kept beside the merged ones and :func:`unmerge_adapter` restores them
            bit for bit.

    Raises:
        ValueError: If the network carries no adapter.
    """
    attachment = _attachment(model, "merge_adapter")
    for layer in _layers(model):
        layer.merge()
    return _unload(model, attachment) if unload else model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Undo :func:`merge_adapter`, bit for bit.

    Raises:
        ValueError: If the network carries no adapter.
    """
    _attachment(model, "unmerge_adapter")
    for layer in _layers(model):
        layer.unmerge()
    return model


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the pretrained network for a while, also if the adapter is merged; no second copy is needed.

    Raises:
        ValueError: If the network carries no adapter, or its own weights have trained: nothing remembers them then.
    """
    attachment = _attachment(model, "adapter_disabled")
    if trained := sorted(attachment.ever_trained & attachment.flags.keys()):
        raise ValueError(
            f"adapter_disabled: {len(trained)} weights of the network itself train, first {trained[:3]}, so the "
            "pretrained network is gone. Keep a copy of it before training."
        )
    found = [(layer, layer.enabled) for layer in _layers(model)]
    for layer, _ in found:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in found:
            layer.enabled = enabled


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the values that trained since the adapter came, under their names in ``model.state_dict()``.

    Raises:
        ValueError: If the network carries no adapter.
    """
    trained = _attachment(model, "adapter_state_dict").ever_trained
    return {key: value for key, value in model.state_dict().items() if key in trained}


def _attachment(model: nn.Module, owner: str) -> Attachment:
    attachment = attachment_of(model)
    if attachment is None:
        inside = [path for path, child in model.named_modules() if attachment_of(child) is not None]
        hint = f"Its module {inside[0]!r} does: pass that one." if inside else "add_adapter puts one on."
        raise ValueError(f"{owner}: this {type(model).__name__} carries no adapter. {hint}")
    return attachment


def _layers(model: nn.Module) -> list[AdaptedLayer]:
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def _unload(model: nn.Module, attachment: Attachment) -> nn.Module:
    for layer in _layers(model):
        layer.become_plain()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(attachment.flags.get(key, True))
    for module, attribute, value in attachment.attributes:
        setattr(module, attribute, value)
    set_attachment(model, None)
    return model


def _leave_fast_paths(model: nn.Module, attachment: Attachment) -> None:
    # In eval mode without gradients, torch's TransformerEncoderLayer reads the weights of its linear layers and calls
    # one kernel, past any forward of theirs: the adapter would silently do nothing. These two attributes are what its
    # own checks look at.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and _layers(module):
            attribute = "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else "activation_relu_or_gelu"
            attachment.attributes.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, 0)

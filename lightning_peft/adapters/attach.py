"""Add an adapter to any network, take it off, merge it: the bookkeeping, once for all adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.attachment import (
    Attachment,
    attachment_of,
    refuse_disabled,
    required_attachment,
    set_attachment,
    take_loaded_base,
)
from lightning_peft.adapters.fingerprint import fingerprint
from lightning_peft.adapters.layer import AdaptedLayer
from lightning_peft.adapters.switch import check_known, set_adapter
from lightning_peft.adapters.updates import ATTRIBUTE, Updates, hosts, updates_of


def add_adapter(
    model: nn.Module, adapter: Adapter, name: str = "default", *, batches: Iterable[Any] | None = None
) -> nn.Module:
    """Adapt a network in place and return it; its outputs stay what they were (those of soft prompts excepted).

    Every parameter that the adapter does not train is frozen. The layers stay the same objects with the same keys:
    a plain checkpoint of the base still loads, before or after. The first adapter acts at once; a further one waits for
    :func:`~lightning_peft.set_adapter`. Where several adapters train one parameter of the network (``train_also``),
    ``state_dict`` has the acting one's values of it, as of any parameter; a module with an adapter mixin, and ``save_adapter``
    for each name, keep all of them.

    Args:
        model: Any module. Targets of the adapter are globs over its module names.
        adapter: What to add, for instance ``LoRA(rank=8)``.
        name: Name of the adapter, part of the keys of what it adds.
        batches: For adapters that look at data before they start (``LoRA(init="eva")``): what the network is called with.
            Mappings become keyword arguments; of a tuple or list the first entry counts.

    Raises:
        ValueError: If the network has an adapter of that name, is sharded already, or does not fit the adapter.

    >>> from lightning_peft import LoRA
    >>> net = add_adapter(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), LoRA(rank=2, targets=["0"]))
    >>> [key for key, parameter in net.named_parameters() if parameter.requires_grad]
    ['0.adapters.default.lora_A', '0.adapters.default.lora_B']
    """
    attachment = attachment_of(model)
    _check_addable(model, attachment, adapter, name)
    if attachment is None:
        flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        attachment = Attachment(fingerprint(model), flags)
        attachment.watch = model.register_load_state_dict_post_hook(take_loaded_base)  # type: ignore[no-untyped-call]
    also = adapter.also(model)
    trained = {*adapter.insert(model, name), *also}
    parameters = dict(model.named_parameters())
    if adapter.keeps_base:
        new = trained & attachment.flags.keys() - attachment.found.keys()
        attachment.found |= {key: parameters[key].detach().clone() for key in new}
    attachment.adapters[name], attachment.trained[name] = adapter, trained
    _leave_fast_paths(model, attachment)
    set_attachment(model, attachment)
    if len(attachment.adapters) == 1:
        set_adapter(model, name)
    else:
        own = attachment.base_parameters(name)
        attachment.values[name] = {key: attachment.found[key].clone() for key in attachment.found if key in own}
        for key in trained - attachment.flags.keys():
            parameters[key].requires_grad_(False)
    if batches is not None:
        try:
            attachment.adapters[name] = adapter.learn_start(model, name, batches)
        except BaseException:
            remove_adapter(model, name)
            raise
    return model


def _check_addable(model: nn.Module, attachment: Attachment | None, adapter: Adapter, name: str) -> None:
    if not name.isidentifier():
        raise ValueError(f"add_adapter: name={name!r} must be a plain identifier: it becomes part of parameter names.")
    if hasattr(Updates(), name):
        raise ValueError(f"add_adapter: name={name!r} is an attribute of torch's modules. Choose another one.")
    for path, child in model.named_modules():
        if child is not model and attachment_of(child) is not None:
            raise ValueError(
                f"add_adapter: {path!r} inside already carries an adapter. Take it off with remove_adapter first."
            )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            "add_adapter: the network is sharded already (its parameters are DTensors), so the adapter would not be "
            "kept in step over ranks. Add the adapter before fully_shard; in a module with an adapter mixin, call "
            "self.attach_adapter() in configure_model before fully_shard."
        )
    if attachment is None:
        return
    refuse_disabled(attachment, "add_adapter")
    if name in attachment.adapters:
        raise ValueError(
            f"add_adapter: the network already carries an adapter {name!r} ({attachment.adapters[name]!r}). Take it off "
            "with remove_adapter first, or give this one another name=."
        )
    alone = [one for one in (adapter, *attachment.adapters.values()) if not one.keeps_base]
    if alone or any(isinstance(layer, AdaptedLayer) and layer.merged for layer in model.modules()):
        cause = f"{alone[0]!r} changes the network itself" if alone else "an adapter is merged"
        raise ValueError(f"add_adapter: {cause}, so no other adapter can stand beside it.")


def remove_adapter(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take adapters off; without the last one the network is bit for bit the pretrained one again, flags included.

    That is so while the base stayed frozen; base weights that trained (full fine-tuning, a thawed base) stay trained.

    Args:
        model: A network with adapters.
        name: The one to take off; None for all.

    Raises:
        ValueError: If the network carries no such adapter.
    """
    attachment = required_attachment(model, "remove_adapter")
    refuse_disabled(attachment, "remove_adapter")
    if name is not None:
        check_known(attachment, [name], "remove_adapter")
    unmerge_adapter(model)
    if name is None or set(attachment.adapters) == {name}:
        if attachment.found:
            set_adapter(model, None)
        return _unload(model, attachment)
    if attachment.active == name:
        set_adapter(model, None)
    for _, module, updates in list(hosts(model)):
        gone: Any = updates._modules.pop(name, None)
        if gone is None or updates:
            continue
        if isinstance(module, AdaptedLayer):
            module.become_plain()
        else:
            gone.detach_from(module)
            delattr(module, ATTRIBUTE)
    for table in (attachment.adapters, attachment.trained, attachment.values):
        table.pop(name, None)
    present = {key for key, _ in model.named_parameters()}
    attachment.ever_trained &= present
    return model


def merge_adapter(model: nn.Module, *, unload: bool = False) -> nn.Module:
    """Add the active adapter's update to the base weights, so that it costs nothing at inference; twice is once.

    Args:
        model: An adapted network, changed in place.
        unload: Also turn it into the plain network it was, with the merged weights, ready for ``save_pretrained``.
            Without it the base weights are kept beside the merged ones and :func:`unmerge_adapter` restores them
            bit for bit.

    Raises:
        ValueError: If the network carries no adapter, or it cannot be expressed in weights of the network.
    """
    attachment = required_attachment(model, "merge_adapter")
    refuse_disabled(attachment, "merge_adapter")
    for path, module, updates in hosts(model):
        if not isinstance(module, AdaptedLayer) and updates.get_update(updates.active) is not None:
            raise ValueError(
                f"merge_adapter: {attachment.adapters[updates.active or '']!r} at {path or 'the network'!r} is no change of "
                "weights: it cannot be merged."
            )
    try:
        for layer in _layers(model):
            layer.merge()
    except ValueError:
        unmerge_adapter(model)
        raise
    return _unload(model, attachment) if unload else model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Undo :func:`merge_adapter`, bit for bit.

    Raises:
        ValueError: If the network carries no adapter.
    """
    refuse_disabled(required_attachment(model, "unmerge_adapter"), "unmerge_adapter")
    for layer in _layers(model):
        layer.unmerge()
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the values that trained since the adapter came, under their names in ``model.state_dict()``.

    Raises:
        ValueError: If the network carries no adapter.
    """
    attachment = required_attachment(model, "adapter_state_dict")
    refuse_disabled(attachment, "adapter_state_dict")
    trained = attachment.ever_trained
    return {key: value for key, value in model.state_dict().items() if key in trained}


def _layers(model: nn.Module) -> list[AdaptedLayer]:
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def _unload(model: nn.Module, attachment: Attachment) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, AdaptedLayer):
            module.become_plain()
        elif (updates := updates_of(module)) is not None:
            for update in updates.values():
                update.detach_from(module)  # type: ignore[operator]
            delattr(module, ATTRIBUTE)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(attachment.flags.get(key, True))
    for module, attribute, value in attachment.attributes:
        setattr(module, attribute, value)
    if attachment.watch is not None:
        attachment.watch.remove()
    set_attachment(model, None)
    return model


def _leave_fast_paths(model: nn.Module, attachment: Attachment) -> None:
    # In eval mode without gradients, torch's TransformerEncoderLayer reads the weights of its linear layers and calls
    # one kernel, past any forward of theirs: the adapter would silently do nothing. These two attributes are what its
    # own checks look at.
    done = {(id(module), attribute) for module, attribute, _ in attachment.attributes}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and _layers(module):
            attribute = "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else "activation_relu_or_gelu"
            if (id(module), attribute) not in done:
                attachment.attributes.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, 0)

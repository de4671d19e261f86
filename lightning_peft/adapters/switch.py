"""Which of a network's adapters acts: one, none, or one for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from lightning_peft.adapters.attachment import (
    Attachment,
    attachment_of,
    check_whole,
    refuse_disabled,
    required_attachment,
)
from lightning_peft.adapters.layer import AdaptedLayer, is_merged
from lightning_peft.adapters.updates import Update, hosts
from lightning_peft.matching import nearest


def set_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Let one of the network's adapters act and train, the others rest; None is the pretrained network.

    Exactly what that adapter trains requires a gradient afterwards. Base values that adapters train (a head, biases,
    norms) are each adapter's own: they are put away and brought back with it.

    Args:
        model: A network with adapters.
        name: One of their names, or None.

    Raises:
        ValueError: If there is no such adapter, or one is merged.

    >>> from lightning_peft import LoRA, add_adapter
    >>> net = add_adapter(nn.Sequential(nn.Linear(8, 8)), LoRA(rank=2), name="reviews")
    >>> net = add_adapter(net, LoRA(rank=4), name="news")
    >>> [name for name, p in set_adapter(net, "news").named_parameters() if p.requires_grad]
    ['0.adapters.news.lora_A', '0.adapters.news.lora_B']
    """
    attachment = required_attachment(model, "set_adapter")
    check_whole(model, attachment, "set_adapter")
    refuse_disabled(attachment, "set_adapter")
    if name is not None:
        check_known(attachment, [name], "set_adapter")
    if is_merged(model):
        raise ValueError(f"set_adapter: the adapter {attachment.active!r} is merged. Call unmerge_adapter first.")
    if name != attachment.active:
        _exchange_values(model, attachment, name)
    attachment.active = name
    for _, _, updates in hosts(model):
        updates.active = name if updates.get_update(name) is not None else None
    trained = attachment.trained[name] if name is not None else set()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)
        if key not in trained:
            parameter.grad = None  # else momentum and weight decay would go on moving it
    attachment.expected = set(trained)
    attachment.ever_trained |= trained
    return model


@torch.no_grad()
def _exchange_values(model: nn.Module, attachment: Attachment, name: str | None) -> None:
    parameters = dict(model.named_parameters())
    if attachment.active is not None:
        mine = attachment.base_parameters(attachment.active) & attachment.found.keys()
        attachment.values[attachment.active] = {key: parameters[key].detach().clone() for key in mine}
    # What came is put over what the network was pretrained to, so that nothing of the adapter that left remains.
    for key, value in {**attachment.found, **(attachment.values.get(name, {}) if name else {})}.items():
        parameters[key].copy_(value)


def check_known(attachment: Attachment, names: Sequence[str], owner: str) -> None:
    """Refuse names that no adapter has.

    Raises:
        ValueError: With the names there are.
    """
    for name in names:
        if name not in attachment.adapters:
            raise ValueError(
                f"{owner}: {name!r} is none of the adapters {sorted(attachment.adapters)}. "
                f"Nearest: {nearest(str(name), attachment.adapters)}."
            )


@contextmanager
def adapter_rows(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Give every row of the next batches an adapter of its own; None is the pretrained network.

    Rows lie along the first axis of what the layers see. ``generate`` may repeat them for its beams.

    Args:
        model: A network with adapters.
        adapter_names: One name for each row.

    Raises:
        ValueError: If there is no such adapter, one trains base values or cannot act on single rows, or one is merged.

    >>> from lightning_peft import LoRA, add_adapter
    >>> net = add_adapter(nn.Sequential(nn.Linear(8, 8)), LoRA(rank=2), name="reviews")
    >>> with adapter_rows(net, ["reviews", None]):
    ...     net(torch.zeros(2, 8)).shape
    torch.Size([2, 8])
    """
    attachment, names = required_attachment(model, "adapter_rows"), list(adapter_names)
    named = [name for name in dict.fromkeys(names) if name is not None]
    check_known(attachment, named, "adapter_rows")
    if is_merged(model):
        raise ValueError("adapter_rows: an adapter is merged. Call unmerge_adapter first.")
    acting = [attachment.active, *named] if attachment.active is not None else named
    if any(map(attachment.base_parameters, acting)):
        raise ValueError("adapter_rows: an adapter trains parameters of the network itself, which all rows share.")
    for path, module, updates in hosts(model):
        strange = [name for name in acting if isinstance(updates.get_update(name), Update) and not updates[name].rows]
        if strange or (acting and getattr(module, "batch_first", True) is False):
            raise ValueError(
                f"adapter_rows: {path or type(model).__name__!r} cannot have another adapter for each row."
            )
    before = [(updates, updates.by_row) for _, _, updates in hosts(model)]
    for updates, _ in before:
        updates.by_row = names
    try:
        yield model
    finally:
        for updates, by_row in before:
            updates.by_row = by_row


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the pretrained network for a while, also if the adapter is merged; no second copy is needed.

    Raises:
        ValueError: If the network carries no adapter, or its own weights have trained: nothing remembers them then.
    """
    attachment = required_attachment(model, "adapter_disabled")
    if trained := sorted((attachment.ever_trained & attachment.flags.keys()) - attachment.found.keys()):
        raise ValueError(
            f"adapter_disabled: {len(trained)} weights of the network itself train, first {trained[:3]}, so the "
            "pretrained network is gone. Keep a copy of it before training."
        )
    parameters = dict(model.named_parameters())
    enabled = [(updates, updates.enabled) for _, _, updates in hosts(model)]
    mine = {key: parameters[key].data for key in attachment.found}
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer):
                stack.enter_context(layer.pristine_values())
        for updates, _ in enabled:
            updates.enabled = False
        was_disabled, attachment.disabled = attachment.disabled, True
        for key, value in attachment.found.items():
            parameters[key].data = value.to(parameters[key].device, parameters[key].dtype)
        try:
            yield model
        finally:
            for updates, was in enabled:
                updates.enabled = was
            attachment.disabled = was_disabled
            for key, value in mine.items():
                parameters[key].data = value


@contextmanager
def pretrained_eval(model: nn.Module) -> Iterator[None]:
    """Run the network for a while as it was pretrained: no adapter, no dropout, no gradient.

    >>> net = nn.Dropout()
    >>> with pretrained_eval(net):
    ...     net.training
    False
    """
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), adapter_disabled(model) if attachment_of(model) is not None else nullcontext():
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

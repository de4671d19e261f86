"""What a network remembers about the adapters it carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.fingerprint import Fingerprint, print_tensor
from lightning_peft.adapters.layer import AdaptedLayer

_ATTRIBUTE = "lightning_peft_attachment"


@dataclass
class Attachment:
    """The adapters of a network, and what is needed to switch between them and to take them off again.

    Args:
        base: Fingerprint of the network before the first adapter came, so before any change of precision or sharding.
        flags: ``requires_grad`` of every parameter of the network before the first adapter came.
        adapters: The adapters by name, as they were asked for.
        trained: Names of the parameters that each adapter trains.
        active: Name of the adapter that acts, None for the pretrained network.
        expected: Names of the parameters that ought to require a gradient now.
        ever_trained: Names of the parameters that trained at any time since.
        attributes: Plain attributes that had to change, as (module, attribute, value found).
        found: Values of base parameters before any adapter trained them.
        values: Of every adapter that is not active, its own values of base parameters.
        disabled: Whether the pretrained network runs for a while, inside ``adapter_disabled``.
        watch: Handle of the hook that notices that a checkpoint of the base was loaded.
    """

    base: Fingerprint
    flags: dict[str, bool]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    trained: dict[str, set[str]] = field(default_factory=dict)
    active: str | None = None
    expected: set[str] = field(default_factory=set)
    ever_trained: set[str] = field(default_factory=set)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    found: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    disabled: bool = False
    watch: RemovableHandle | None = None

    def base_parameters(self, name: str) -> set[str]:
        """Return the parameters of the network itself that an adapter trains."""
        return self.trained[name] & self.flags.keys()


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return what ``model`` remembers about its adapters, or None if it carries none."""
    found = vars(model).get(_ATTRIBUTE)
    assert found is None or isinstance(found, Attachment)
    return found


def required_attachment(model: nn.Module, owner: str) -> Attachment:
    """Return what ``model`` remembers about its adapters.

    Raises:
        ValueError: If it carries none.
    """
    attachment = attachment_of(model)
    if attachment is None:
        inside = [path for path, child in model.named_modules() if attachment_of(child) is not None]
        hint = f"Its module {inside[0]!r} does: pass that one." if inside else "add_adapter puts one on."
        raise ValueError(f"{owner}: this {type(model).__name__} carries no adapter. {hint}")
    return attachment


def refuse_disabled(attachment: Attachment, owner: str) -> None:
    """Refuse a change, or a save, while base values are put away.

    Raises:
        ValueError: Inside ``adapter_disabled``.
    """
    if attachment.disabled:
        raise ValueError(
            f"{owner}: not inside adapter_disabled, where the adapter's values are put away. Leave the block."
        )


def moved_flags(model: nn.Module, attachment: Attachment) -> tuple[list[str], list[str]]:
    """Return the parameters that were freed and those that were frozen by somebody else since we last set them."""
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return sorted(now - attachment.expected), sorted(attachment.expected - now)


def check_whole(model: nn.Module, attachment: Attachment, owner: str) -> None:
    """Refuse a network of which a part with an adapter was replaced.

    Raises:
        ValueError: With the names that are gone.
    """
    here = dict(model.named_parameters(remove_duplicate=False))
    if gone := sorted(set().union(*attachment.trained.values()) - here.keys()):
        raise ValueError(
            f"{owner}: {len(gone)} parameters of the adapter are gone, first {gone[:3]}: the module that held them was "
            "replaced. Do that before add_adapter."
        )
    for name, found in attachment.base.items():
        if name in here and found.shape != tuple(here[name].shape):
            raise ValueError(
                f"{owner}: {name!r} had the shape {found.shape} when the adapter came and has "
                f"{tuple(here[name].shape)} now, as after resize_token_embeddings. Do that before add_adapter."
            )


def refresh_base(backbone: nn.Module, attachment: Attachment) -> None:
    """Take the fingerprint of the frozen weights anew, in case a base checkpoint was loaded since the adapter came.

    Buffers keep their first print: one that moved since must stay in every checkpoint.
    """
    pristine = {
        f"{path}.{name}".lstrip("."): value
        for path, layer in backbone.named_modules()
        if isinstance(layer, AdaptedLayer)
        for name, value in layer.pristine.items()
    }
    for name, parameter in backbone.named_parameters():
        if name in attachment.base and name not in attachment.ever_trained:
            taken = print_tensor(pristine.get(name, parameter))
            # A print in another precision, or of a shard, would say less than the one there is.
            if taken.digest and taken.dtype == attachment.base[name].dtype:
                attachment.base[name] = taken


def take_loaded_base(model: nn.Module, loaded: Any) -> None:
    """Where ``load_state_dict`` read a checkpoint of the base alone, keep its values of what an adapter trains as found.

    A hook of ``register_load_state_dict_post_hook``; ``loaded.missing_keys`` may begin with the path of a module around. A
    checkpoint has a base alone if it lacks all that the adapters added; where they added nothing, that cannot be told.
    """
    attachment = attachment_of(model)
    if attachment is None or not attachment.found:
        return
    missing = {key[start:] for key in loaded.missing_keys for start in (0, *_after_dots(key))}
    added = set().union(*attachment.trained.values()) - attachment.flags.keys()
    if added and added <= missing:
        parameters = dict(model.named_parameters())
        for key in attachment.found.keys() - missing:
            attachment.found[key] = parameters[key].detach().clone()


def _after_dots(key: str) -> list[int]:
    return [place + 1 for place, letter in enumerate(key) if letter == "."]


def set_attachment(model: nn.Module, attachment: Attachment | None) -> None:
    """Let ``model`` remember (or forget) its adapters; plain data, so it is copied and pickled with the model."""
    if attachment is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = attachment

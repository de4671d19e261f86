"""Adapt a pretrained network inside a PyTorch Lightning project without wrecking what it knows."""

from lightning_peft.adapters import (
    Adapter,
    FullFinetune,
    LinearProbe,
    LoRA,
    adapter_disabled,
    adapter_rows,
    adapter_state_dict,
    add_adapter,
    from_peft,
    load_adapter,
    merge_adapter,
    parameter_groups,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lightning_peft.mixins import AdapterMixin, FullFinetuneMixin, LinearProbeMixin, LoRAMixin, ReplayMixin, adapted
from lightning_peft.version import __version__

__all__ = [
    "Adapter",
    "AdapterMixin",
    "FullFinetune",
    "FullFinetuneMixin",
    "LinearProbe",
    "LinearProbeMixin",
    "LoRA",
    "LoRAMixin",
    "ReplayMixin",
    "__version__",
    "adapted",
    "adapter_disabled",
    "adapter_rows",
    "adapter_state_dict",
    "add_adapter",
    "from_peft",
    "load_adapter",
    "merge_adapter",
    "parameter_groups",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]

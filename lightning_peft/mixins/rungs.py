"""The rungs of the adaptation ladder, a mixin each."""

from __future__ import annotations

from typing import Any

from lightning_peft.adapters import FullFinetune, KVPrefix, LoRA, SoftPrompt
from lightning_peft.mixins.adapter_mixin import AdapterMixin


class LoRAMixin(AdapterMixin):
    """Low-rank updates on the backbone: :class:`AdapterMixin` with ``adapter=LoRA()``."""

    def __init__(self, *args: Any, adapter: LoRA = LoRA(), backbone: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)


class SoftPromptMixin(AdapterMixin):
    """Trained embeddings before the backbone's input: :class:`AdapterMixin` with ``adapter=SoftPrompt()``."""

    def __init__(
        self, *args: Any, adapter: SoftPrompt = SoftPrompt(), backbone: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)


class PrefixMixin(AdapterMixin):
    """Trained keys and values before those of every attention: :class:`AdapterMixin` with ``adapter=KVPrefix()``."""

    def __init__(self, *args: Any, adapter: KVPrefix = KVPrefix(), backbone: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)


class FullFinetuneMixin(AdapterMixin):
    """Everything trains; checkpoints and schedules work as on the other rungs."""

    def __init__(
        self, *args: Any, adapter: FullFinetune = FullFinetune(), backbone: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, adapter=adapter, backbone=backbone, **kwargs)

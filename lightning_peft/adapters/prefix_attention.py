"""Attention functions for transformers that put a module's prefix before the keys and values it was called with.

The prefix never enters a cache and no mask of the caller mentions it, so ``generate``, beams and padding need nothing. Modules
are led here by a copy of their config; the network's own config, and with it the making of masks, stays as it is. (A
config may be shared by two networks: a name written into it would reach the other one.)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from lightning_peft.adapters.updates import updates_of

PLAIN = ("sdpa", "eager")
"""Attention functions that a prefix can be put before."""

PREFIX, CAPTURE = "lightning_peft_prefix_", "lightning_peft_capture_"
"""How the names of our functions begin in transformers' table, which is one for the whole process."""

CAPTURED = "lightning_peft_captured"


def register() -> None:
    """Enter our functions into transformers' table; again is no harm."""
    from transformers import AttentionInterface  # noqa: PLC0415 - costs seconds, and not everybody adapts one

    for plain in PLAIN:
        AttentionInterface.register(f"{PREFIX}{plain}", partial(prefix_attention, plain))
        AttentionInterface.register(f"{CAPTURE}{plain}", partial(captured_attention, plain))


def led_config(config: Any, kind: str) -> Any:
    """Return a copy of a config that leads attention to our function of that kind (``PREFIX``, ``CAPTURE``)."""
    led = copy.copy(config)
    led._attn_implementation = f"{kind}{plain_name(config)}"
    return led


def plain_name(config: Any) -> str:
    """Return the name of the attention function that a config chose before we came."""
    return str(config._attn_implementation or "eager").removeprefix(PREFIX)


def prefix_attention(  # noqa: PLR0917 - transformers' signature
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Let the queries see the active prefix of ``module`` too.

    Args:
        plain: Name of the function that computes.
        module: The attention module, host of a prefix update.
        query: Of shape ``(batch, heads, tokens, head_dim)``.
        key: Of shape ``(batch, kv_heads, keys, head_dim)``.
        value: Of the same shape.
        attention_mask: Of shape ``(batch, 1, tokens, keys)``: True, or 0 if it is added, where a key is seen.
        **kwargs: What the function takes besides.

    Raises:
        ValueError: If the mask is of another attention function.
    """
    updates = updates_of(module)
    update: Any = updates.current if updates is not None else None
    if update is None:
        return _plain(plain, module)(module, query, key, value, attention_mask, **kwargs)
    prefix = update.keys_and_values().to(key.dtype)
    count = prefix.shape[-2]
    if attention_mask is None and plain == "sdpa":
        attention_mask = _causal_mask(module, query, key, kwargs.get("is_causal"))
    if attention_mask is not None:
        if attention_mask.ndim != 4:
            raise ValueError(
                f"KVPrefix: a mask of shape {tuple(attention_mask.shape)} belongs to another attention function. Call "
                "set_attn_implementation('sdpa') on the network."
            )
        visible = attention_mask.new_full((*attention_mask.shape[:-1], count), attention_mask.dtype == torch.bool)
        attention_mask = torch.cat([visible, attention_mask], -1)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0))
    prefix = prefix[:, None].expand(-1, key.shape[0], -1, -1, -1)
    key, value = torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)
    kwargs["is_causal"] = False
    return _plain(plain, module)(module, query, key, value, attention_mask, **kwargs)


def _causal_mask(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    # No mask means for sdpa "causal, counted from the first key" in a causal module, and "all" elsewhere.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or query.shape[2] == 1:
        return None
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return mask.expand(query.shape[0], 1, -1, -1)


def captured_attention(  # noqa: PLR0917 - transformers' signature
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Compute as ever and note keys and values on the module."""
    vars(module)[CAPTURED] = torch.stack([key[0], value[0]])
    return _plain(plain, module)(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def capturing(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect keys and values of the first row, of shape ``(2, kv_heads, tokens, head_dim)``, by attention module."""
    register()
    found: list[Any] = [module.config for module in modules]
    captured: dict[nn.Module, Tensor] = {}
    try:
        for module in modules:
            module.config = led_config(module.config, CAPTURE)
        yield captured
        captured.update({module: vars(module)[CAPTURED] for module in modules})
    finally:
        for module, config in zip(modules, found, strict=True):
            module.config = config
            vars(module).pop(CAPTURED, None)


def _plain(plain: str, module: nn.Module) -> Any:
    if plain == "eager":  # each model family has one of its own
        return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415 - costs seconds

    return ALL_ATTENTION_FUNCTIONS[plain]

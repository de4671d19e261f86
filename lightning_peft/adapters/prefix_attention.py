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
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from lightning_peft.adapters.prompt_hosts import current_prompt

PLAIN = ("sdpa", "eager")
"""Attention functions that a prefix can be put before."""

PREFIX, CAPTURE = "lightning_peft_prefix", "lightning_peft_capture"
"""Names of our functions in transformers' table, which is one for the whole process."""

CAPTURED, UNLED = "lightning_peft_captured", "lightning_peft_unled"


def register() -> None:
    """Enter our functions into transformers' table; again is no harm."""
    from transformers import AttentionInterface  # noqa: PLC0415 - costs seconds, and not everybody adapts one

    AttentionInterface.register(PREFIX, prefix_attention)
    AttentionInterface.register(CAPTURE, captured_attention)


def led_config(config: Any, function: str) -> Any:
    """Return a copy of a config that leads attention to that function of ours (``PREFIX``, ``CAPTURE``)."""
    led = copy.copy(config)
    led._attn_implementation = function
    setattr(led, UNLED, unled_config(config))
    return led


def unled_config(config: Any) -> Any:
    """Return the config that a copy of ours stands for: the network's own, which still chooses how attention is computed."""
    return getattr(config, UNLED, config)


def plain_name(config: Any) -> str:
    """Return the name of the attention function that the network's own config chooses."""
    return str(unled_config(config)._attn_implementation or "eager")


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Let the queries see the active prefix of ``module`` too.

    Args:
        module: The attention module, host of a prefix update.
        query: Of shape ``(batch, heads, tokens, head_dim)``.
        key: Of shape ``(batch, kv_heads, keys, head_dim)``.
        value: Of the same shape.
        attention_mask: Of shape ``(batch, 1, tokens, keys)``: True, or 0 if it is added, where a key is seen.
        **kwargs: What the function takes besides.

    Raises:
        ValueError: If the network computes attention in a way that no prefix can be put before.
    """
    update = current_prompt(module)
    if update is None:
        return _plain(module)(module, query, key, value, attention_mask, **kwargs)
    plain = check_plain(module)
    prefix = update.keys_and_values().to(key.dtype)
    count = prefix.shape[-2]
    if attention_mask is None and plain == "sdpa":
        attention_mask = _causal_mask(module, query, key, kwargs.get("is_causal"))
    if attention_mask is not None:
        visible = attention_mask.new_full((*attention_mask.shape[:-1], count), attention_mask.dtype == torch.bool)
        attention_mask = torch.cat([visible, attention_mask], -1)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0))
    prefix = prefix[:, None].expand(-1, key.shape[0], -1, -1, -1)
    key, value = torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)
    kwargs["is_causal"] = False
    return _plain(module)(module, query, key, value, attention_mask, **kwargs)


def _causal_mask(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    # No mask means for sdpa "causal, counted from the first key" in a causal module, and "all" elsewhere.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or query.shape[2] == 1:
        return None
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return mask.expand(query.shape[0], 1, -1, -1)


def captured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Compute as ever and note keys and values on the module."""
    vars(module)[CAPTURED] = torch.stack([key[0], value[0]])
    return _plain(module)(module, query, key, value, attention_mask, **kwargs)


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


def check_plain(module: Any) -> str:
    """Return the name of the attention function that computes for a module.

    Raises:
        ValueError: If it is none that a prefix can be put before.
    """
    chosen = plain_name(module.config)
    if chosen not in PLAIN:
        raise ValueError(
            f"KVPrefix: the network computes attention by {chosen!r}, and a prefix needs one of {list(PLAIN)}. "
            "Call set_attn_implementation('sdpa') on it before."
        )
    return chosen


def _plain(module: Any) -> Any:
    chosen = plain_name(module.config)
    if chosen == "eager":  # each model family has one of its own
        return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415 - costs seconds

    return ALL_ATTENTION_FUNCTIONS[chosen]

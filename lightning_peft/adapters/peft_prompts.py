"""Soft prompts and prefixes in PEFT's files: their configuration both ways, and the one tensor that holds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attachment import Attachment
from lightning_peft.adapters.kv_prefix import KVPrefix, PrefixUpdate
from lightning_peft.adapters.peft_matching import as_globs, matching_modules, refuse_missing, saved_modules
from lightning_peft.adapters.prompt_hosts import attention_of, prompt_hosts
from lightning_peft.adapters.soft_prompt import SoftPrompt
from lightning_peft.adapters.updates import updates_named

# PEFT has a class for every task, and for prompts it needs to know which. A class of a task with a head of its own also wants
# that head in the file; the plain one computes the same without.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def prompt_config(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Any]:
    """Return the fields of PEFT's ``PromptTuningConfig`` for a soft prompt.

    Raises:
        ValueError: If PEFT would compute something else with it.
    """
    adapter = attachment.adapters[name]
    assert isinstance(adapter, SoftPrompt)
    _refuse_differences(model, owner="save_adapter", first=bool(adapter.after_first))
    return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **_common(model, adapter)}


def prefix_config(model: nn.Module, attachment: Attachment, name: str) -> dict[str, Any]:
    """Return the fields of PEFT's ``PrefixTuningConfig`` for a prefix.

    Raises:
        ValueError: If PEFT would compute something else with it.
    """
    adapter = attachment.adapters[name]
    assert isinstance(adapter, KVPrefix)
    if not adapter.offset_positions:
        _rotation(model, adapter.tokens)
    updates = prefix_updates(model, name)
    shapes = {tuple(update.keys_and_values().shape) for update in updates}
    if len(shapes) > 1:
        raise ValueError(f"save_adapter: PEFT's format has one size for all layers, and here are {sorted(shapes)}.")
    _, heads, _, size = next(iter(shapes))
    fields = _common(model, adapter)
    return {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,  # a network that made the prefix is in the file by what it made
        **fields,
        "token_dim": heads * size,
        "num_attention_heads": heads,
        "num_layers": len(updates),
    }


def _common(model: nn.Module, adapter: SoftPrompt | KVPrefix) -> dict[str, Any]:
    config: Any = prompt_hosts(model, owner="save_adapter").base.config
    heads = saved_modules(model, adapter.train_also)
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    return {
        "task_type": task if task == "CAUSAL_LM" or (task is not None and heads) else "FEATURE_EXTRACTION",
        "num_virtual_tokens": adapter.tokens,
        "token_dim": config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "modules_to_save": heads or None,
    }


def prompt_from_config(config: Mapping[str, Any], model: nn.Module) -> SoftPrompt:
    """Return the soft prompt that PEFT's fields describe; one that a network made reads the same.

    Raises:
        ValueError: If a field is missing, or PEFT computes something else with this network.
    """
    _refuse_differences(model, owner="load_adapter", first=False)
    return SoftPrompt(tokens=_count(config), init="random", train_also=_heads(config, model))


def prefix_from_config(config: Mapping[str, Any], model: nn.Module) -> KVPrefix:
    """Return the prefix that PEFT's fields describe.

    Raises:
        ValueError: If a field is missing.
    """
    return KVPrefix(tokens=_count(config), init="random", offset_positions=True, train_also=_heads(config, model))


def _count(config: Mapping[str, Any]) -> int:
    refuse_missing(config, "num_virtual_tokens")
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise ValueError("load_adapter: prompts for an encoder and its decoder cannot be read.")
    return int(config["num_virtual_tokens"])


def _heads(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    return as_globs(matching_modules(model, config.get("modules_to_save")))


def _refuse_differences(model: nn.Module, *, owner: str, first: bool) -> None:
    found, kind = prompt_hosts(model, owner=owner), type(model).__name__
    if first:
        raise ValueError(f"{owner}: PEFT puts a prompt before the first token, and this one stands behind it.")
    if "input_ids" not in found.inputs:
        raise ValueError(f"{owner}: PEFT has no prompts for networks that read images, as {kind} does.")
    reads_last = hasattr(model, "score")
    if kind.endswith("ForSequenceClassification") and getattr(found.base, "pooler", None) is None and not reads_last:
        raise ValueError(
            f"{owner}: the head of {kind} reads the first entry, which is a virtual token in PEFT and the first real one "
            "here: one prompt means two things. Train it in the library that uses it."
        )


def prefix_updates(model: nn.Module, name: str) -> list[PrefixUpdate]:
    """Return the prefix of every attention module, from the input on."""
    return [update for update in updates_named(model, name).values() if isinstance(update, PrefixUpdate)]


def _rotation(model: nn.Module, tokens: int) -> tuple[Any, Tensor, Tensor]:
    """Return how the network turns its keys, with cosines and sines of the turn by ``tokens`` positions.

    PEFT counts the input's positions from ``tokens`` on. Where positions are turns and only distances count, keys that are
    turned as far see the same.

    Raises:
        ValueError: If the network has other positions.
    """
    found = prompt_hosts(model, owner="save_adapter")
    rotary: Any = getattr(found.base, "rotary_emb", None)
    modules = attention_of(found, owner="save_adapter")
    turn = inspect.unwrap(type(modules[0]).forward).__globals__.get("apply_rotary_pos_emb")
    takes = list(inspect.signature(rotary.forward).parameters) if rotary is not None else []
    if turn is None or takes != ["x", "position_ids"] or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise ValueError(
            f"save_adapter: PEFT counts the positions of the input from {tokens} on, behind the prefix, and this one was "
            f"trained with positions from 0 on, which means something else to this {type(model).__name__}. Train with "
            "KVPrefix(offset_positions=True) for a file; Lightning's checkpoints hold every adapter."
        )
    wide = torch.empty(
        0, dtype=torch.float64 if found.base.dtype == torch.float64 else torch.float32, device=found.base.device
    )
    cos, sin = rotary(wide, torch.tensor([[tokens]], device=found.base.device))
    return turn, cos, sin


@dataclass
class Joined:
    """The prefixes of all layers as PEFT stores them: by token, layer, key or value, head, place in the head."""

    model: nn.Module
    updates: Sequence[PrefixUpdate]
    offset: bool
    """Whether the input's positions are counted from behind the prefix on, as PEFT does."""
    optional: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        two, heads, tokens, size = self.updates[0].keys_and_values().shape
        return (tokens, len(self.updates) * two * heads * size)

    def read(self) -> Tensor:
        """Return a copy on the CPU."""
        with torch.no_grad():
            layers = torch.stack([update.keys_and_values() for update in self.updates])
            if not self.offset:
                turn, cos, sin = _rotation(self.model, self.shape[0])
                layers = torch.stack([turn(layers[:, 0], layers[:, 0], cos, sin)[1], layers[:, 1]], 1)
        return layers.permute(3, 0, 1, 2, 4).reshape(self.shape).cpu().clone()

    def write(self, value: Tensor) -> None:
        """Copy the values into the layers."""
        two, heads, tokens, size = self.updates[0].keys_and_values().shape
        layers = value.view(tokens, len(self.updates), two, heads, size).permute(1, 2, 3, 0, 4)
        with torch.no_grad():
            for update, layer in zip(self.updates, layers, strict=True):
                update.prefix.copy_(layer)

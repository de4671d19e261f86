"""Find what prompts need inside a transformers network: its base model, embeddings, layers, attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.updates import Update, updates_of

HANDLES = "lightning_peft_hooks"
SENSES = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
"""Inputs of networks that read something else than text."""


@dataclass
class PromptHosts:
    """Where prompts go in one transformers network.

    Args:
        base: The transformer without its head; of several around each other the innermost one.
        path: Dotted name of ``base`` inside the network that was asked for, empty for that network itself.
        inputs: Names of the arguments of ``base``, in order.
        words: The token embedding; None for images.
        positions: The table of learned absolute positions, None without one.
    """

    base: Any
    path: str
    inputs: tuple[str, ...]
    words: nn.Embedding | None
    positions: nn.Embedding | None

    @property
    def max_length(self) -> int | None:
        """How many positions there are for prompt and input together, None for no limit."""
        if self.positions is None:
            return None
        unused = (
            getattr(self.positions, "offset", 0)
            if self.positions.padding_idx is None
            else self.positions.padding_idx + 1
        )
        return int(self.positions.num_embeddings - unused)

    @property
    def counts_from(self) -> int | None:
        """Where a network that counts as RoBERTa does puts padding; None for one that counts from 0."""
        return None if self.positions is None else self.positions.padding_idx

    def name_of(self, module: nn.Module) -> str:
        """Return the dotted name of a module of ``base``, relative to the whole network."""
        inside = next(name for name, found in self.base.named_modules() if found is module)
        return ".".join(part for part in (self.path, inside) if part)


def prompt_hosts(model: nn.Module, *, owner: str) -> PromptHosts:
    """Find the base model of a transformers network, and what belongs to it.

    Args:
        model: The network, with or without its head.
        owner: Who asks; the error message begins with it.

    Raises:
        ValueError: If it is none of transformers', an encoder with a decoder, or reads several kinds of input.
    """
    from transformers import PreTrainedModel  # noqa: PLC0415 - costs seconds, and not everybody adapts one

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{owner}: this {kind} is no transformers network (a PreTrainedModel). Pass the one inside it."
        )
    base: Any = model.base_model
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            f"{owner}: {kind} is an encoder with a decoder. Adapt one of the two, as a network of its own."
        )
    base = _innermost(base)
    inputs = _inputs(base)
    senses = sorted(SENSES & set(inputs))
    if "input_ids" in inputs and senses:
        raise ValueError(f"{owner}: {kind} reads text and {' and '.join(senses)}. Adapt its language model alone.")
    if "input_ids" not in inputs and senses != ["pixel_values"]:
        raise ValueError(f"{owner}: {type(base).__name__} reads neither text nor images, but {', '.join(inputs[:3])}.")
    words = _words(base) if "input_ids" in inputs else None
    tables = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not words
        and ("position" in name.rpartition(".")[2] or name.rpartition(".")[2] == "wpe")
    ]
    path = next(name for name, module in model.named_modules() if module is base)
    return PromptHosts(base, path, inputs, words, tables[0] if tables and words is not None else None)


def _innermost(base: Any) -> Any:
    # A head may pass by the base model: OPTForCausalLM calls model.decoder, and a hook on model would never run.
    from transformers import PreTrainedModel  # noqa: PLC0415 - costs seconds, and not everybody adapts one

    read = SENSES | {"input_ids"}
    inner = [child for child in base.children() if isinstance(child, PreTrainedModel) and read & set(_inputs(child))]
    return _innermost(inner[0]) if len(inner) == 1 else base


def _inputs(base: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(type(base).forward).parameters)[1:]


def _words(base: Any) -> Any:
    try:
        return base.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters
        return None


def layers_of(hosts: PromptHosts, *, owner: str) -> list[nn.Module]:
    """Return the transformer layers of a base model, from the input on.

    Raises:
        ValueError: If there is no list of them.
    """
    count = getattr(hosts.base.config, "num_hidden_layers", None)
    for module in hosts.base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len(set(module)) == count:
            return list(module)
    raise ValueError(f"{owner}: {type(hosts.base).__name__} has no list of its {count} layers.")


def attention_of(hosts: PromptHosts, *, owner: str) -> list[nn.Module]:
    """Return the modules of a base model that compute attention by transformers' table of attention functions.

    Raises:
        ValueError: If there is none.
    """
    found = [module for module in hosts.base.modules() if "ALL_ATTENTION_FUNCTIONS" in _names_in_forward(module)]
    if not found:
        raise ValueError(
            f"{owner}: {type(hosts.base).__name__} does not look up its attention in transformers' "
            "ALL_ATTENTION_FUNCTIONS, where a prefix could be put in. Take SoftPrompt or LoRA."
        )
    return found


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code is not None else ()


class PromptUpdate(Update):
    """What every kind of prompt shares: it works through hooks, acts on whole batches and is no change of weights."""

    rows = False

    def before(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return other arguments for the host's forward, as a pre-hook does; None for the same."""

    def after(self, host: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the host's forward is to have returned."""
        return output

    def attach_to(self, host: nn.Module) -> None:
        """Hook the host, once for all updates that it will ever hold: the hooks ask which one acts."""
        updates: Any = updates_of(host)
        if not hasattr(updates, HANDLES):
            before = host.register_forward_pre_hook(_before, with_kwargs=True)
            setattr(updates, HANDLES, [before, host.register_forward_hook(_after, with_kwargs=True)])

    def detach_from(self, host: nn.Module) -> None:
        """Take the hooks off the host; twice is once."""
        for handle in getattr(updates_of(host), HANDLES, []):
            handle.remove()

    def merged_values(self, layer: Any) -> dict[str, Tensor]:
        """Refuse.

        Raises:
            ValueError: Always: no weights of the network compute what a prompt does.
        """
        raise ValueError(f"merge_adapter: a prompt is no change of weights: {type(self).__name__} cannot be merged.")


def _before(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    update = current_prompt(host)
    return update.before(host, args, kwargs) if isinstance(update, PromptUpdate) else None


def _after(host: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    update = current_prompt(host)
    return update.after(host, kwargs, output) if isinstance(update, PromptUpdate) else output


def current_prompt(module: nn.Module) -> Any:
    """Return the update of ``module`` that acts now, None for the network alone."""
    updates = updates_of(module)
    return updates.current if updates is not None else None


def text_to_length(text_ids: tuple[int, ...], tokens: int) -> Tensor:
    """Repeat a text or cut it, so that it has that many tokens.

    >>> text_to_length((7, 8, 9), 5).tolist()
    [7, 8, 9, 7, 8]
    """
    return torch.tensor([text_ids[i % len(text_ids)] for i in range(tokens)])


def drawn_words(words: nn.Embedding, tokens: int, random: torch.Generator) -> Tensor:
    """Return the ids of as many tokens of the vocabulary, drawn at random, without padding."""
    known = [i for i in range(words.num_embeddings) if i != words.padding_idx]
    return torch.tensor(known)[torch.randint(len(known), (tokens,), generator=random)]


def check_prompt(owner: str, tokens: int, init: str, inits: tuple[str, ...], text_ids: tuple[int, ...]) -> None:
    """Check the values that every kind of prompt has.

    Raises:
        ValueError: For a value out of range, and for a text without its init or the other way round.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"{owner}: tokens={tokens!r} must be a whole number of at least 1.")
    if init not in inits:
        raise ValueError(f"{owner}: init={init!r} must be one of {list(inits)}.")
    if (init == "text") != bool(text_ids):
        raise ValueError(
            f"{owner}: init={init!r} with text_ids={text_ids!r}. Give token ids for init='text', and only then."
        )


def check_text(owner: str, text_ids: tuple[int, ...], words: nn.Embedding | None) -> None:
    """Check a text against the vocabulary of a network.

    Raises:
        ValueError: If the network has none, or not all of these tokens.
    """
    if text_ids and words is None:
        raise ValueError(f"{owner}: init='text' needs a network that reads text.")
    if words is not None and (strange := [token for token in text_ids if not 0 <= token < words.num_embeddings]):
        raise ValueError(f"{owner}: text_ids hold {strange[0]}, and the vocabulary has {words.num_embeddings} tokens.")

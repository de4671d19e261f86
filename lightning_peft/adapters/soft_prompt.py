"""Soft prompts: train a few virtual tokens before the input of a frozen network.

``inputs_embeds = [P; E(ids)]`` with ``P`` of shape ``(tokens, dim)``.
Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.image_prompt import check_images, image_prompt, place_image_prompt
from lightning_peft.adapters.prompt_hosts import (
    PromptHosts,
    PromptUpdate,
    check_prompt,
    check_text,
    drawn_words,
    prompt_hosts,
    text_to_length,
)
from lightning_peft.adapters.prompt_insertion import Start, insert, prompt_start, shift_positions, strip_output
from lightning_peft.adapters.prompt_positions import bound_call, check_length, counted_positions, past_length
from lightning_peft.adapters.switch import pretrained_eval
from lightning_peft.adapters.updates import master_dtype, place

NOTE = "prompt_start"
"""Keyword by which the layers of a network hear where the prompt stands; None: not in this call."""


@dataclass(frozen=True, repr=False)
class SoftPrompt(Adapter):
    """Trainable vectors before the embedded input, everything else frozen.

    The network is one of transformers, given as a whole. It is called as before, by ``input_ids`` or ``inputs_embeds``, and
    answers as before: the prompt's positions are taken out of ``last_hidden_state`` and ``hidden_states``, so logits, labels
    and pooling keep their shapes (``attentions`` show the prompt). ``generate`` works as usual, greedy and with beams. In a
    padded batch every row is what it is alone: the prompt stands directly before a row's first real token, and
    positions count real tokens.

    **The trap:** a pooler that reads the first token (BERT's, and the heads of BERT, RoBERTa and DistilBERT) has a virtual
    token for ``[CLS]``, unless the head is outside and sees the stripped output. ``pooler_output`` is computed inside the
    base: set ``after_first=True`` there.

    It is not the cheapest step: every layer sees ``tokens`` more entries. Not with caches of fixed size
    (``cache_implementation="static"``) and assisted decoding, which count the entries of the cache themselves.

    Args:
        tokens: Number of virtual tokens.
        init: Where they start. ``"vocabulary"``: embeddings of tokens drawn at random, without padding. ``"text"``: those of
            ``text_ids``. ``"random"``: normal, as wide as the embeddings spread; it learns slower. Networks that read
            images have no vocabulary; for both other names they draw uniformly as in Jia et al. 2022.
        text_ids: Token ids of a text, repeated or cut to ``tokens``.
        after_first: Put the prompt behind the first token. None: behind it for images, where that is the class token; before
            it for text.
        seed: Seed of the draws; the global generators are not touched.

    Raises:
        ValueError: For a value out of range, here; if a network is not fit for it, when it is adapted; for an input that
            leaves no positions for the prompt, when it comes.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from lightning_peft import add_adapter
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> net = add_adapter(LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)), SoftPrompt(tokens=3))
    >>> net(input_ids=torch.tensor([[1, 2]])).logits.shape
    torch.Size([1, 2, 11])
    >>> [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.requires_grad]
    [('model.adapters.default.prompt', (3, 8))]
    """

    tokens: int = 20
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    text_ids: list[int] | tuple[int, ...] = ()
    after_first: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        super().__post_init__()
        object.__setattr__(self, "text_ids", tuple(self.text_ids))
        check_prompt(
            type(self).__name__, self.tokens, self.init, ("vocabulary", "text", "random"), tuple(self.text_ids)
        )

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        hosts = self.select(model)
        prompt = self.start_values(model, hosts)
        return self.place_prompt(hosts, name, prompt)

    @override
    def select(self, model: nn.Module) -> PromptHosts:
        """Return where the prompt goes in ``model``.

        Raises:
            ValueError: If the network is not fit for it.
        """
        owner = type(self).__name__
        hosts = prompt_hosts(model, owner=owner)
        check_text(owner, tuple(self.text_ids), hosts.words)
        if "input_ids" not in hosts.inputs:
            check_images(hosts, owner)
            return hosts
        if not isinstance(hosts.words, nn.Embedding) or "inputs_embeds" not in hosts.inputs:
            raise ValueError(
                f"{owner}: {type(hosts.base).__name__} does not take embeddings (inputs_embeds) for its input."
            )
        if strange := sorted({"cache_params", "per_layer_inputs"} & set(hosts.inputs)):
            raise ValueError(f"{owner}: {type(hosts.base).__name__} takes {strange[0]}, which a prompt would not fit.")
        if hosts.max_length is not None and self.tokens >= hosts.max_length:
            raise ValueError(
                f"{owner}: tokens={self.tokens} leave no position of {hosts.max_length} to the input. Lower tokens."
            )
        return hosts

    def start_values(self, model: nn.Module, hosts: PromptHosts) -> Tensor:
        """Return what the prompt starts as, of shape ``(tokens, dim)``."""
        random = torch.Generator().manual_seed(self.seed)
        words = hosts.words
        if words is None:
            return image_prompt(hosts, self.tokens, random)
        if self.init == "random" and not words.weight.is_meta:
            wide = torch.randn(self.tokens, words.embedding_dim, generator=random)
            return wide.to(words.weight.device) * words.weight.detach().std().to(master_dtype(words.weight.dtype))
        if self.init == "text":
            ids = text_to_length(tuple(self.text_ids), self.tokens)
        else:
            ids = drawn_words(words, self.tokens, random)
        with pretrained_eval(model):  # the module and not its weight: some scale what they look up
            found: Tensor = words(ids.to(words.weight.device))
        return found

    def place_prompt(self, hosts: PromptHosts, name: str, prompt: Tensor, *, tell_layers: bool = False) -> list[str]:
        """Put the prompt in; return the name of its parameter."""
        base = hosts.base
        if hosts.words is None:
            return [place_image_prompt(hosts, name, prompt, after_first=self.after_first is not False)]
        text = TextPrompt(
            prompt, hosts, owner=type(self).__name__, after_first=bool(self.after_first), tell_layers=tell_layers
        )
        key = place(base, name, text)
        text.attach_to(base)
        return [f"{hosts.path}.{key}prompt".lstrip(".")]


class TextPrompt(PromptUpdate):
    """A prompt before embedded tokens; it stands on the base model.

    Args:
        prompt: What it starts as, of shape ``(tokens, dim)``.
        hosts: The network.
        owner: Name of the adapter; error messages begin with it.
        after_first: Whether the first token stays in front.
        tell_layers: Whether the layers hear where the prompt stands.
    """

    def __init__(self, prompt: Tensor, hosts: PromptHosts, *, owner: str, after_first: bool, tell_layers: bool) -> None:
        super().__init__()
        assert hosts.words is not None
        self.prompt = nn.Parameter(prompt.detach().to(master_dtype(hosts.words.weight.dtype), copy=True))
        self.inputs, self.max_length = hosts.inputs, hosts.max_length
        self.padding = hosts.counts_from
        self.owner, self.after_first, self.tell_layers = owner, after_first, tell_layers

    @override
    def before(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (), self.extend(host, bound_call(self.inputs, args, kwargs))

    def extend(self, base: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call with the prompt in them; after the first step of decoding it is in the cache.

        Raises:
            ValueError: If mask or positions are not one value per token, or there are not enough positions.
        """
        given, mask = dict(call), call.get("attention_mask")
        ids: Tensor | None = call.get("input_ids")
        embedded: Tensor | None = call.get("inputs_embeds")
        if (ids is None) == (embedded is None):
            return given  # the network itself says what is wrong
        self._check_shapes(call)
        entries = ids if embedded is None else embedded
        assert entries is not None
        shape, count = (entries.shape[0], entries.shape[1]), len(self.prompt)
        past, start = past_length(call), prompt_start(mask, after_first=self.after_first)
        length = past + shape[1] + (0 if past else count)
        check_length(length, count, self.max_length, owner=self.owner, kind="prompt")
        if "position_ids" in self.inputs:
            given["position_ids"] = self._positions(call, past, start)
        if mask is not None:
            given["attention_mask"] = insert(mask, mask.new_ones(len(mask), count), start)
        if self.tell_layers:
            given[NOTE] = None if past else start
        if past:
            return given
        embedded = base.get_input_embeddings()(ids) if embedded is None else embedded
        prompt = self.prompt.to(embedded.dtype).expand(shape[0], -1, -1)
        given["input_ids"], given["inputs_embeds"] = None, insert(embedded, prompt, start)
        if (types := call.get("token_type_ids")) is not None:
            given["token_type_ids"] = insert(types, types.new_zeros(len(types), count), start)
        return given

    def _positions(self, call: Mapping[str, Any], past: int, start: Start) -> Tensor | None:
        positions, mask = call.get("position_ids"), call.get("attention_mask")
        if positions is None:
            if past and mask is None:
                return None  # the network counts the entries of the cache, and the prompt is among them
            if mask is None and self.padding is None:
                entries = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
                return torch.arange(entries.shape[1] + len(self.prompt), device=entries.device)[None]
            positions = counted_positions(call, padding=self.padding)
        if past:
            shifted: Tensor = positions + len(self.prompt)
            return shifted
        return shift_positions(positions, len(self.prompt), start, after_first=self.after_first)

    def _check_shapes(self, call: Mapping[str, Any]) -> None:
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if getattr(call.get("past_key_values"), "is_compileable", False):
            raise ValueError(
                f"{self.owner}: a cache of fixed size has no room for the prompt. Leave cache_implementation out."
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                f"{self.owner}: attention_mask must have the shape (batch, tokens); masks of other shapes leave no room "
                "for the prompt."
            )
        if positions is not None and positions.ndim != 2:
            raise ValueError(
                f"{self.owner}: position_ids must have the shape (batch, tokens), not {tuple(positions.shape)}."
            )

    @override
    def after(self, host: Any, kwargs: dict[str, Any], output: Any) -> Any:
        embedded, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if embedded is None or (cache is not None and cache.get_seq_length() > embedded.shape[1]):
            return output
        start = prompt_start(kwargs.get("attention_mask"), after_first=self.after_first)
        return strip_output(output, embedded.shape[1], len(self.prompt), start)

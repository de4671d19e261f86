"""KV prefixes: train keys and values that every layer's attention sees before those of the input.

``softmax(q [E; K]^T / sqrt(d)) [V_p; V]`` with ``E`` and ``V_p`` of shape ``(kv_heads, tokens, head_dim)`` in every layer.
Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.prefix_attention import PREFIX, capturing, check_plain, led_config, register, unled_config
from lightning_peft.adapters.prompt_hosts import (
    PromptHosts,
    PromptUpdate,
    attention_of,
    check_prompt,
    check_text,
    drawn_words,
    prompt_hosts,
    text_to_length,
)
from lightning_peft.adapters.prompt_positions import bound_call, check_length, counted_positions, past_length
from lightning_peft.adapters.switch import pretrained_eval
from lightning_peft.adapters.updates import master_dtype, place

SPREAD = 0.02


@dataclass(frozen=True, repr=False)
class KVPrefix(Adapter):
    """Trainable keys and values in every attention module, everything else frozen.

    The network is one of transformers, given as a whole, that looks up its attention in ``ALL_ATTENTION_FUNCTIONS`` and uses
    ``sdpa`` or ``eager``. Calls, masks, positions, caches and outputs stay as they are (``attentions`` show the prefix).

    **Two readings.** Where prefix tuning is written with trainable "E, V" per layer, this class reads keys and values.
    The other reading, trainable hidden states per layer, is :class:`~lightning_peft.DeepPrompt`.

    **The trap:** no prefix is neutral. Also one of zeros takes a part of every softmax. And frozen weights are no
    protection while the prefix is attached: measure forgetting with it and without it.

    In layers with a sliding window the prefix stays in sight from everywhere, which text in its place would not.

    Args:
        tokens: Number of prefix tokens.
        init: Where they start. ``"vocabulary"``: keys and values that the network has for tokens drawn at random, without padding;
            those of real words, whatever they say, learned better than random ones (section 7.4 there). ``"text"``: for
            ``text_ids``. A decoder then computes what it does with the text in front: with rotary positions always, with learned
            ones (GPT-2) with ``offset_positions``; in encoders the text would also look at the input, which a prefix cannot.
            ``"random"``: normal with a spread of 0.02, near the zero prefix, which learned better than a wide one in PEFT's
            published runs; exact zeros would stay equal to each other. Networks that read images have no vocabulary, and
            start so.
        text_ids: Token ids of a text, repeated or cut to ``tokens``.
        reparametrise: Width of a two-layer network that makes the prefix from one vector per token (section 4.3 there); it is
            drawn at random, whatever ``init`` says. Every layer has one of its own, not one for all, so that a layer can be
            computed again by itself (activation checkpointing).
        frozen_sink: Keep the first prefix token as it starts. In the text it is the token that attention falls back on;
            needs ``init="text"``.
        offset_positions: Count the input's positions from ``tokens`` on, as behind a text of that length. PEFT does, so
            its files are read so and need it; input and prefix then share the positions that the network has learned.
        seed: Seed of the draws; the global generators are not touched.

    Raises:
        ValueError: For a value out of range, here; if a network is not fit for it, when it is adapted.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from lightning_peft import add_adapter
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> net = add_adapter(LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)), KVPrefix(tokens=3))
    >>> [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.requires_grad]
    [('model.layers.0.self_attn.adapters.default.prefix', (2, 2, 3, 4))]
    """

    tokens: int = 20
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    text_ids: list[int] | tuple[int, ...] = ()
    reparametrise: int | None = None
    frozen_sink: bool = False
    offset_positions: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be known without a network."""
        super().__post_init__()
        object.__setattr__(self, "text_ids", tuple(self.text_ids))
        check_prompt("KVPrefix", self.tokens, self.init, ("vocabulary", "text", "random"), tuple(self.text_ids))
        width = self.reparametrise
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
            raise ValueError(f"KVPrefix: reparametrise={width!r} must be a whole number of at least 1, or None.")
        if width is not None and self.init == "text":
            raise ValueError("KVPrefix: reparametrise makes the prefix from a network, which cannot start at a text.")
        if self.frozen_sink and (self.init != "text" or self.tokens < 2):
            raise ValueError("KVPrefix: frozen_sink=True keeps a token of a text: it needs init='text' and two tokens.")

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        hosts, modules = self.select(model)
        starts = self.start_values(model, hosts, modules)
        register()
        if self.offset_positions:
            offset = PrefixPositions(self.tokens, hosts)
            place(hosts.base, name, offset)
            offset.attach_to(hosts.base)
        configs: dict[int, Any] = {}
        trained = []
        for depth, (module, start) in enumerate(zip(modules, starts, strict=True)):
            dtype = master_dtype(hosts.base.dtype)
            update = self._update(start, dtype, depth)
            key = place(module, name, update)
            found = unled_config(module.config)
            module.config = configs.setdefault(id(found), led_config(found, PREFIX))
            trained += [f"{hosts.name_of(module)}.{key}{parameter}" for parameter in update.trainable()]
        return trained

    @override
    def select(self, model: nn.Module) -> tuple[PromptHosts, list[nn.Module]]:
        """Return the attention modules of ``model``, with what else is known of it.

        Raises:
            ValueError: If the network is not fit for a prefix.
        """
        hosts = prompt_hosts(model, owner="KVPrefix")
        check_text("KVPrefix", tuple(self.text_ids), hosts.words)
        modules = attention_of(hosts, owner="KVPrefix")
        if self.offset_positions and "position_ids" not in hosts.inputs:
            raise ValueError(f"KVPrefix: {type(hosts.base).__name__} takes no position_ids: offset_positions=False.")
        for module in modules:
            check_plain(module)
            _prefix_shape(module)
        return hosts, modules

    def start_values(self, model: nn.Module, hosts: PromptHosts, modules: list[nn.Module]) -> list[Tensor]:
        """Return what the prefix starts as, one of shape ``(2, kv_heads, tokens, head_dim)`` for every module."""
        random, device = torch.Generator().manual_seed(self.seed), hosts.base.device
        ids = self._ids(hosts, random)
        if ids is not None and device.type != "meta":
            return self._read(model, hosts, modules, ids.to(device))
        shapes = [_prefix_shape(module) for module in modules]
        return [(SPREAD * torch.randn(2, kv, self.tokens, dim, generator=random)).to(device) for kv, dim in shapes]

    def _ids(self, hosts: PromptHosts, random: torch.Generator) -> Tensor | None:
        """Return the tokens that the prefix starts at, ``(tokens,)``; None for none."""
        if self.init == "text":
            return text_to_length(tuple(self.text_ids), self.tokens)
        if self.init == "random" or self.reparametrise is not None or hosts.words is None:
            return None
        return drawn_words(hosts.words, self.tokens, random)

    def _read(self, model: nn.Module, hosts: PromptHosts, modules: list[nn.Module], ids: Tensor) -> list[Tensor]:
        """Return keys and values that the attention modules have for tokens; more than there are positions are read in parts."""
        parts: list[dict[nn.Module, Tensor]] = []
        for part in torch.split(ids, hosts.max_length or self.tokens):
            call = {"input_ids": part[None], "attention_mask": torch.ones_like(part[None])}
            if hosts.positions is None and "position_ids" in hosts.inputs and not self.offset_positions:
                # Rotary positions only count distances: the text ends just before position 0.
                call["position_ids"] = torch.arange(-self.tokens, 0, device=part.device)[None]
            with pretrained_eval(model), capturing(modules) as captured:
                hosts.base(**call)
            parts.append(captured)
        return [torch.cat([captured[module] for captured in parts], 2) for module in modules]

    def _update(self, start: Tensor, dtype: torch.dtype, depth: int) -> PrefixUpdate:
        if self.reparametrise is not None:
            return MadePrefix(start, self.reparametrise, dtype=dtype, seed=self.seed + depth)
        return PrefixUpdate(start, dtype=dtype, frozen_sink=self.frozen_sink)


class PrefixUpdate(PromptUpdate):
    """The prefix of one attention module.

    Args:
        start: What it starts as, of shape ``(2, kv_heads, tokens, head_dim)``: keys, values.
        dtype: Dtype of the parameters.
        frozen_sink: Keep the first token apart, as a parameter that never trains.
    """

    prefix: nn.Parameter
    sink: nn.Parameter | None

    def __init__(self, start: Tensor, *, dtype: torch.dtype, frozen_sink: bool = False) -> None:
        super().__init__()
        values = start.detach().to(dtype, copy=True)
        self.register_parameter("sink", None)
        if frozen_sink:
            self.frozen = ("sink",)
            self.sink, values = nn.Parameter(values[:, :, :1].clone()), values[:, :, 1:].clone()
        self.prefix = nn.Parameter(values)

    def keys_and_values(self) -> Tensor:
        """Return the prefix, of shape ``(2, kv_heads, tokens, head_dim)``."""
        return self.prefix if self.sink is None else torch.cat([self.sink, self.prefix], 2)

    @override
    def detach_from(self, module: nn.Module) -> None:
        module.config = unled_config(module.config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Enter our functions into transformers' table of the process that reads a pickle."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register()


class MadePrefix(PrefixUpdate):
    """A prefix that a small network makes of one vector per token: ``W2 tanh(W1 e + b1) + b2``.

    Args:
        start: Gives the shape.
        width: Size of the vectors and of the hidden layer.
        dtype: Dtype of the parameters.
        seed: Seed of the draws.
    """

    def __init__(self, start: Tensor, width: int, *, dtype: torch.dtype, seed: int) -> None:
        super().__init__(start, dtype=dtype)
        del self.prefix
        two, heads, tokens, dim = start.shape
        self.shape = (tokens, two, heads, dim)
        random, bound = torch.Generator().manual_seed(seed), width**-0.5

        def drawn(*shape: int) -> nn.Parameter:  # as nn.Linear draws
            values = torch.rand(*shape, generator=random) * 2 * bound - bound
            return nn.Parameter(values.to(start.device, dtype))

        self.embedding = nn.Parameter(torch.randn(tokens, width, generator=random).to(start.device, dtype))
        self.hidden_weight, self.hidden_bias = drawn(width, width), drawn(width)
        self.output_weight, self.output_bias = drawn(two * heads * dim, width), drawn(two * heads * dim)

    @override
    def keys_and_values(self) -> Tensor:
        hidden = torch.tanh(F.linear(self.embedding, self.hidden_weight, self.hidden_bias))
        return F.linear(hidden, self.output_weight, self.output_bias).view(self.shape).permute(1, 2, 0, 3)


class PrefixPositions(PromptUpdate):
    """Counts a network's positions from behind the prefix on; it stands on the base model and has no parameters.

    Args:
        tokens: Length of the prefix.
        hosts: The network.
    """

    def __init__(self, tokens: int, hosts: PromptHosts) -> None:
        super().__init__()
        self.tokens, self.inputs, self.padding = tokens, hosts.inputs, hosts.counts_from
        self.max_length = hosts.max_length

    @override
    def before(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = bound_call(self.inputs, args, kwargs)
        entries = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        if entries is None:
            return None  # the network itself says what is wrong
        positions, mask = call.get("position_ids"), call.get("attention_mask")
        if positions is None and mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("KVPrefix: give position_ids along with a mask that is not of the shape (batch, tokens).")
        length = past_length(call) + entries.shape[1] + self.tokens
        check_length(length, self.tokens, self.max_length, owner="KVPrefix", kind="prefix")
        positions = counted_positions(call, padding=self.padding) if positions is None else positions
        return (), {**call, "position_ids": positions + self.tokens}


def _prefix_shape(module: Any) -> tuple[int, int]:
    """Return the number of key-value heads and their size.

    Raises:
        ValueError: If keys and values have different sizes, or it cannot be told.
    """
    config, kind = module.config, type(module).__name__
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"KVPrefix: {kind} compresses its keys and values, so that they have different sizes.")
    heads = config.num_attention_heads
    told = (getattr(module, name, None) for name in ("head_dim", "attention_head_size", "key_value_proj_dim"))
    dim = next(filter(None, told), None) or config.hidden_size // heads
    groups = getattr(module, "num_key_value_groups", None)
    if not isinstance(heads, int) or not isinstance(dim, int):
        raise ValueError(f"KVPrefix: the heads of {kind} have no one size: num_attention_heads={heads!r}.")
    return (heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads), dim

"""Deep prompts: train the hidden states of virtual tokens at the input of every layer.

``[_, h_l] = Layer_l([P_{l-1}, h_{l-1}])`` with ``P_l`` of shape ``(tokens, dim)``: what a layer made of its prompt is thrown away.
Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119, section 3.2 ("VPT-Deep"); Liu et al. 2021, "P-Tuning v2",
arXiv:2110.07602.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.image_prompt import image_prompt
from lightning_peft.adapters.prompt_hosts import PromptHosts, PromptUpdate, layers_of
from lightning_peft.adapters.prompt_insertion import Start, replace
from lightning_peft.adapters.soft_prompt import NOTE, SoftPrompt
from lightning_peft.adapters.switch import pretrained_eval
from lightning_peft.adapters.updates import master_dtype, place


@dataclass(frozen=True, repr=False)
class DeepPrompt(SoftPrompt):
    """Trainable vectors before the embedded input and, at every later layer, in the place of what became of them.

    Everything that :class:`~lightning_peft.SoftPrompt` says holds, its trap too. On text, the prompts of the later layers
    start as the hidden states that the first one has there when the network reads nothing else: a decoder computes at
    first exactly what it does with the soft prompt. For images they are drawn.

    Text that follows attends to the prompt by the layer's own projections of ``P_l``; ``KVPrefix`` trains the keys and values
    themselves, which costs no additional rows in the layers.

    Args:
        tokens: Number of virtual tokens, in every layer.
        init: Where those of the first layer start, see :class:`~lightning_peft.SoftPrompt`.
        text_ids: Token ids of a text, repeated or cut to ``tokens``.
        after_first: Put the prompt behind the first token.
        seed: Seed of the draws.

    Raises:
        ValueError: As :class:`~lightning_peft.SoftPrompt`, and for networks without a list of layers.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from lightning_peft import add_adapter
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    >>> net = add_adapter(LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)), DeepPrompt(tokens=3))
    >>> [name for name, p in net.named_parameters() if p.requires_grad]
    ['model.layers.1.adapters.default.prompt', 'model.adapters.default.prompt']
    """

    @override
    def select(self, model: nn.Module) -> PromptHosts:
        hosts, owner = super().select(model), type(self).__name__
        layers_of(hosts, owner=owner)
        kinds = {parameter.kind for parameter in inspect.signature(type(hosts.base).forward).parameters.values()}
        if hosts.words is not None and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(
                f"{owner}: {type(hosts.base).__name__} hands no keywords on to its layers. Take SoftPrompt."
            )
        return hosts

    @override
    def insert(self, model: nn.Module, name: str) -> list[str]:
        hosts = self.select(model)
        layers = layers_of(hosts, owner=type(self).__name__)
        prompt = self.start_values(model, hosts)
        deep = self._deep_values(model, hosts, layers, prompt)
        trained = self.place_prompt(hosts, name, prompt, tell_layers=True)
        start = int(self.after_first is not False) if hosts.words is None else None
        for layer, values in zip(layers, [None, *deep], strict=True):
            update = LayerPrompt(values, dtype=hosts.base.dtype, start=start)
            key = place(layer, name, update)
            update.attach_to(layer)
            trained += [f"{hosts.name_of(layer)}.{key}{parameter}" for parameter in update.trainable()]
        return trained

    def _deep_values(
        self, model: nn.Module, hosts: PromptHosts, layers: list[nn.Module], prompt: Tensor
    ) -> list[Tensor]:
        if hosts.words is None:
            random = torch.Generator().manual_seed(self.seed + 1)
            return [image_prompt(hosts, self.tokens, random) for _ in layers[1:]]
        if prompt.is_meta:
            return [torch.empty_like(prompt) for _ in layers[1:]]
        seen: list[Tensor] = []

        def see(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            take_note(kwargs)
            seen.append((args[0] if args else kwargs["hidden_states"])[0].detach())
            return args, kwargs

        handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
        try:
            with pretrained_eval(model):
                hosts.base(inputs_embeds=prompt[None].to(hosts.base.dtype), **{NOTE: 0})
        finally:
            for handle in handles:
                handle.remove()
        return seen[1:]


class LayerPrompt(PromptUpdate):
    """The prompt of one layer; it stands on the layer.

    Args:
        prompt: What it starts as, of shape ``(tokens, dim)``; None for the first layer, where the base model brings it.
        dtype: Dtype of the network.
        start: Where it stands in every row; None: the layer hears it.
    """

    prompt: nn.Parameter | None

    def __init__(self, prompt: Tensor | None, *, dtype: torch.dtype, start: int | None) -> None:
        super().__init__()
        values = None if prompt is None else nn.Parameter(prompt.detach().to(master_dtype(dtype), copy=True))
        self.register_parameter("prompt", values)
        self.start = start

    @override
    def before(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Everything is known from the arguments: activation checkpointing may run the layer again much later.
        start = take_note(kwargs) if self.start is None else self.start
        if start is None or self.prompt is None:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = replace(hidden, self.prompt.to(hidden.dtype), start)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def take_note(kwargs: dict[str, Any]) -> Start | None:
    """Take the keyword of a layer that says where the prompt stands; None if it does not in this call.

    Raises:
        ValueError: If it is not there.
    """
    if NOTE not in kwargs:
        raise ValueError("DeepPrompt: the network does not hand keywords on to its layers. Take SoftPrompt.")
    found: Start | None = kwargs.pop(NOTE)
    return found

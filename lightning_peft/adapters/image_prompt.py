"""Prompts among the patches of an image: put in where they are embedded, taken out of what the network returns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.prompt_hosts import PromptHosts, PromptUpdate
from lightning_peft.adapters.prompt_insertion import insert, strip_output
from lightning_peft.adapters.updates import master_dtype, place


def place_image_prompt(hosts: PromptHosts, name: str, prompt: Tensor, *, after_first: bool) -> str:
    """Put a prompt, of shape ``(tokens, dim)``, among the patches; return the name of its parameter."""
    base = hosts.base
    image = ImagePrompt(prompt, dtype=base.dtype, after_first=after_first)
    key = place(base.embeddings, name, image)
    image.attach_to(base.embeddings)
    taken = ImageStrip(len(prompt), after_first=after_first)
    place(base, name, taken)
    taken.attach_to(base)
    return f"{hosts.name_of(base.embeddings)}.{key}prompt"


class ImagePrompt(PromptUpdate):
    """A prompt among embedded patches; it stands on the module that embeds them."""

    def __init__(self, prompt: Tensor, *, dtype: torch.dtype, after_first: bool) -> None:
        super().__init__()
        self.prompt = nn.Parameter(prompt.detach().to(master_dtype(dtype), copy=True))
        self.after_first = after_first

    @override
    def after(self, host: Any, kwargs: dict[str, Any], output: Any) -> Any:
        prompt = self.prompt.to(output.dtype).expand(len(output), -1, -1)
        return insert(output, prompt, int(self.after_first))


class ImageStrip(PromptUpdate):
    """Takes the prompt out again; it stands on the base model and has no parameters."""

    def __init__(self, tokens: int, *, after_first: bool) -> None:
        super().__init__()
        self.tokens, self.after_first = tokens, after_first

    @override
    def after(self, host: Any, kwargs: dict[str, Any], output: Any) -> Any:
        length = (output[0] if isinstance(output, tuple) else output.last_hidden_state).shape[1]
        return strip_output(output, length, self.tokens, int(self.after_first))


def image_prompt(hosts: PromptHosts, tokens: int, random: torch.Generator) -> Tensor:
    """Draw ``U(-v, v)`` with ``v^2 = 6 / (inputs of a patch + dim)``, as VPT does; of shape ``(tokens, dim)``."""
    config = hosts.base.config
    patch = config.num_channels * config.patch_size**2
    bound = math.sqrt(6 / (patch + config.hidden_size))
    drawn = torch.rand(tokens, config.hidden_size, generator=random) * 2 * bound - bound
    return drawn.to(hosts.base.device)


def check_images(hosts: PromptHosts, owner: str) -> None:
    """Check that a network which reads images has a place for a prompt.

    Raises:
        ValueError: If it is no plain vision transformer.
    """
    embeddings, config = getattr(hosts.base, "embeddings", None), hosts.base.config
    square = all(isinstance(getattr(config, name, None), int) for name in ("patch_size", "num_channels", "hidden_size"))
    known = any(hasattr(embeddings, name) for name in ("cls_token", "class_embedding"))
    if (
        not square
        or not known
        or hasattr(config, "window_size")
        or getattr(config, "use_relative_position_bias", False)
    ):
        raise ValueError(
            f"{owner}: {type(hosts.base).__name__} is no network of tokens, and no plain vision transformer with a class token "
            "and square patches either: there is no place for a prompt."
        )

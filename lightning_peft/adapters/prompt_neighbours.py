"""Read a trained soft prompt: the words of the vocabulary that its vectors have come to lie near.

``cos(p, e) = p e / (|p| |e|)`` for each vector ``p`` of the prompt and each embedding ``e`` of the vocabulary.
Lester et al. 2021, arXiv:2104.08691, section 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from lightning_peft.adapters.image_prompt import ImagePrompt
from lightning_peft.adapters.soft_prompt import TextPrompt
from lightning_peft.adapters.updates import Updates, hosts, master_dtype, updates_of

CHUNK = 2**22
"""How many numbers of the vocabulary's embeddings there are at once in float32: 16 MiB."""


@dataclass(frozen=True)
class VirtualToken:
    """One vector of a prompt, and what lies near it.

    Args:
        position: Its place in the prompt, counted from 0.
        tokens: The nearest tokens of the vocabulary, the nearest one first, as text.
        ids: Their ids.
        similarities: How near they are.
    """

    position: int
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    similarities: tuple[float, ...]


class NearestTokens(list[VirtualToken]):
    """The vectors of a prompt in their order; as text it is a table."""

    def __str__(self) -> str:
        cells = [
            [f"{token!r} {value:.3f}" for token, value in zip(one.tokens, one.similarities, strict=True)]
            for one in self
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            f"{one.position:>8}  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for one, row in zip(self, cells, strict=True)
        ]
        return "\n".join(["position  nearest tokens", *(line.rstrip() for line in lines)])


def nearest_tokens(
    model: nn.Module,
    tokenizer: Any,
    k: int = 5,
    *,
    adapter: str | None = None,
    similarity: Literal["cosine", "dot"] = "cosine",
) -> NearestTokens:
    """Return, for each vector of a soft prompt, the tokens of the vocabulary that are most similar to it.

    The embeddings are looked up piece by piece, as the network itself does, so that a large vocabulary needs no second copy.

    **The trap:** a neighbour is not a meaning. Most prompts that work lie near no sentence that anybody would write, a
    prompt that started at tokens of the vocabulary often still has them nearest, and other prompts read quite differently
    and do as well. The similarity says how much to think of a neighbour.

    Args:
        model: A network with a :class:`~lightning_peft.SoftPrompt`, or a module with one such network inside. Of a
            :class:`~lightning_peft.DeepPrompt` the vectors at the input are read.
        tokenizer: The network's. Rows of the embedding that it has no token for are shown by their number.
        k: How many tokens for each vector.
        adapter: Name of the adapter; None: the one that acts, or the only soft prompt.
        similarity: ``"cosine"``, or ``"dot"``, where long embeddings come first.

    Raises:
        ValueError: If there is no soft prompt in the network, none of that name, or several to choose from; if ``k`` is less
            than 1 or more than the vocabulary; if ``similarity`` is unknown; if the embeddings are on ``meta`` or sharded.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from lightning_peft import SoftPrompt, add_adapter
    >>> _ = torch.manual_seed(0)
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> net = LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes))
    >>> net = add_adapter(net, SoftPrompt(tokens=2, init="text", text_ids=[3, 1]))
    >>> class Words:
    ...     def convert_ids_to_tokens(self, id):
    ...         return ["a", "film", "great", "joy"][id]
    ...     def decode(self, ids):
    ...         return self.convert_ids_to_tokens(*ids)
    >>> print(nearest_tokens(net, Words(), k=1))
    position  nearest tokens
           0  'joy' 1.000
           1  'film' 1.000
    """
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"nearest_tokens: similarity={similarity!r} must be 'cosine' or 'dot'.")
    words, prompt = _find(model, adapter)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= words.num_embeddings:
        raise ValueError(
            f"nearest_tokens: k={k!r} must be a whole number from 1 to {words.num_embeddings}, the size of the vocabulary."
        )
    if words.weight.is_meta or hasattr(words.weight, "device_mesh"):
        raise ValueError("nearest_tokens: the embeddings are not here (on meta, or sharded). Load the network whole.")
    with torch.no_grad(), _without_updates(words):
        values, ids = _most_similar(prompt, words, k, cosine=similarity == "cosine")
    return NearestTokens(
        VirtualToken(position, tuple(_text(tokenizer, token) for token in near), tuple(near), tuple(told))
        for position, (near, told) in enumerate(zip(ids.tolist(), values.tolist(), strict=True))
    )


def _find(model: nn.Module, name: str | None) -> tuple[Any, Tensor]:
    """Return the token embedding of the network with the prompt, and the prompt, ``(tokens, dim)``."""
    found = [(host, held) for _, host, held in hosts(model) if _prompts(held, TextPrompt)]
    if not found:
        if any(_prompts(held, ImagePrompt) for _, _, held in hosts(model)):
            raise ValueError(
                f"nearest_tokens: this {type(model).__name__} reads images, and its prompt is near no words."
            )
        raise ValueError(
            f"nearest_tokens: this {type(model).__name__} carries no soft prompt. add_adapter(model, SoftPrompt()) puts one on."
        )
    if len(found) > 1:
        raise ValueError(
            f"nearest_tokens: {len(found)} networks in this {type(model).__name__} carry soft prompts. Pass one of them."
        )
    host, held = found[0]
    prompts = _prompts(held, TextPrompt)
    if name is None:
        name = held.active if held.active in prompts or len(prompts) > 1 else min(prompts)
    if name not in prompts:
        which = "none acts" if name is None else f"{name!r} is none of them"
        raise ValueError(
            f"nearest_tokens: of the soft prompts {sorted(prompts)} {which}. Name one, as in adapter={min(prompts)!r}."
        )
    base: Any = host
    return base.get_input_embeddings(), prompts[name].prompt


def _prompts(held: Updates, kind: type) -> dict[str, Any]:
    return {name: update for name, update in held.items() if isinstance(update, kind)}


@contextmanager
def _without_updates(module: nn.Module) -> Iterator[None]:
    """Let a module be as it is while the prompt acts, also where another adapter acts now and changes it."""
    updates = updates_of(module)
    was = updates.enabled if updates is not None else False
    try:
        if updates is not None:
            updates.enabled = False
        yield
    finally:
        if updates is not None:
            updates.enabled = was


def _most_similar(prompt: Tensor, words: Any, k: int, *, cosine: bool) -> tuple[Tensor, Tensor]:
    """Return similarities and ids, ``(tokens, k)`` each, the most similar first; of equals the lower id."""
    device, dtype = words.weight.device, master_dtype(prompt.dtype)
    wanted = prompt.to(device, dtype)
    wanted = F.normalize(wanted, dim=1) if cosine else wanted
    values, ids = wanted.new_empty(len(wanted), 0), torch.empty(len(wanted), 0, dtype=torch.long, device=device)
    size = max(1, CHUNK // wanted.shape[1])
    for start in range(0, words.num_embeddings, size):
        rows = torch.arange(start, min(start + size, words.num_embeddings), device=device)
        known = words(rows).to(dtype)  # the module and not its weight: some scale what they look up
        found = wanted @ (F.normalize(known, dim=1) if cosine else known).T
        values, order = torch.cat([values, found], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, rows.expand(len(wanted), -1)], 1).gather(1, order)[:, :k]
        values = values[:, :k]
    return values, ids


def _text(tokenizer: Any, token: int) -> str:
    """Return a token as text: decoded, or, where that would lose something, as it stands in the vocabulary."""
    try:
        entry: str | None = tokenizer.convert_ids_to_tokens(token)
    except IndexError:  # SentencePiece
        entry = None
    if entry is None:
        return f"[{token}]"
    text: str = tokenizer.decode([token])
    # Half a letter; or a mark of where a word begins or goes on, which decoding takes away.
    kept = not text or "\ufffd" in text or entry.startswith(("▁", "##"))
    return entry if kept else text

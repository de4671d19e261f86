"""Small transformers networks of every family that prompts are tried on, and what they are called with."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

VOCABULARY, DIM, LAYERS, TOKENS = 50, 16, 3, 3
DECODERS = ("llama", "qwen2", "gpt2", "mistral")
ENCODERS = ("bert", "roberta", "distilbert")
TEXT = DECODERS + ENCODERS
FAMILIES = (*TEXT, "vit")
PAD = 1
"""Padding token of every family: RoBERTa's own, and no position of any other one follows from it."""


def config(family: str) -> Any:
    import transformers as hf

    wide = {"initializer_range": 0.3, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": DIM}
    words = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": None}
    llama = {**wide, **words, "intermediate_size": 24, "num_key_value_heads": 2}
    bert = {**wide, **words, "intermediate_size": 24, "max_position_embeddings": 30}
    gpt2 = {"n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 30, "initializer_range": 0.3}
    distilbert = {"dim": DIM, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 24, "initializer_range": 0.3}
    return {
        "llama": lambda: hf.LlamaConfig(**llama),
        "qwen2": lambda: hf.Qwen2Config(**llama),
        "mistral": lambda: hf.MistralConfig(**llama, sliding_window=4),
        "gpt2": lambda: hf.GPT2Config(**gpt2, **words),
        "bert": lambda: hf.BertConfig(**bert),
        "roberta": lambda: hf.RobertaConfig(**bert),
        "distilbert": lambda: hf.DistilBertConfig(**distilbert, vocab_size=VOCABULARY, max_position_embeddings=30),
        "vit": lambda: hf.ViTConfig(**wide, intermediate_size=24, image_size=8, patch_size=4),
    }[family]()


@cache
def _pretrained(family: str, head: bool, attention: str) -> Any:
    import transformers as hf

    name = {"qwen2": "Qwen2", "gpt2": "GPT2", "distilbert": "DistilBert", "vit": "ViT", "roberta": "Roberta"}.get(
        family, family.capitalize()
    )
    kind = "Model" if not head else "ForCausalLM" if family in DECODERS else "ForSequenceClassification"
    kind = {"GPT2ForCausalLM": "GPT2LMHeadModel", "ViTForSequenceClassification": "ViTForImageClassification"}.get(
        name + kind, name + kind
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        found = config(family)
        found._attn_implementation = attention
        return getattr(hf, kind)(found).double().eval()


def network(family: str, *, head: bool = True, attention: str = "sdpa") -> Any:
    """A network in float64 and eval mode, the same at every call, with or without a head."""
    return copy.deepcopy(_pretrained(family, head, attention))


IDS = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
LENGTHS = (3, 6, 5)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths in one batch: ids and mask."""
    at = torch.arange(IDS.shape[1])[None]
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = at >= IDS.shape[1] - lengths if side == "left" else at < lengths
    return torch.where(mask, IDS, PAD), mask.long()


def call(family: str, **more: Any) -> dict[str, torch.Tensor]:
    """What a network of the family is called with."""
    if family == "vit":
        random = torch.Generator().manual_seed(2)
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=random, dtype=torch.float64), **more}
    return {"input_ids": IDS, **more}


def labels(family: str) -> torch.Tensor:
    return IDS if family in DECODERS else torch.tensor([0, 1, 1])


def answer(model: nn.Module, **given: Any) -> torch.Tensor:
    """What a network says: its logits, without a head its last hidden state."""
    found = model(**given)
    return found.logits if "logits" in found else found.last_hidden_state


def hooks(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=1e-10)


def far(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-2)


def trains(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module, **given: Any) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    answer(model, **given).square().sum().backward()
    return {name: parameter.grad for name, parameter in trains(model).items()}

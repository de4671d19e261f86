"""Tiny random language models and a small byte-level tokenizer, for fast tests."""

import copy
import itertools
from collections.abc import Sequence
from functools import cache

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

TEXT = [
    "Review: a dull film, not worth the time.\nSentiment: negative",
    "Review: a joy from start to end.\nSentiment: positive",
    "Judge the review. It was terrible. It was great.\n\n",
]
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def tokenizer(*, chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    special = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<s>", "<mask>"]
    trained.train_from_iterator(TEXT * 3, vocab_size=360, show_progress=False, special_tokens=special)
    made = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>", mask_token="<mask>")
    made.pad_token = "<|end|>"
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 4)])
    if chat:
        made.chat_template = CHAT
    return made


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**sizes(), intermediate_size=32, num_key_value_heads=1))


def writer(pieces: Sequence[str]) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A Llama whose weights make it answer every chat with these pieces, one token each, and end there; and its tokenizer."""
    tokens = copy.deepcopy(tokenizer(chat=True))
    tokens.add_tokens(list(pieces))
    chain = tokens.convert_tokens_to_ids(["<|assistant|>", *pieces, "<|end|>"])
    size = 2 * (max(len(tokens), *chain) // 2 + 1)
    options = {"hidden_size": size, "vocab_size": size, "max_position_embeddings": 8192, "eos_token_id": chain[-1]}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes(), "num_hidden_layers": 1, **options}, intermediate_size=8))
    with torch.no_grad():
        for parameter in [*model.model.layers.parameters(), model.lm_head.weight]:
            parameter.zero_()  # nothing reaches a token from others,
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for one, following in itertools.pairwise(chain):
            model.lm_head.weight[following, one] = 1.0  # and what follows is what stands in this table
    return model.eval(), tokens


def mistral() -> torch.nn.Module:
    return MistralForCausalLM(MistralConfig(**sizes(), intermediate_size=32, num_key_value_heads=1, sliding_window=8))


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=512, n_embd=16, n_layer=2, n_head=2))


def bert() -> torch.nn.Module:
    return BertForMaskedLM(BertConfig(**sizes(), intermediate_size=32))


def sizes() -> dict[str, int]:
    return {
        "vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip


CAUSAL = {"llama": llama, "mistral": mistral, "gpt2": gpt2}

"""Soft prompts: the formula by hand, PEFT as the oracle where it is right, and the places a prompt starts at."""

import pytest
import torch
from torch import nn

from lightning_peft import SoftPrompt, adapter_disabled, adapter_state_dict, add_adapter
from lightning_peft.adapters.image_prompt import ImagePrompt
from lightning_peft.adapters.prompt_insertion import strip_output
from tests.adapters.prompt_nets import (
    DECODERS,
    DIM,
    IDS,
    LENGTHS,
    PAD,
    TEXT,
    TOKENS,
    VOCABULARY,
    PromptLaws,
    answer,
    call,
    close,
    far,
    network,
    padded,
    refuses,
)
from tests.adapters.zoo import stir


class TestSoftPrompt(PromptLaws):
    method = SoftPrompt(tokens=TOKENS)


def prompted(family: str, method: SoftPrompt | None = None, **options) -> tuple[nn.Module, torch.Tensor]:
    """A network with a moved prompt, and the prompt."""
    model = stir(add_adapter(network(family, **options), method or SoftPrompt(tokens=TOKENS)))
    (prompt,) = adapter_state_dict(model).values()
    return model, prompt


def in_front(entries: torch.Tensor, block: torch.Tensor, at: int = 0) -> torch.Tensor:
    return torch.cat([entries[:, :at], block.expand(len(entries), *block.shape), entries[:, at:]], 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TEXT)
def test_it_is_the_network_fed_with_the_prompt_and_the_embedded_ids(family, attention):
    # Eager softmax is of float32, where the smallest float64 of a mask is minus infinity and a row of padding not a number.
    model, prompt = prompted(family, head=False, attention=attention)
    model.float()
    ids, mask = (IDS, torch.ones_like(IDS)) if family == "mistral" else padded("left")  # a window would see the padding
    base, seen = network(family, head=False, attention=attention).float(), in_front(mask, mask.new_ones(TOKENS))
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    expected = base(
        inputs_embeds=in_front(base.get_input_embeddings()(ids), prompt.float()),
        attention_mask=seen,
        position_ids=positions + PAD + 1 if family == "roberta" else positions,
        output_hidden_states=True,
    )
    found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(ours[mask.bool()], theirs[:, TOKENS:][mask.bool()], rtol=0, atol=1e-4)
    assert torch.equal(found[0], found.hidden_states[-1]) or family == "gpt2"


@pytest.mark.parametrize("after_first", [None, True, False])
def test_in_an_image_it_stands_behind_the_class_token_unless_told(after_first):
    model, prompt = prompted("vit", SoftPrompt(tokens=TOKENS, after_first=after_first), head=False)
    base, at = network("vit", head=False), int(after_first is not False)
    hidden = in_front(base.embeddings(**call("vit")), prompt, at)
    for layer in next(module for module in base.modules() if isinstance(module, nn.ModuleList)):
        hidden = layer(hidden)
    expected = base.layernorm(hidden)
    assert close(model(**call("vit")).last_hidden_state, torch.cat([expected[:, :at], expected[:, at + TOKENS :]], 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_behind_the_first_token_a_pooler_reads_that_token(side):
    model, prompt = prompted("bert", SoftPrompt(tokens=TOKENS, after_first=True), head=False)
    base, (ids, mask) = network("bert", head=False), padded(side)
    for row, real in enumerate(mask.bool()):
        words = base.get_input_embeddings()(ids[row][real][None])
        expected = base(inputs_embeds=in_front(words, prompt, 1))
        alone = model(input_ids=ids[row][real][None])
        assert close(alone.pooler_output, expected.pooler_output)
        stripped = torch.cat([expected[0][:, :1], expected[0][:, 1 + TOKENS :]], 1)
        assert close(alone[0], stripped)
        assert close(model(input_ids=ids, attention_mask=mask)[0][row][real], stripped[0])


@pytest.mark.parametrize("family", TEXT)
def test_embeddings_and_positional_arguments_are_inputs_too(family):
    model, _ = prompted(family, head=False)
    expected, mask = answer(model, input_ids=IDS), torch.ones_like(IDS)
    assert torch.equal(model(IDS)[0], expected)
    second = (None, mask) if family == "gpt2" else (mask,)
    assert close(model(IDS, *second)[0], expected)
    assert close(model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=mask)[0], expected)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds|inputs_embeds"):
        model(attention_mask=mask)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_starts_from_embeddings_too(family):
    model, _ = prompted(family)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD, "attention_mask": torch.ones_like(IDS)}
    words = model.get_input_embeddings()(IDS)
    assert torch.equal(
        model.generate(inputs_embeds=words, **options), model.generate(input_ids=IDS, **options)[:, IDS.shape[1] :]
    )


def test_positions_of_the_caller_are_kept_and_the_prompt_takes_those_between():
    model, prompt = prompted("gpt2")
    positions = torch.arange(4, 4 + IDS.shape[1])[None]
    base = network("gpt2")
    expected = answer(
        base,
        inputs_embeds=in_front(base.get_input_embeddings()(IDS), prompt),
        position_ids=torch.arange(4, 4 + TOKENS + IDS.shape[1])[None],
    )
    assert close(answer(model, input_ids=IDS, position_ids=positions), expected[:, TOKENS:])


def test_kinds_of_tokens_are_lengthened_by_the_first_kind():
    model, prompt = prompted("bert", head=False)
    base, kinds = network("bert", head=False), (IDS > 20).long()
    words = in_front(base.get_input_embeddings()(IDS), prompt)
    expected = base(inputs_embeds=words, token_type_ids=in_front(kinds, kinds.new_zeros(TOKENS)))[0]
    assert close(model(input_ids=IDS, token_type_ids=kinds)[0], expected[:, TOKENS:])
    assert far(model(input_ids=IDS)[0], expected[:, TOKENS:])


def peft_prompt(family: str, prompt: torch.Tensor) -> nn.Module:
    import peft

    theirs = peft.get_peft_model(
        network(family), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    )
    theirs.prompt_encoder["default"].double().embedding.weight.data.copy_(prompt)
    return theirs.eval()


@pytest.mark.parametrize("family", DECODERS)
def test_peft_agrees_without_padding(family):
    model, prompt = prompted(family)
    theirs = peft_prompt(family, prompt)(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert close(answer(model, input_ids=IDS), theirs[:, TOKENS:])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_on_the_left_is_where_peft_is_wrong(family):
    model, prompt = prompted(family)
    theirs, (ids, mask) = peft_prompt(family, prompt), padded("left")
    alone = IDS[:1, -LENGTHS[0] :]

    def last(net: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return answer(net, input_ids=ids, attention_mask=mask)[0, -1]

    expected = last(theirs, alone, torch.ones_like(alone))
    assert close(last(model, ids, mask), expected)
    assert far(last(theirs, ids, mask), expected)


def start(family: str, **options) -> torch.Tensor:
    (found,) = adapter_state_dict(add_adapter(network(family), SoftPrompt(**options))).values()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_it_starts_at_real_tokens_of_the_vocabulary(family):
    words, drawn = network(family).get_input_embeddings().weight, torch.cat([start(family, seed=s) for s in range(6)])
    found = torch.cdist(drawn, words).argmin(1)
    assert torch.equal(words[found], drawn)
    assert len(found.unique()) > 0.8 * VOCABULARY
    assert words[PAD].any() or PAD not in found  # a row of zeros, kept for padding, is no start


@pytest.mark.parametrize("text", [[5, 6], [5, 6, 7, 8, 9]])
def test_it_starts_at_a_text_repeated_or_cut(text):
    words = network("llama").get_input_embeddings().weight
    expected = words[torch.tensor((text * 2)[:TOKENS])]
    assert torch.equal(start("llama", tokens=TOKENS, init="text", text_ids=text), expected)


def test_it_starts_at_random_as_wide_as_the_embeddings():
    wide = network("llama").get_input_embeddings().weight.std()
    found = start("llama", tokens=400, init="random")
    assert abs(found.std() / wide - 1) < 0.05
    assert abs(found.mean()) < 0.05 * wide


def test_images_start_as_in_visual_prompt_tuning():
    bound = (6 / (3 * 4**2 + DIM)) ** 0.5
    found = start("vit", tokens=400)
    assert found.abs().max() <= bound
    assert abs(found.std() / (bound / 3**0.5) - 1) < 0.05


def test_an_embedding_that_scales_is_asked_and_not_its_weight():
    import transformers as hf

    sizes = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = hf.Gemma3TextModel(hf.Gemma3TextConfig(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=4, **sizes))
    ids = (5, 6, 7)
    model = add_adapter(base.eval(), SoftPrompt(tokens=3, init="text", text_ids=ids))
    with adapter_disabled(model):
        expected = model(input_ids=torch.tensor([[*ids, *IDS[0]]]))[0][:, 3:]
    assert torch.allclose(model(input_ids=IDS[:1])[0], expected, rtol=0, atol=1e-5)


def test_a_head_that_passes_its_base_model_by_is_reached():
    import transformers as hf

    sizes = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 50}
    config = hf.OPTConfig(**sizes, word_embed_proj_dim=DIM, max_position_embeddings=12, init_std=0.3)
    base = hf.OPTForCausalLM(config).double().eval()
    model = stir(add_adapter(base, SoftPrompt(tokens=6)))
    after = answer(model, input_ids=IDS)
    with adapter_disabled(model):
        assert far(after, answer(model, input_ids=IDS))
    with pytest.raises(ValueError, match="learned 12 positions"):
        model(input_ids=torch.cat([IDS, IDS], 1))


def test_an_encoder_inside_that_reads_no_input_is_no_base_model():
    import transformers as hf

    sizes = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=8, patch_size=4)).double().eval()
    before = answer(model, **call("vit"))
    assert far(answer(stir(add_adapter(model, SoftPrompt(tokens=3))), **call("vit")), before)


def test_an_input_may_fill_all_learned_positions_and_no_more():
    model = add_adapter(network("gpt2"), SoftPrompt(tokens=10))
    assert answer(model, input_ids=IDS[:1].repeat(1, 4)[:, :20]).shape == (1, 20, VOCABULARY)
    with pytest.raises(ValueError, match="prompt of 10 tokens have 31 .* 30 positions. Shorten the input to 20 tokens"):
        answer(model, input_ids=IDS[:1].repeat(1, 4)[:, :21])
    options = {"do_sample": False, "pad_token_id": PAD, "attention_mask": torch.ones(1, 18, dtype=torch.long)}
    with pytest.raises(ValueError, match="have 31 together"):
        model.generate(input_ids=IDS[:1].repeat(1, 3), max_new_tokens=5, **options)


def test_only_states_of_the_lengthened_input_are_cut():
    states, other, pooled = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(2, 4)
    found = strip_output((states, pooled, (states, other)), 5, 2, 0)
    assert torch.equal(found[0], states[:, 2:])
    assert found[1] is pooled
    assert found[2][1] is other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"attention_mask": torch.ones(3, 1, 6, 6)},
            r"SoftPrompt: attention_mask must have the shape \(batch, tokens\)",
        ),
        ({"attention_mask": {"full": torch.ones(3, 6)}}, r"attention_mask must have the shape \(batch, tokens\)"),
        ({"position_ids": torch.ones(3, 3, 6)}, r"position_ids must have the shape .*, not \(3, 3, 6\)"),
    ],
)
def test_a_call_without_room_for_the_prompt_is_refused(given, message):
    model, _ = prompted("llama")
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, **given)


def test_a_cache_of_fixed_size_is_refused():
    model, _ = prompted("llama")
    with pytest.raises(ValueError, match="a cache of fixed size has no room"):
        model.generate(input_ids=IDS, max_new_tokens=2, cache_implementation="static", pad_token_id=PAD)


def test_no_weights_compute_a_prompt():
    with pytest.raises(ValueError, match="a prompt is no change of weights: ImagePrompt cannot be merged"):
        ImagePrompt(torch.zeros(2, 4), dtype=torch.float32, after_first=True).merged_values(None)


SIZES = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def other_network(kind: str) -> nn.Module:
    import transformers as hf

    t5 = {"d_model": DIM, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    swin = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
    text, vision = {**SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}, {"image_size": 8, "patch_size": 4}
    return {
        "linear": lambda: nn.Linear(2, 2),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "cross": lambda: hf.BertModel(hf.BertConfig(vocab_size=50, is_decoder=True, add_cross_attention=True, **SIZES)),
        "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**SIZES, **vision})),
        "clip text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**text)),
        "canine": lambda: hf.CanineModel(hf.CanineConfig(**SIZES)),
        "sound": lambda: hf.ASTModel(hf.ASTConfig(**SIZES, max_length=32, num_mel_bins=16)),
        "swin": lambda: hf.SwinModel(hf.SwinConfig(**swin)),
        "mamba": lambda: hf.MambaModel(hf.MambaConfig(hidden_size=DIM, num_hidden_layers=1, vocab_size=50)),
        "llama": lambda: network("llama"),
        "gpt2": lambda: network("gpt2"),
        "vit": lambda: network("vit"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("linear", {}, "SoftPrompt: this Linear is no transformers network"),
        ("t5", {}, "T5ForConditionalGeneration is an encoder with a decoder"),
        ("cross", {}, "BertModel is an encoder with a decoder"),
        ("clip", {}, "CLIPModel reads text and pixel_values"),
        ("clip text", {}, "CLIPTextModel does not take embeddings"),
        ("canine", {}, "CanineModel does not take embeddings"),
        ("sound", {}, "ASTModel reads neither text nor images, but input_values"),
        ("swin", {}, "SwinModel is no network of tokens, and no plain vision transformer"),
        ("mamba", {}, "MambaModel takes cache_params, which a prompt would not fit"),
        ("gpt2", {"tokens": 30}, "tokens=30 leave no position of 30 to the input"),
        ("vit", {"init": "text", "text_ids": [1]}, "init='text' needs a network that reads text"),
        ("llama", {"init": "text", "text_ids": [50]}, "text_ids hold 50, and the vocabulary has 50 tokens"),
        ("llama", {"tokens": 0}, "SoftPrompt: tokens=0 must be a whole number of at least 1"),
        ("llama", {"tokens": True}, "tokens=True must be a whole number"),
        ("llama", {"tokens": 2.0}, "tokens=2.0 must be a whole number"),
        ("llama", {"init": "zero"}, r"init='zero' must be one of \['vocabulary', 'text', 'random'\]"),
        ("llama", {"init": "text"}, r"init='text' with text_ids=\(\)"),
        ("llama", {"text_ids": [4]}, r"init='vocabulary' with text_ids=\(4,\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(kind, options, message):
    refuses(other_network(kind), SoftPrompt, options, message)

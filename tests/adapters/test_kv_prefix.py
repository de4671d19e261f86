"""Prefixes of keys and values: text in front as the oracle, PEFT as the other one, and what reads them."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_peft import DeepPrompt, KVPrefix, SoftPrompt, adapter_state_dict, add_adapter, remove_adapter
from tests.adapters.prompt_nets import (
    DECODERS,
    DIM,
    FAMILIES,
    IDS,
    LAYERS,
    TOKENS,
    PromptLaws,
    answer,
    call,
    close,
    far,
    gradients,
    network,
    padded,
    refuses,
    trains,
    without_dropout,
)
from tests.adapters.zoo import stir
from tests.toy import same


class TestKVPrefix(PromptLaws):
    method = KVPrefix(tokens=TOKENS)
    counts_real_tokens = False


def prefixes(model: nn.Module) -> list[torch.Tensor]:
    """The prefixes as the layers use them, first layer first."""
    found = (getattr(module, "adapters", None) for module in model.modules() if hasattr(module, "config"))
    return [updates.current.keys_and_values() for updates in found if updates is not None]


TEXT_IDS = (5, 9, 7)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_text_is_the_text_in_front_at_unchanged_positions(family, side):
    model = add_adapter(network(family), KVPrefix(tokens=TOKENS, init="text", text_ids=TEXT_IDS))
    ids, mask = padded(side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = answer(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    text = torch.tensor([TEXT_IDS])
    for row, real in enumerate(mask.bool()):
        expected = answer(network(family), input_ids=torch.cat([text, ids[row][real][None]], 1))[0, TOKENS:]
        assert torch.allclose(found[row][real], expected, rtol=0, atol=1e-5)  # rotary angles are float32


def test_with_learned_positions_a_text_counts_if_the_caller_counts_it():
    model = add_adapter(network("gpt2"), KVPrefix(tokens=TOKENS, init="text", text_ids=TEXT_IDS))
    whole = torch.cat([torch.tensor([TEXT_IDS]).expand(3, -1), IDS], 1)
    expected = answer(network("gpt2"), input_ids=whole)[:, TOKENS:]
    positions = torch.arange(TOKENS, TOKENS + IDS.shape[1])[None]
    assert close(answer(model, input_ids=IDS, position_ids=positions), expected)
    assert far(answer(model, input_ids=IDS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_are_equal_also_when_changed_later(family):
    def moved(attention: str) -> nn.Module:
        torch.manual_seed(0)
        # Not at words, which each attention would read in its own precision.
        return stir(add_adapter(network(family, attention=attention), KVPrefix(tokens=TOKENS, init="random")))

    given, eager, sdpa = call(family), moved("eager"), moved("sdpa")
    expected = answer(sdpa, **given)
    assert torch.allclose(answer(eager, **given), expected, rtol=0, atol=1e-4)
    sdpa.set_attn_implementation("eager")
    eager.set_attn_implementation("sdpa")
    assert torch.allclose(answer(sdpa, **given), expected, rtol=0, atol=1e-4)
    assert close(answer(eager, **given), expected)
    assert sdpa.config._attn_implementation == "eager"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_padding_is_no_matter_to_either_attention(family, attention):
    model = stir(add_adapter(network(family, head=False, attention=attention), KVPrefix(tokens=TOKENS))).float()
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = answer(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    for row, real in enumerate(mask.bool()):
        alone = answer(model, input_ids=ids[row][real][None])[0]
        assert torch.allclose(found[row][real], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_peft_agrees_in_outputs_and_gradients(family):
    import peft

    head = family != "bert"
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM" if head else "FEATURE_EXTRACTION", num_virtual_tokens=TOKENS)
    theirs = peft.get_peft_model(network(family, head=head), config).double().eval()
    ours = stir(add_adapter(network(family, head=head), KVPrefix(tokens=TOKENS)))
    flat = (
        torch.stack(prefixes(ours)).permute(3, 0, 1, 2, 4).reshape(TOKENS, -1)
    )  # token, layer, key or value, head, dim
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(flat.detach())
    expected = answer(theirs, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    # Theirs counts the input from the end of the prefix on.
    found = answer(ours, input_ids=IDS, position_ids=torch.arange(TOKENS, TOKENS + IDS.shape[1])[None])
    assert close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    grads = torch.stack([p.grad for p in trains(ours).values()]).permute(3, 0, 1, 2, 4).reshape(TOKENS, -1)
    assert torch.allclose(grads, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("offset_positions", [False, True])
def test_unless_told_it_starts_at_real_tokens_that_the_network_has_read(family, offset_positions):
    """As a text of the tokens that a soft prompt of the same seed starts at; none of them is padding."""
    words = network(family).get_input_embeddings().weight
    options = {"tokens": 12, "seed": 5}
    (soft,) = adapter_state_dict(add_adapter(network(family), SoftPrompt(**options))).values()
    ids = torch.cdist(soft, words).argmin(1)
    assert torch.equal(words[ids], soft)
    found, text = (
        adapter_state_dict(add_adapter(network(family), KVPrefix(**options, **more, offset_positions=offset_positions)))
        for more in ({}, {"init": "text", "text_ids": ids.tolist()})
    )
    assert len(found) == LAYERS
    assert same(found, text)


@pytest.mark.parametrize(
    ("options", "runs"), [({}, 1), ({"init": "random"}, 0), ({"reparametrise": 4}, 0)], ids=["words", "random", "made"]
)
def test_the_network_reads_only_what_a_prefix_starts_at(options, runs):
    base, seen = network("llama"), []
    base.model.register_forward_hook(lambda *_: seen.append(1))
    add_adapter(base, KVPrefix(tokens=TOKENS, **options))
    assert len(seen) == runs


def test_what_is_longer_than_the_network_s_positions_is_read_in_parts():
    text = [5 + i % 40 for i in range(45)]  # GPT-2 here has 30 positions
    found = prefixes(add_adapter(network("gpt2"), KVPrefix(tokens=45, init="text", text_ids=text)))
    for start in (0, 30):
        part = text[start : start + 30]
        alone = prefixes(add_adapter(network("gpt2"), KVPrefix(tokens=len(part), init="text", text_ids=part)))
        assert all(
            torch.equal(ours[:, :, start : start + 30], theirs) for ours, theirs in zip(found, alone, strict=True)
        )


@pytest.mark.parametrize(("family", "options"), [("llama", {"init": "random"}), ("vit", {})])
def test_at_random_it_starts_near_zero_and_differently_everywhere(family, options):
    found = torch.stack(prefixes(add_adapter(network(family), KVPrefix(tokens=100, **options))))
    assert found.shape == (LAYERS, 2, 2 if family == "llama" else 4, 100, DIM // 4)
    assert abs(found.std() / 0.02 - 1) < 0.05
    assert len(found.unique()) > 0.99 * found.numel()


@pytest.mark.parametrize("text", [(5, 6), (5, 6, 7, 8, 9)])
def test_a_text_is_repeated_or_cut(text):
    whole = tuple((text * 2)[:TOKENS])
    found, expected = (
        prefixes(add_adapter(network("llama"), KVPrefix(tokens=TOKENS, init="text", text_ids=ids)))
        for ids in (text, whole)
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_text_is_read_without_the_other_adapter_and_without_dropout():
    method = KVPrefix(tokens=TOKENS, init="text", text_ids=TEXT_IDS)
    fresh = adapter_state_dict(add_adapter(network("gpt2"), method))
    model = stir(add_adapter(network("gpt2"), KVPrefix(tokens=2), "other")).train()
    add_adapter(model, method)
    assert model.training
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in fresh.items())
    remove_adapter(remove_adapter(model, "other"))
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_a_frozen_sink_stays_while_the_rest_moves():
    method = KVPrefix(tokens=TOKENS, init="text", text_ids=TEXT_IDS, frozen_sink=True)
    model = add_adapter(network("llama"), method)
    start = [values.detach().clone() for values in prefixes(model)]
    plain = prefixes(add_adapter(network("llama"), KVPrefix(tokens=TOKENS, init="text", text_ids=TEXT_IDS)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(start, plain, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        answer(model, input_ids=IDS).square().sum().backward()
        optimizer.step()
    assert all(name.endswith(".prefix") for name in trains(model))
    for values, before in zip(prefixes(model), start, strict=True):
        assert torch.equal(values[:, :, 0], before[:, :, 0])
        assert ((values - before)[:, :, 1:] != 0).all()


def test_a_made_prefix_is_the_two_layer_network_of_the_paper():
    model = stir(add_adapter(network("llama"), KVPrefix(tokens=TOKENS, reparametrise=4)))
    for depth, values in enumerate(prefixes(model)):
        update = model.model.layers[depth].self_attn.adapters["default"]
        hidden = torch.tanh(update.embedding @ update.hidden_weight.T + update.hidden_bias)
        flat = hidden @ update.output_weight.T + update.output_bias
        assert values.shape == (2, 2, TOKENS, DIM // 4)
        for token in range(TOKENS):
            assert close(values[:, :, token].flatten(), flat[token])
    plain = add_adapter(network("llama"), KVPrefix(tokens=TOKENS))
    with torch.no_grad():
        for depth, values in enumerate(prefixes(model)):
            plain.model.layers[depth].self_attn.adapters["default"].prefix.copy_(values)
    assert torch.equal(answer(plain, input_ids=IDS), answer(model, input_ids=IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_that_makes_a_prefix_trains_in_every_layer(family):
    model = stir(add_adapter(network(family), KVPrefix(tokens=TOKENS, reparametrise=4, seed=2)))
    parts = ["embedding", "hidden_bias", "hidden_weight", "output_bias", "output_weight"]
    assert sorted(name.rpartition(".")[2] for name in trains(model)) == sorted(parts * LAYERS)
    before = gradients(model, **call(family))
    assert all(grad is not None and grad.any() for grad in before.values())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(without_dropout(model).train(), **call(family))
    assert all(torch.allclose(again[name], grad, rtol=1e-9, atol=1e-9) for name, grad in before.items())


def test_every_layer_s_network_starts_at_a_draw_of_its_own():
    first, *rest = prefixes(add_adapter(network("llama"), KVPrefix(tokens=TOKENS, reparametrise=4)))
    assert all(far(first, values) for values in rest)


def test_relative_biases_are_zero_towards_the_prefix():
    import transformers as hf

    sizes = {"d_model": DIM, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    base = hf.T5EncoderModel(hf.T5Config(**sizes)).double().eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids, mask = padded("left")
    model = stir(add_adapter(base, KVPrefix(tokens=TOKENS)))
    assert all(
        grad is not None and grad.any() for grad in gradients(model, input_ids=ids, attention_mask=mask).values()
    )
    found = answer(model, input_ids=ids, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        assert close(found[row][real], answer(model, input_ids=ids[row][real][None])[0])


def test_a_prefix_taken_off_in_any_order_leaves_the_configs_of_the_network():
    model = stir(add_adapter(network("llama"), KVPrefix(tokens=TOKENS), "first"))
    add_adapter(model, KVPrefix(tokens=TOKENS), "second")
    remove_adapter(model, "first")
    add_adapter(model, KVPrefix(tokens=TOKENS), "third")
    remove_adapter(remove_adapter(model, "second"), "third")
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_two_networks_of_one_config_do_not_share_a_prefix():
    import transformers as hf

    config = network("llama").config
    first, second = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    before = answer(second, input_ids=IDS)
    add_adapter(first, KVPrefix(tokens=TOKENS))
    assert torch.equal(answer(second, input_ids=IDS), before)
    assert second.model.layers[0].self_attn.config is config


LOADER = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    cases = pickle.load(file)
with torch.no_grad():
    for name, (model, given, expected) in cases.items():
        assert torch.equal(model(**given).logits, expected), name
"""


@pytest.mark.large
def test_networks_are_read_in_a_new_process(tmp_path):
    methods = [KVPrefix(), KVPrefix(reparametrise=4), SoftPrompt(), DeepPrompt()]
    cases = {}
    for method in methods:
        model, given = stir(add_adapter(network("llama"), method)), call("llama")
        cases[repr(method)] = (model, given, answer(model, **given).detach())
    (tmp_path / "cases").write_bytes(pickle.dumps(cases))
    run = subprocess.run(
        [sys.executable, "-c", LOADER, tmp_path / "cases"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]


def other_network(kind: str) -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    swin = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    t5 = {"d_model": DIM, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50}

    def flex() -> nn.Module:
        model = network("llama")
        model.config._attn_implementation = "flex_attention"
        return model

    return {
        "linear": lambda: nn.Linear(2, 2),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "bloom": lambda: hf.BloomModel(hf.BloomConfig(vocab_size=50, hidden_size=DIM, n_layer=1, n_head=2)),
        "swin": lambda: hf.SwinModel(hf.SwinConfig(**swin)),
        "latent": lambda: hf.DeepseekV3Model(
            hf.DeepseekV3Config(vocab_size=50, num_key_value_heads=2, first_k_dense_replace=1, **sizes, **latent)
        ),
        "flex": flex,
        "llama": lambda: network("llama"),
        "vit": lambda: network("vit"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("linear", {}, "KVPrefix: this Linear is no transformers network"),
        ("t5", {}, "KVPrefix: T5ForConditionalGeneration is an encoder with a decoder"),
        ("bloom", {}, "BloomModel does not look up its attention in transformers' ALL_ATTENTION_FUNCTIONS"),
        ("swin", {}, r"the heads of SwinAttention have no one size: num_attention_heads=\[2\]"),
        ("latent", {}, "DeepseekV3Attention compresses its keys and values"),
        ("flex", {}, r"computes attention by 'flex_attention', and a prefix needs one of \['sdpa', 'eager'\]"),
        ("vit", {"init": "text", "text_ids": [1]}, "KVPrefix: init='text' needs a network that reads text"),
        ("llama", {"init": "text", "text_ids": [-1]}, "text_ids hold -1, and the vocabulary has 50 tokens"),
        ("llama", {"tokens": 0}, "KVPrefix: tokens=0 must be a whole number of at least 1"),
        ("llama", {"init": "zeros"}, r"init='zeros' must be one of \['vocabulary', 'text', 'random'\]"),
        ("llama", {"text_ids": [3]}, r"init='vocabulary' with text_ids=\(3,\)"),
        ("llama", {"reparametrise": 0}, "reparametrise=0 must be a whole number of at least 1, or None"),
        ("llama", {"reparametrise": True}, "reparametrise=True must be a whole number"),
        ("llama", {"reparametrise": 4, "init": "text", "text_ids": [3]}, "which cannot start at a text"),
        ("llama", {"frozen_sink": True}, "frozen_sink=True keeps a token of a text"),
        (
            "llama",
            {"frozen_sink": True, "tokens": 1, "init": "text", "text_ids": [3]},
            "needs init='text' and two tokens",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(kind, options, message):
    refuses(other_network(kind), KVPrefix, options, message)


def test_another_attention_chosen_later_is_refused_when_it_runs():
    model = add_adapter(network("llama"), KVPrefix(tokens=TOKENS))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="computes attention by 'flash_attention_2'"):
        answer(model, input_ids=IDS)

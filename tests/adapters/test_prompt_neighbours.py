"""What a soft prompt lies near: the words that it started at, and an independent search in float64."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import DeepPrompt, LoRA, SoftPrompt, add_adapter, nearest_tokens, set_adapter
from lightning_peft.adapters import nearest_tokens as function
from tests.adapters.prompt_nets import DIM, IDS, VOCABULARY, network
from tests.adapters.zoo import stir


class Words:
    """A tokenizer that names its tokens by their numbers, and knows 40 of them."""

    def convert_ids_to_tokens(self, token):
        return {7: "▁seven", 8: "##eight", 9: "Ċ", 10: "half"}.get(token, f"Ġw{token}") if token < 40 else None

    def decode(self, ids):
        (token,) = ids
        return {9: "\n", 10: "\ufffd"}.get(token, f" w{token}")


def reference(prompt, words, k, *, cosine=True):
    """Ids and similarities, one pair of vectors at a time."""
    table = []
    for vector in prompt.double():
        pairs = []
        for token, word in enumerate(words.double()):
            value = sum(a * b for a, b in zip(vector.tolist(), word.tolist(), strict=True))
            if cosine:
                length = sum(a * a for a in vector.tolist()) ** 0.5 * sum(b * b for b in word.tolist()) ** 0.5
                value /= length or 1  # the row of zeros that is kept for padding is like nothing
            pairs.append((-value, token))
        table.append([(token, -value) for value, token in sorted(pairs)[:k]])
    return table


def prompted(method=None, family="llama", **options):
    return add_adapter(network(family, **options), method or SoftPrompt(tokens=4))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_prompt_that_started_at_words_is_nearest_to_them(family, dtype):
    ids = [12, 3, 33, 12]
    model = add_adapter(network(family).to(dtype), SoftPrompt(tokens=4, init="text", text_ids=ids))
    found = nearest_tokens(model, Words(), 1)
    assert [one.ids for one in found] == [(token,) for token in ids]
    assert [one.tokens for one in found] == [(f" w{token}",) for token in ids]
    assert [one.position for one in found] == [0, 1, 2, 3]
    for one in found:
        assert one.similarities[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 3 * DIM, 2**22])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_it_finds_what_a_search_pair_by_pair_finds(similarity, chunk, monkeypatch):
    monkeypatch.setattr("lightning_peft.adapters.prompt_neighbours.CHUNK", chunk)
    model = stir(prompted())
    words, prompt = model.get_input_embeddings().weight, model.model.adapters["default"].prompt
    with torch.no_grad():
        words.mul_(torch.linspace(0.2, 5, VOCABULARY)[:, None])  # else both orders are much alike
    found = nearest_tokens(model, Words(), 6, similarity=similarity)
    expected = reference(prompt, words, 6, cosine=similarity == "cosine")
    for one, pairs in zip(found, expected, strict=True):
        assert one.ids == tuple(token for token, _ in pairs)
        assert one.similarities == pytest.approx([value for _, value in pairs], rel=1e-12)


def test_of_equal_words_the_first_comes_first(monkeypatch):
    model = prompted(SoftPrompt(tokens=1, init="text", text_ids=[30]))
    with torch.no_grad():
        model.get_input_embeddings().weight[[2, 20, 49]] = model.get_input_embeddings().weight[30].clone()
    for chunk in (DIM, 7 * DIM, 2**22):
        monkeypatch.setattr("lightning_peft.adapters.prompt_neighbours.CHUNK", chunk)
        assert nearest_tokens(model, Words(), 4)[0].ids == (2, 20, 30, 49)


class Largest(TorchDispatchMode):
    """Sees the largest float tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = func in (torch.ops.aten.detach.default, torch.ops.aten.t.default, torch.ops.aten.alias.default)
        if isinstance(out, torch.Tensor) and out.dtype.is_floating_point and not views:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_a_large_vocabulary_is_never_copied_whole():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=300_000, **sizes)).bfloat16()
    model = add_adapter(base, SoftPrompt(tokens=3, init="text", text_ids=[299_999, 5, 150_000]))
    with Largest() as seen:
        found = nearest_tokens(model, Words(), 2)
    assert [one.ids[0] for one in found] == [299_999, 5, 150_000]
    assert 300_000 * 64 / 8 < seen.numbers < 300_000 * 64 / 4


def test_words_are_as_the_network_looks_them_up():
    import transformers as hf

    sizes = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = hf.Gemma3TextModel(hf.Gemma3TextConfig(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=4, **sizes))
    model = add_adapter(base, SoftPrompt(tokens=1, init="text", text_ids=[5]))
    (value,) = nearest_tokens(model, Words(), 1, similarity="dot")[0].similarities
    assert value == pytest.approx(DIM * base.get_input_embeddings().weight[5].square().sum().item(), rel=1e-5)


def test_the_adapter_that_acts_is_read_or_the_one_that_is_named_or_the_only_one():
    model = prompted(SoftPrompt(tokens=1, init="text", text_ids=[5]))
    add_adapter(model, SoftPrompt(tokens=1, init="text", text_ids=[6]), "second")
    add_adapter(model, LoRA(rank=2), "lora")
    ids = lambda **which: nearest_tokens(model, Words(), 1, **which)[0].ids  # noqa: E731
    assert (ids(), ids(adapter="second")) == ((5,), (6,))
    set_adapter(model, "second")
    assert (ids(), ids(adapter="default")) == ((6,), (5,))
    set_adapter(model, "lora")
    with pytest.raises(ValueError, match=r"of the soft prompts \['default', 'second'\] none acts. Name one"):
        ids()
    with pytest.raises(ValueError, match="'lora' is none of them"):
        ids(adapter="lora")
    alone = prompted(SoftPrompt(tokens=1, init="text", text_ids=[7]))
    assert nearest_tokens(set_adapter(alone, None), Words(), 1)[0].ids == (7,)


def test_another_adapter_of_the_embedding_that_acts_now_changes_nothing():
    model = prompted(SoftPrompt(tokens=4))
    before = nearest_tokens(model, Words(), adapter="default")
    add_adapter(model, LoRA(rank=2, targets=["*embed_tokens"]), "words")
    stir(set_adapter(model, "words"))
    words = model.get_input_embeddings()
    moved = words(IDS)
    set_adapter(model, None)
    assert not torch.allclose(moved, words(IDS))
    set_adapter(model, "words")
    with torch.no_grad():
        prompt = model.model.adapters["default"].prompt
        prompt.copy_(words.weight[[one.ids[0] for one in before]])  # stir moved it too
    assert nearest_tokens(model, Words(), adapter="default") == before
    assert torch.equal(words(IDS), moved)


def test_a_module_around_the_network_will_do_and_two_networks_will_not():
    one, other = prompted(), prompted()
    around = nn.ModuleDict({"reader": one, "head": nn.Linear(2, 2)})
    assert nearest_tokens(around, Words()) == nearest_tokens(one, Words())
    with pytest.raises(ValueError, match="2 networks in this ModuleDict carry soft prompts. Pass one of them"):
        nearest_tokens(nn.ModuleDict({"one": one, "other": other}), Words())


def test_of_a_deep_prompt_the_vectors_at_the_input_are_read():
    deep = nearest_tokens(prompted(DeepPrompt(tokens=3, init="text", text_ids=[5, 6, 7])), Words(), 1)
    assert [one.ids for one in deep] == [(5,), (6,), (7,)]


def test_nothing_is_left_behind():
    model, with_gradient = prompted().train(), []
    watch = model.get_input_embeddings().register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    found = nearest_tokens(model, Words())
    watch.remove()
    assert with_gradient == [False]
    assert model.training
    assert all(isinstance(value, float) for one in found for value in one.similarities)
    assert all(p.grad is None for p in model.parameters())


def test_the_table_shows_blanks_and_what_has_no_text():
    model = prompted(SoftPrompt(tokens=6, init="text", text_ids=[7, 8, 9, 10, 11, 45]))
    found = nearest_tokens(model, Words(), 1)
    assert [one.tokens[0] for one in found] == ["▁seven", "##eight", "\n", "half", " w11", "[45]"]
    lines = str(found).splitlines()
    assert lines[0] == "position  nearest tokens"
    assert lines[3] == r"       2  '\n' 1.000"
    wide = str(nearest_tokens(model, Words(), 3)).splitlines()[1:]
    assert len({line.index("'", 30) for line in wide}) == 1  # columns stand below each other


def test_a_tokenizer_may_say_by_an_error_that_it_has_no_such_token():
    class Pieces(Words):
        def convert_ids_to_tokens(self, token):
            return ["piece"][token]

    assert nearest_tokens(prompted(SoftPrompt(tokens=1, init="text", text_ids=[45])), Pieces(), 1)[0].tokens == (
        "[45]",
    )


def sharded():
    model = prompted()
    model.get_input_embeddings().weight.device_mesh = "as FSDP2 does"
    return model


def test_a_tokenizer_of_the_real_kind_gives_its_words():
    from tests.prompts.language_nets import llama, tokenizer

    ids = tokenizer()(" film", add_special_tokens=False)["input_ids"]
    model = add_adapter(llama(), SoftPrompt(tokens=len(ids) + 1, init="text", text_ids=[*ids, 399]))
    found = nearest_tokens(model, tokenizer(), 1)
    assert "".join(one.tokens[0] for one in found[:-1]) == " film"
    assert found[-1].tokens == ("[399]",)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: network("llama"), {}, r"this LlamaForCausalLM carries no soft prompt. add_adapter\(model, SoftPrompt"),
        (lambda: add_adapter(network("llama"), LoRA(rank=2)), {}, "carries no soft prompt"),
        (
            lambda: prompted(family="vit"),
            {},
            "this ViTForImageClassification reads images, and its prompt is near no words",
        ),
        (prompted, {"adapter": "other"}, r"of the soft prompts \['default'\] 'other' is none of them"),
        (prompted, {"k": 0}, "k=0 must be a whole number from 1 to 50"),
        (prompted, {"k": 51}, "k=51 must be a whole number from 1 to 50"),
        (prompted, {"k": True}, "k=True must be"),
        (prompted, {"similarity": "l2"}, "similarity='l2' must be 'cosine' or 'dot'"),
        (sharded, {}, r"the embeddings are not here"),
        (lambda: prompted().to("meta"), {}, r"the embeddings are not here \(on meta, or sharded\)"),
    ],
)
def test_what_cannot_be_read_is_refused(make, options, message):
    with pytest.raises(ValueError, match=f"nearest_tokens: .*{message}|nearest_tokens: {message}"):
        nearest_tokens(make(), Words(), **options)


def test_it_is_one_function_under_both_names():
    assert function is nearest_tokens

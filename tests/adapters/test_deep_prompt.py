"""Deep prompts: at first a soft prompt, then one of its own at every layer, by hand."""

import pytest
import torch
from torch import nn

from lightning_peft import DeepPrompt, SoftPrompt, adapter_state_dict, add_adapter
from tests.adapters.prompt_nets import (
    DECODERS,
    DIM,
    IDS,
    LAYERS,
    TOKENS,
    PromptLaws,
    answer,
    call,
    close,
    far,
    network,
    padded,
    refuses,
    trains,
)
from tests.adapters.zoo import stir


class TestDeepPrompt(PromptLaws):
    method = DeepPrompt(tokens=TOKENS)


def layers(model: nn.Module) -> list[nn.Module]:
    return list(next(module for module in model.modules() if isinstance(module, nn.ModuleList)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"init": "text", "text_ids": (5, 6)}, {"init": "random", "seed": 3}])
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_computes_at_first_what_it_does_with_the_soft_prompt(family, options, side):
    ids, mask = padded(side)
    given = {"input_ids": ids, "attention_mask": mask}
    shallow = add_adapter(network(family), SoftPrompt(tokens=TOKENS, **options))
    deep = add_adapter(network(family), DeepPrompt(tokens=TOKENS, **options))
    assert len(trains(deep)) == LAYERS
    assert torch.allclose(answer(deep, **given)[mask.bool()], answer(shallow, **given)[mask.bool()], rtol=0, atol=1e-10)
    nn.init.normal_(layers(deep)[1].adapters["default"].prompt)
    assert far(answer(deep, **given)[mask.bool()], answer(shallow, **given)[mask.bool()])


@pytest.mark.parametrize("family", [*DECODERS, "bert", "distilbert", "vit"])
def test_every_layer_sees_its_own_prompt_and_not_what_the_one_before_made(family):
    model = stir(add_adapter(network(family, head=False), DeepPrompt(tokens=TOKENS)))
    values = {name: value for name, value in adapter_state_dict(model).items() if any(c.isdigit() for c in name)}
    (first,) = (value for name, value in adapter_state_dict(model).items() if name not in values)
    at, base = int(family == "vit"), network(family, head=False)

    def replaced(prompt: torch.Tensor):
        def hook(_layer, args):
            hidden = args[0].clone()
            hidden[:, at : at + TOKENS] = prompt
            return hidden, *args[1:]

        return hook

    for layer, prompt in zip(layers(base)[1:], values.values(), strict=True):
        layer.register_forward_pre_hook(replaced(prompt))
    if family == "vit":
        embedded = base.embeddings(**call(family))
        hidden = torch.cat([embedded[:, :1], first.expand(3, -1, -1), embedded[:, 1:]], 1)
        for layer in layers(base):
            hidden = layer(hidden)
        hidden = base.layernorm(hidden)
    else:
        words = base.get_input_embeddings()(IDS)
        hidden = base(inputs_embeds=torch.cat([first.expand(3, -1, -1), words], 1)).last_hidden_state
    assert close(answer(model, **call(family)), torch.cat([hidden[:, :at], hidden[:, at + TOKENS :]], 1))


def test_behind_the_first_token_every_layer_leaves_that_token_in_front():
    model = stir(add_adapter(network("llama"), DeepPrompt(tokens=TOKENS, after_first=True)))
    ids, mask = padded("left")
    found = answer(model, input_ids=ids, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        alone = answer(model, input_ids=ids[row][real][None])[0]
        assert close(found[row][real], alone)
        first = answer(network("llama"), input_ids=ids[row][real][None, :1])[0, 0]
        assert close(alone[0], first)  # a decoder's first token sees no prompt behind it


def test_images_start_every_layer_at_a_draw_of_its_own():
    drawn = list(adapter_state_dict(add_adapter(network("vit"), DeepPrompt(tokens=100))).values())
    bound = (6 / (3 * 4**2 + DIM)) ** 0.5
    assert len(drawn) == LAYERS
    for values in drawn:
        assert values.abs().max() <= bound
        assert abs(values.std() / (bound / 3**0.5) - 1) < 0.1
    assert far(drawn[0], drawn[1])
    assert far(drawn[1], drawn[2])


def test_prompts_start_from_the_network_without_its_other_adapter():
    fresh = adapter_state_dict(add_adapter(network("llama"), DeepPrompt(tokens=2)))
    model = stir(add_adapter(network("llama"), DeepPrompt(tokens=TOKENS), "other"))
    add_adapter(model.train(), DeepPrompt(tokens=2))
    assert model.training
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in fresh.items())


def other_network(kind: str) -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

    class Narrow(hf.LlamaModel):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None):
            return super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds)

    return {
        "albert": lambda: hf.AlbertModel(hf.AlbertConfig(vocab_size=50, embedding_size=8, **sizes)),
        "bloom": lambda: hf.BloomModel(hf.BloomConfig(vocab_size=50, hidden_size=DIM, n_layer=2, n_head=2)),
        "narrow": lambda: Narrow(hf.LlamaConfig(vocab_size=50, **sizes)),
        "linear": lambda: nn.Linear(2, 2),
        "llama": lambda: network("llama"),
        "gpt2": lambda: network("gpt2"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("albert", {}, "DeepPrompt: AlbertModel has no list of its 2 layers"),
        ("bloom", {}, "DeepPrompt: the network does not hand keywords on to its layers. Take SoftPrompt"),
        ("narrow", {}, "DeepPrompt: Narrow hands no keywords on to its layers. Take SoftPrompt"),
        ("linear", {}, "DeepPrompt: this Linear is no transformers network"),
        ("gpt2", {"tokens": 30}, "DeepPrompt: tokens=30 leave no position"),
        ("llama", {"tokens": 0}, "DeepPrompt: tokens=0 must be a whole number"),
        ("llama", {"init": "text", "text_ids": [50]}, "DeepPrompt: text_ids hold 50"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(kind, options, message):
    refuses(other_network(kind), DeepPrompt, options, message)


def test_a_call_without_room_for_the_prompt_names_the_deep_one():
    model = add_adapter(network("gpt2"), DeepPrompt(tokens=10))
    with pytest.raises(ValueError, match="DeepPrompt: attention_mask must have the shape"):
        model(input_ids=IDS, attention_mask=torch.ones(3, 1, 6, 6))
    with pytest.raises(ValueError, match="DeepPrompt: input and prompt of 10 tokens have 34 together"):
        model(input_ids=IDS.repeat(1, 4))

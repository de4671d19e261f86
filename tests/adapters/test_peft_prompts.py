"""Soft prompts and prefixes in PEFT's files, and positions that are counted as PEFT counts them."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_peft import DeepPrompt, KVPrefix, SoftPrompt, add_adapter, remove_adapter, set_adapter
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.peft_format import from_peft, load_adapter, save_adapter
from tests.adapters.prompt_nets import IDS, TOKENS, VOCABULARY, call, close, far, hooks, network, padded
from tests.adapters.test_peft_format import edited
from tests.adapters.zoo import stir

pytestmark = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported", "ignore:.*Could not find a config file"
)
HEADED = {"llama": True, "qwen2": True, "gpt2": True, "bert": False, "roberta": False}
ONES = torch.ones_like(IDS)


@contextlib.contextmanager
def float64():
    """PEFT makes its prompts in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def theirs(model, kind, task, **more):
    import peft

    with float64():
        config = getattr(peft, kind)(task_type=task, num_virtual_tokens=TOKENS, **more)
        return stir(peft.get_peft_model(model, config)).eval()


def read_by_peft(model, folder):
    import peft

    with float64():
        return peft.PeftModel.from_pretrained(model, folder).eval()


def answer(model):
    found = model(input_ids=IDS, attention_mask=ONES)
    return (found.logits if "logits" in found else found.last_hidden_state)[:, -IDS.shape[1] :]


def grads(model):
    answer(model).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def as_stored(found):
    """Gradients of our prefixes in the order of PEFT's tensor."""
    return torch.stack(list(found)).permute(3, 0, 1, 2, 4).flatten(1)


@pytest.mark.parametrize("family", HEADED)
def test_a_prefix_goes_both_ways(family, tmp_path, monkeypatch):
    head = HEADED[family]
    peft_model = theirs(network(family, head=head), "PrefixTuningConfig", "CAUSAL_LM" if head else "FEATURE_EXTRACTION")
    peft_model.save_pretrained(tmp_path / "theirs")
    expected = answer(peft_model)
    ours = network(family, head=head)
    with monkeypatch.context() as unread:  # the network need not read words whose place the file's values take
        unread.setattr(KVPrefix, "_read", None)
        load_adapter(ours, tmp_path / "theirs")
    assert close(answer(ours), expected)
    assert far(answer(network(family, head=head)), expected)
    save_adapter(ours, tmp_path / "ours")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys() == {"prompt_embeddings"}
    assert torch.equal(first["prompt_embeddings"], second["prompt_embeddings"])
    assert close(answer(read_by_peft(network(family, head=head), tmp_path / "ours")), expected)
    own, other = grads(ours), grads(peft_model)
    assert close(as_stored(own.values()), next(iter(other.values())))
    assert close(answer(from_peft(peft_model)), expected)


@pytest.mark.parametrize(
    "more", [{}, {"init": "random"}, {"reparametrise": 5}, {"init": "text", "text_ids": [5, 6, 7], "frozen_sink": True}]
)
def test_what_a_prefix_is_made_of_is_in_the_file_by_what_it_makes(more, tmp_path):
    ours = stir(add_adapter(network("gpt2"), KVPrefix(tokens=TOKENS, offset_positions=True, **more)), 0.1)
    save_adapter(ours, tmp_path)
    assert close(answer(read_by_peft(network("gpt2"), tmp_path)), answer(ours))
    again = load_adapter(network("gpt2"), tmp_path)
    assert torch.equal(answer(again), answer(ours))


@pytest.mark.parametrize("heads", [[], ["classifier"]])
@pytest.mark.parametrize("adapter", [SoftPrompt, KVPrefix])
def test_a_head_that_trains_with_a_prompt_is_in_the_file_and_only_then(adapter, heads, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
    }

    def bare():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**sizes)).double().eval()

    positions = {"offset_positions": True} if adapter is KVPrefix else {}
    ours = stir(add_adapter(bare(), adapter(tokens=TOKENS, train_also=heads, **positions)))
    save_adapter(ours, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["modules_to_save"] == (heads or None)
    assert told["task_type"] == ("SEQ_CLS" if heads else "FEATURE_EXTRACTION")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any("classifier" in name for name in tensors) == bool(heads)
    again = load_adapter(bare(), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    if heads:
        assert close(
            read_by_peft(bare(), tmp_path)(input_ids=IDS, attention_mask=ONES).logits, ours(input_ids=IDS).logits
        )


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_positions_from_0_on_are_turned_for_peft(family, tmp_path):
    ours = stir(add_adapter(network(family), KVPrefix(tokens=TOKENS)))
    save_adapter(ours, tmp_path)
    turned = answer(load_adapter(network(family), tmp_path))
    # transformers takes cosines in float32, of other angles in each of the two
    assert torch.allclose(turned, answer(ours), rtol=0, atol=1e-5)
    if family != "mistral":  # where PEFT's prefix leaves the sliding window
        assert torch.allclose(answer(read_by_peft(network(family), tmp_path)), answer(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_learned_positions_from_0_on_mean_something_else_to_peft(family, tmp_path):
    ours = add_adapter(network(family), KVPrefix(tokens=TOKENS))
    with pytest.raises(ValueError, match=r"PEFT counts the positions of the input from 3 on.*offset_positions=True"):
        save_adapter(ours, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_a_soft_prompt_goes_both_ways_its_head_with_it(family, task, tmp_path):
    peft_model = theirs(network(family), "PromptTuningConfig", task)
    peft_model.save_pretrained(tmp_path / "theirs")
    expected = answer(peft_model)
    ours = load_adapter(network(family), tmp_path / "theirs")
    assert close(answer(ours), expected)
    assert far(answer(network(family)), expected)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trained if task == "SEQ_CLS" else len(trained) == 1
    save_adapter(ours, tmp_path / "ours")
    assert close(answer(read_by_peft(network(family), tmp_path / "ours")), expected)
    assert sum(grad.square().sum() for grad in grads(ours).values()) == pytest.approx(
        sum(grad.square().sum() for grad in grads(peft_model).values()).item()
    )
    assert close(answer(from_peft(peft_model)), expected)


def test_a_head_that_did_not_train_is_not_asked_for(tmp_path):
    ours = stir(add_adapter(network("bert"), SoftPrompt(tokens=TOKENS)))
    save_adapter(ours, tmp_path)
    assert close(answer(read_by_peft(network("bert"), tmp_path)), answer(ours))


def test_a_prompt_that_a_network_made_reads_as_one(tmp_path):
    peft_model = theirs(network("llama"), "PromptEncoderConfig", "CAUSAL_LM", encoder_hidden_size=6)
    peft_model.save_pretrained(tmp_path)
    assert close(answer(load_adapter(network("llama"), tmp_path)), answer(peft_model))


@pytest.mark.parametrize(
    ("family", "adapter", "message"),
    [
        ("roberta", SoftPrompt(tokens=2), "the head of RobertaForSequenceClassification reads the first entry"),
        ("distilbert", SoftPrompt(tokens=2), "the head of DistilBertForSequenceClassification reads the first entry"),
        ("vit", SoftPrompt(tokens=2), "PEFT has no prompts for networks that read images"),
        ("bert", SoftPrompt(tokens=2, after_first=True), "PEFT puts a prompt before the first token"),
        ("llama", DeepPrompt(tokens=2), r"PEFT has no format for DeepPrompt\(tokens=2\)"),
    ],
)
def test_what_peft_would_compute_otherwise_is_not_written(family, adapter, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_adapter(add_adapter(network(family), adapter), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_virtual_tokens": None}, r"lacks \['num_virtual_tokens'\]"),
        ({"num_virtual_tokens": 4}, r"shape \(3, 16\) in the file, \(4, 16\) in the network: prompt_embeddings"),
        ({"num_transformer_submodules": 2}, "prompts for an encoder and its decoder cannot be read"),
        ({"peft_type": "PREFIX_TUNING"}, r"shape \(3, 16\) in the file, \(3, 48\) in the network: prompt_embeddings"),
        ({"modules_to_save": ["lm_head"]}, "missing: base_model.lm_head.weight"),
    ],
)
def test_prompt_files_that_do_not_fit_are_refused_whole(change, message, tmp_path):
    save_adapter(add_adapter(network("llama"), SoftPrompt(tokens=TOKENS)), tmp_path)
    edited(tmp_path, **change)
    model = network("llama")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert attachment_of(model) is None


def test_a_prompt_finds_the_one_network_of_a_module(tmp_path):
    ours = stir(add_adapter(network("llama"), SoftPrompt(tokens=TOKENS)))
    save_adapter(ours, tmp_path)
    around = nn.ModuleDict({"reader": network("llama"), "head": nn.Linear(2, 2)})
    load_adapter(around, tmp_path)
    assert torch.equal(answer(around["reader"]), answer(ours))
    with pytest.raises(ValueError, match=r"fits each of \['left', 'right'\]"):
        load_adapter(nn.ModuleDict({"left": network("llama"), "right": network("llama")}), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_rows_of_a_padded_batch_are_what_they_are_alone_when_positions_are_offset(family):
    ours = stir(add_adapter(network(family, head=False), KVPrefix(tokens=TOKENS, offset_positions=True)))
    ids, mask = padded("left")
    together = ours(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, kept, output in zip(ids, mask.bool(), together, strict=True):
        alone = ours(input_ids=row[kept][None]).last_hidden_state[0]
        assert torch.allclose(output[kept], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_counts_on_from_the_prefix(family, beams):
    ours = stir(add_adapter(network(family), KVPrefix(tokens=TOKENS, offset_positions=True)))
    ids, mask = padded("left")
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = ours.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, kept, found in zip(ids, mask.bool(), together, strict=True):
        one = {"input_ids": row[kept][None], "attention_mask": mask[0, : kept.sum()][None] * 0 + 1}
        for more in ({}, {"use_cache": False}):
            assert torch.equal(ours.generate(**one, **settings, **more)[0, kept.sum() :], found)


def test_a_text_and_the_input_behind_it_are_what_an_offset_prefix_computes():
    text = [5, 6, 7]
    ours = add_adapter(network("gpt2"), KVPrefix(tokens=3, init="text", text_ids=text, offset_positions=True))
    whole = network("gpt2")(input_ids=torch.cat([torch.tensor([text] * len(IDS)), IDS], 1)).logits[:, 3:]
    assert close(answer(ours), whole)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        (
            "gpt2",
            {"input_ids": torch.ones(1, 28, dtype=torch.long)},
            r"have 31 together.*learned 30 positions.*to 27 tokens",
        ),
        (
            "llama",
            {"input_ids": IDS, "attention_mask": torch.ones(3, 1, 6, 6).bool()},
            "give position_ids along with a mask",
        ),
    ],
)
def test_calls_that_leave_no_positions_say_so(family, given, message):
    ours = add_adapter(network(family), KVPrefix(tokens=3, offset_positions=True))
    with pytest.raises(ValueError, match=message):
        ours(**given)


def test_a_network_without_positions_has_none_to_offset():
    with pytest.raises(ValueError, match="ViTModel takes no position_ids: offset_positions=False"):
        add_adapter(network("vit"), KVPrefix(tokens=2, offset_positions=True))


def test_kinds_of_prompts_stand_beside_each_other_and_leave_nothing_behind():
    base = network("llama")
    kinds = {
        "soft": SoftPrompt(tokens=2),
        "prefix": KVPrefix(tokens=2, offset_positions=True),
        "deep": DeepPrompt(tokens=2),
        "first": KVPrefix(tokens=2),
    }
    alone = {}
    torch.manual_seed(3)
    for name, kind in kinds.items():
        add_adapter(base, kind, name)
        set_adapter(base, name)
        alone[name] = answer(stir(base))
    for name in reversed(kinds):
        assert torch.equal(answer(set_adapter(base, name)), alone[name])
    assert len({round(value.sum().item(), 6) for value in alone.values()}) == len(kinds)
    for name in kinds:
        remove_adapter(base, name)
    assert hooks(base) == hooks(network("llama"))
    assert base.state_dict().keys() == network("llama").state_dict().keys()
    assert torch.equal(answer(base), answer(network("llama")))


@pytest.mark.parametrize(
    "kind", [SoftPrompt(tokens=2), KVPrefix(tokens=2, offset_positions=True), DeepPrompt(tokens=2)]
)
def test_a_prompt_that_goes_before_another_adapter_takes_its_hooks_along(kind):
    from lightning_peft import LoRA

    base = network("llama")
    configs = [module.config for module in base.modules() if hasattr(module, "config")]
    add_adapter(base, kind, "prompt")
    add_adapter(base, LoRA(rank=2), "lora")
    remove_adapter(base, "prompt")
    assert hooks(base) == 0
    assert all(
        one is two for one, two in zip(configs, (m.config for m in base.modules() if hasattr(m, "config")), strict=True)
    )
    remove_adapter(base, "lora")
    assert torch.equal(answer(base), answer(network("llama")))
    assert call("llama").keys() == {"input_ids"}

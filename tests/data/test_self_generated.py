"""A model writes its own rows: as it was pretrained, the same every time, and kept only for what they were made with."""

import copy
import json

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, add_adapter
from lightning_peft.data import self_generated
from lightning_peft.data.self_generated import SelfGenerated
from lightning_peft.randomness import random_state
from tests.toy import same, weights

PROMPTS = [[1, 5, 9], [1, 7], [1, 3, 4, 8, 2]]


@pytest.fixture(scope="module")
def pretrained():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
        attention_dropout=0.5,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def model(pretrained):
    return copy.deepcopy(pretrained).train()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 90)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>")


def greedy(model, prompt, count):
    """One row at a time, without padding, cache or generate."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_rows_are_those_of_one_prompt_at_a_time(model):
    rows = SelfGenerated(model, PROMPTS, temperature=0, max_new_tokens=6)
    twin = copy.deepcopy(model).eval()
    assert [row["ids"] for row in rows] == [greedy(twin, prompt, 6) for prompt in PROMPTS]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["prompt_tokens"] for row in rows] == [3, 2, 5]


def test_prompts_take_turns_and_seeds_give_the_same_rows(model):
    def ids(**options):
        return [row["ids"] for row in SelfGenerated(model, PROMPTS, count=7, max_new_tokens=5, batch_size=3, **options)]

    first = ids(seed=1)
    assert len(first) == 7
    assert [row[: len(PROMPTS[i % 3])] for i, row in enumerate(first)] == [PROMPTS[i % 3] for i in range(7)]
    torch.rand(3)
    assert ids(seed=1) == first
    assert ids(seed=2) != first
    assert first[0] != first[3]  # the same prompt, in another batch
    assert len({tuple(row) for row in ids(temperature=0)}) == 3


def test_samples_have_the_model_s_own_distribution(model):
    """Chi-squared of the first token against the softmax of the logits, whatever the generation config says."""
    model.generation_config.top_k = 2
    model.generation_config.repetition_penalty = 9.0
    rows = SelfGenerated(model, [[1, 5]], count=4000, max_new_tokens=1, batch_size=500, temperature=4.0)
    counts = torch.bincount(torch.tensor([row["ids"][2] for row in rows]), minlength=90).double()
    with torch.no_grad():
        expected = (copy.deepcopy(model).eval()(torch.tensor([[1, 5]])).logits[0, -1].double() / 4).softmax(0) * 4000
    likely = expected > 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum())
    assert freedom > 60
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert model.generation_config.top_k == 2


def test_rows_end_at_the_end_token_and_padding_is_cut(model):
    free = SelfGenerated(model, PROMPTS, temperature=0, max_new_tokens=8)
    end = free[0]["ids"][3 + 2]
    for ends in (end, [end, 89]):
        model.generation_config.eos_token_id = ends
        model.generation_config.pad_token_id = None
        stopped = SelfGenerated(model, PROMPTS, temperature=0, max_new_tokens=8)
        for whole, cut in zip(free, stopped, strict=True):
            written = whole["ids"][whole["prompt_tokens"] :]
            length = written.index(end) + 1 if end in written else 8
            assert cut["ids"] == whole["ids"][: whole["prompt_tokens"] + length]


def test_texts_go_through_a_tokenizer(model, tokenizer):
    rows = SelfGenerated(model, ["<s> w5 w9", "w7"], tokenizer, temperature=0, max_new_tokens=4)
    assert [row["ids"][: row["prompt_tokens"]] for row in rows] == [[1, 5, 9], [7]]
    assert [row["prompt"] for row in rows] == ["<s> w5 w9", "w7"]
    assert rows[1]["text"] == " ".join(f"w{i}" for i in rows[1]["ids"] if i > 1)
    with pytest.raises(ValueError, match="the prompt '  ' has no tokens"):
        SelfGenerated(model, ["  "], tokenizer)


def test_the_adapter_is_off_and_nothing_is_left_changed(model):
    expected = SelfGenerated(model, PROMPTS, max_new_tokens=5).rows
    add_adapter(model, LoRA(rank=2, targets=["*q_proj", "*down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.model.layers[1].eval()
    modes, state, values = {n: m.training for n, m in model.named_modules()}, random_state(), weights(model)
    config = model.generation_config
    rows = SelfGenerated(model, PROMPTS, max_new_tokens=5)
    assert rows.rows == expected
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert str(random_state()) == str(state)
    assert torch.equal(random_state()["torch"], state["torch"])
    assert same(weights(model), values)
    assert model.generation_config is config
    assert torch.is_grad_enabled()

    holder = nn.ModuleDict({"inner": model})  # the adapter sits on a child

    def inner(module, prompts, temperature, max_new_tokens):
        return [greedy(module["inner"], prompt, max_new_tokens) for prompt in prompts]

    greedy_rows = SelfGenerated(model, PROMPTS, temperature=0, max_new_tokens=3).rows
    held = SelfGenerated(holder, PROMPTS, generate=inner, max_new_tokens=3)
    assert [row["ids"] for row in held] == [row["ids"] for row in greedy_rows]


@pytest.fixture
def writes(monkeypatch):
    """How often something was written anew."""
    count = []
    inner = SelfGenerated._write
    monkeypatch.setattr(SelfGenerated, "_write", lambda *args: count.append(1) or inner(*args))
    return count


def test_kept_rows_are_used_again_and_say_how_they_were_made(model, tmp_path, writes):
    options = {"count": 4, "max_new_tokens": 3, "temperature": 0.7, "seed": 5, "cache_dir": tmp_path / "new"}
    first = SelfGenerated(model, PROMPTS, **options)
    again = SelfGenerated(add_adapter(copy.deepcopy(model), LoRA(rank=2, targets=["*q_proj"])), PROMPTS, **options)
    assert len(writes) == 1
    assert again.rows == first.rows
    assert sorted(file.suffix for file in (tmp_path / "new").iterdir()) == [".json", ".jsonl"]
    assert [json.loads(line) for line in first.path.read_text().splitlines()] == first.rows
    record = json.loads(first.path.with_suffix(".json").read_text())
    assert (record["prompts"], record["count"], record["temperature"], record["seed"]) == (PROMPTS, 4, 0.7, 5)


def test_other_settings_or_weights_are_written_anew(model, tmp_path, writes, tokenizer):
    def make(found=model, prompts=PROMPTS, tokens=None, **options):
        return SelfGenerated(found, prompts, tokens, **{"max_new_tokens": 3, "cache_dir": tmp_path, **options}).path

    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.lm_head.weight[0, 0] += 1e-3
    paths = {
        make(),
        make(moved),
        make(prompts=PROMPTS[:2], count=3),
        make(tokens=tokenizer),
        *(
            make(**{name: value})
            for name, value in [("count", 2), ("seed", 1), ("temperature", 0.5), ("batch_size", 2)]
        ),
        make(max_new_tokens=4),
    }
    assert len(paths) == len(writes) == 9


@pytest.mark.parametrize("damage", ["short", "broken", "no record", "other record"])
def test_damaged_files_are_written_anew(model, tmp_path, writes, damage):
    first = SelfGenerated(model, PROMPTS, max_new_tokens=3, cache_dir=tmp_path)
    text, record = first.path.read_text(), first.path.with_suffix(".json")
    if damage == "short":
        first.path.write_text(text[: text.index("\n") + 1])
    elif damage == "broken":
        first.path.write_text(text[:-9])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text().replace('"seed": 0', '"seed": 1'))
    again = SelfGenerated(model, PROMPTS, max_new_tokens=3, cache_dir=tmp_path)
    assert len(writes) == 2
    assert again.rows == first.rows
    assert first.path.read_text() == text


def test_a_run_that_is_killed_leaves_no_half_file(model, tmp_path, monkeypatch, writes):
    def stop(path, text):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        return original(path, text)

    original = self_generated.write_text
    monkeypatch.setattr(self_generated, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        SelfGenerated(model, PROMPTS, max_new_tokens=3, cache_dir=tmp_path)
    monkeypatch.setattr(self_generated, "write_text", original)
    SelfGenerated(model, PROMPTS, max_new_tokens=3, cache_dir=tmp_path)
    assert len(writes) == 2


def test_any_module_may_write_by_a_function(tmp_path, writes):
    net = nn.Linear(2, 2)

    def words(module, prompts, temperature, max_new_tokens):
        assert module is net
        assert not module.training
        return [f"{prompt}\u2028 {temperature} {max_new_tokens} {float(torch.rand(())):.6f}" for prompt in prompts]

    def other(module, prompts, temperature, max_new_tokens):
        return [torch.tensor([1, 2])] * len(prompts)

    options = {"count": 3, "temperature": 0.5, "max_new_tokens": 9, "cache_dir": tmp_path}
    rows = SelfGenerated(net, ["a", "b"], generate=words, **options)
    assert [row["text"].rpartition(" ")[0] for row in rows] == ["a\u2028 0.5 9", "b\u2028 0.5 9", "a\u2028 0.5 9"]
    assert SelfGenerated(net, ["a", "b"], generate=words, **options).rows == rows.rows
    assert SelfGenerated(net, ["a", "b"], generate=other, **options)[0] == {"prompt": "a", "ids": [1, 2]}
    assert len(writes) == 2
    assert net.training
    with pytest.raises(ValueError, match="generate returned 1 rows for 2 prompts"):
        SelfGenerated(net, ["a", "b"], generate=lambda module, prompts, **options: ["one"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "SelfGenerated: count=0 must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be a whole number"),
        ({"temperature": -1}, "temperature=-1 must be a number of at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be a number"),
        ({"prompts": []}, r"prompts=\[\] must be at least one"),
        ({"prompts": "text"}, "prompts='text' must be at least one"),
        ({"prompts": [[1], []]}, "none empty"),
        ({"prompts": ["text"]}, "prompts are texts, but tokenizer=None"),
        ({"model": nn.Linear(2, 2)}, "Linear cannot generate as transformers models do"),
    ],
)
def test_what_cannot_work_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        SelfGenerated(**{"model": model, "prompts": PROMPTS, **options})

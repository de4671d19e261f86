"""A text lives as long as it can become a match of the whole pattern."""

import random
import re

import pytest

from lightning_peft.decoding.scorers import RegexViability

PATTERNS = {
    r"(\+|-)?\d+(\.\d+)?": ["+12.5", "7", "-0.25"],
    r"[A-Z][a-z]+( [A-Z][a-z]+)*": ["Ada Lovelace", "Alan"],
    r"(yes|no|perhaps)": ["yes", "no", "perhaps"],
    r"(ab|abc)*d{2,3}": ["ababcdd", "ddd"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_beginning_of_a_match_lives_and_the_match_is_finished(pattern):
    scorer = RegexViability(pattern)
    for text in PATTERNS[pattern]:
        assert scorer([text[:cut] for cut in range(len(text) + 1)]).eq(0).all()
        assert scorer.finished([text]) == [True]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_finished_is_what_the_standard_library_matches(pattern):
    chosen, scorer = random.Random(0), RegexViability(pattern)
    texts = ["".join(chosen.choices("+-.015abcdyesnoA ", k=chosen.randrange(5))) for _ in range(300)] + PATTERNS[
        pattern
    ]
    assert scorer.finished(texts) == [re.fullmatch(pattern, text) is not None for text in texts]


def test_what_no_continuation_makes_a_match_is_dead():
    scorer = RegexViability(r"(\+|-)?\d+(\.\d+)?")
    assert scorer(["+-", "1..", "a", "1.5x"]).eq(-float("inf")).all()


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match=r"RegexViability: '\(' is no regular expression"):
        RegexViability("(")


@pytest.mark.parametrize("pattern", ["(?r)abc", b"abc", None])
def test_a_pattern_that_does_not_read_texts_forwards_is_refused(pattern):
    with pytest.raises(ValueError, match="RegexViability"):
        RegexViability(pattern)

"""Globs select names, and a glob without a match says what is near."""

import re

import pytest

from lightning_peft.matching import match_names, nearest

NAMES = ["encoder.0.q_proj", "encoder.0.k_proj", "encoder.1.q_proj", "Encoder.head", "head"]


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        ("head", ["head"]),
        ("*", NAMES),
        ("*.q_proj", ["encoder.0.q_proj", "encoder.1.q_proj"]),
        ("encoder.*", NAMES[:3]),
        ("encoder.?.[qk]_proj", NAMES[:3]),
        ("Encoder.*", ["Encoder.head"]),
    ],
)
def test_a_glob_covers_the_whole_name_crosses_dots_and_minds_case(patterns, selected):
    assert match_names(NAMES, patterns) == selected


def test_one_pattern_is_the_same_as_a_list_of_it():
    assert match_names(NAMES, "*.q_proj") == match_names(NAMES, ["*.q_proj"])


def test_names_keep_their_order_and_come_once_whatever_the_order_of_the_patterns():
    assert match_names(NAMES, ["head", "*", "encoder.*"]) == NAMES


def test_names_may_come_from_a_generator():
    assert match_names((name for name in NAMES), ["head", "*.k_proj"]) == ["encoder.0.k_proj", "head"]


def test_no_pattern_selects_nothing():
    assert match_names(NAMES, []) == []


@pytest.mark.parametrize("patterns", [["q_proj"], ["head", "encoder"], ["HEAD"]])
def test_every_pattern_must_match_something(patterns):
    with pytest.raises(ValueError, match=re.escape(repr(patterns[-1]))):
        match_names(NAMES, patterns)


def test_the_error_says_who_asked_for_what_and_what_is_near():
    with pytest.raises(ValueError, match=r"LoRA: 'encoder.0.query' matches none of 5 linear layers") as error:
        match_names(NAMES, ["encoder.0.query"], owner="LoRA", kind="linear layer")
    assert "encoder.0.q_proj" in str(error.value)
    assert "globs over the whole dotted name" in str(error.value)


def test_nearest_lists_at_most_the_limit_and_says_none_where_there_is_none():
    assert nearest("head", NAMES, limit=1) == "head"
    assert len(nearest("x", NAMES, limit=2).split(", ")) == 2
    assert nearest("head", []) == "none"

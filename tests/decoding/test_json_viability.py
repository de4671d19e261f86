"""Every beginning of a document lives; finished is what the standard library reads."""

import json
import random

import pytest

from lightning_peft.decoding.scorers import JSONViability

WORDS = ["", "a", 'quo"te', "back\\slash", "ünïcode ☃", "\U0001f600", "tab\t", "null"]


def value(chosen: random.Random, depth: int = 3):
    kind = chosen.randrange(8 if depth else 6)
    if kind == 6:
        return [value(chosen, depth - 1) for _ in range(chosen.randrange(4))]
    if kind == 7:
        return {chosen.choice(WORDS): value(chosen, depth - 1) for _ in range(chosen.randrange(4))}
    return [
        None,
        True,
        False,
        chosen.choice(WORDS),
        chosen.randrange(-99, 99),
        chosen.uniform(-1, 1) * 10 ** chosen.randrange(-30, 30),
    ][kind]


def reads(text: str) -> bool:
    def refuse(word):
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def documents(seed: int):
    chosen = random.Random(seed)
    for _ in range(200):
        options = {"ensure_ascii": chosen.random() < 0.5, "indent": chosen.choice([None, 1])}
        yield json.dumps(value(chosen), **options)


def test_every_beginning_of_a_document_lives():
    scorer = JSONViability()
    for text in [*documents(0), "-0.5e+3", "1E-7", '"\\u00e9\\/\\b"', " [ ] ", "[[]]"]:
        assert scorer([text[:cut] for cut in range(len(text) + 1)]).eq(0).all(), text
        assert scorer.finished([text]) == [True]


def test_deep_nesting_ends_in_no_recursion():
    assert JSONViability()(["[" * 20_000]).tolist() == [0]
    assert JSONViability().finished(["[" * 20_000 + "]" * 20_000]) == [True]


def test_finished_is_what_the_standard_library_reads_and_the_finished_live():
    chosen, scorer = random.Random(1), JSONViability()
    for text in documents(1):
        place = chosen.randrange(len(text))
        broken = text[:place] + chosen.choice('{}[],:"0-.eE\\ tnu') + text[place + chosen.randrange(2) :]
        assert scorer.finished([broken]) == [reads(broken)], broken
        if reads(broken):
            assert scorer([broken]).tolist() == [0]


@pytest.mark.parametrize(
    "text",
    ["]", "{1", "{,", "[,", "[1 2", "[1,]", '{"a" 1', '{"a":,', '{"a":1,}', "01", "-a", "1.e", "1.5.", "1e+-", "+1", ".5", "tru3",
     "nul ", "truefalse", "NaN", "Infinity", '"\\x', '"\\u00g', '"a\nb', "[1]]", "1 2", '""a', "[1}", "'a'", "{]", "-Infinity"],
)  # fmt: skip
def test_what_cannot_become_a_document_is_dead(text):
    assert JSONViability()([text]).tolist() == [-float("inf")]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "car", 3, None]},
        "tags": {"type": "array", "items": {"const": "x"}},
        "more": {"type": ["number", "boolean"]},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "text",
    ['{"name": "Ada", "age": 36}', '{"kind": "cat", "name": ""}', '{"name": "", "tags": ["x", "x"], "more": -1.5}',
     '{"more": true, "name": "b", "kind": 3}', '{"name":"", "kind": null}', '{"name": "\\u00e9"}'],
)  # fmt: skip
def test_every_beginning_of_a_document_of_the_schema_lives(text):
    scorer = JSONViability(SCHEMA)
    assert scorer([text[:cut] for cut in range(len(text) + 1)]).eq(0).all()
    assert scorer.finished([text]) == [True]


@pytest.mark.parametrize(
    "text",
    ["[", "1", '{"b', '{"nam":', '{"name": 1', '{"age": 1.5,', '{"age": "', '{"kind": "cab', '{"kind": 4,', '{"kind": t',
     '{"kind": ca', '{"kind": [', '{"age": 3}', '{"tags": ["y', '{"tags": [1', '{"more": n', "{}"],
)  # fmt: skip
def test_what_the_schema_forbids_is_dead(text):
    assert JSONViability(SCHEMA)([text]).tolist() == [-float("inf")]


def test_true_is_not_one_and_a_number_alone_is_finished_and_may_grow():
    assert JSONViability({"enum": [1]})(["true", "1", "12 "]).tolist() == [-float("inf"), 0, -float("inf")]
    assert JSONViability().finished(["1", "12", "1.", "-"]) == [True, True, False, False]


def test_a_character_that_is_escaped_in_two_halves_lives():
    for schema, text in (
        ({"enum": ["\U0001f600"]}, r'"\ud83d\ude00"'),
        ({"properties": {"\U0001f600": {}}, "additionalProperties": False}, r'{"\ud83d\ude00": 1}'),
    ):
        scorer = JSONViability(schema)
        assert scorer([text[:cut] for cut in range(len(text) + 1)]).eq(0).all()
        assert scorer.finished([text]) == [True]


def test_a_number_has_as_many_digits_as_it_likes():
    long = "9" * 5000
    assert JSONViability().finished([long, f"[{long}]"]) == [True, True]
    assert JSONViability({"enum": [1, 1.5]}).finished([long, "1", "1.50"]) == [False, True, True]


def test_a_cut_character_may_go_on_and_ends_nothing():
    scorer = JSONViability()
    assert scorer(['"a\ufffd', "[1]\ufffd"]).tolist() == [0, 0]
    assert scorer.finished(["[1]\ufffd", '"\ufffd"']) == [False, True]


@pytest.mark.parametrize(
    "schema",
    [{"minLength": 1}, {"items": {"oneOf": []}}, {"additionalProperties": {}}, {"enum": [[1]]}, {"type": "str"}, {"items": True},
     {"properties": {"a": [1]}}, {"items": {"type": ["null", "int"]}}],
)  # fmt: skip
def test_demands_that_cannot_be_judged_are_refused(schema):
    with pytest.raises(ValueError, match="JSONViability"):
        JSONViability(schema)

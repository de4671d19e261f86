"""What a template refuses, and that it is plain data."""

import copy
import pickle

import pytest

from lightning_peft.prompts import PromptTemplate, Verbalizer
from tests.prompts.language_nets import tokenizer


@pytest.mark.parametrize("form", ["{text}", "{answer}", "{text} {answer} {answer}", "{} {answer}", "{text} {{answer}}"])
def test_a_form_needs_an_input_and_one_answer(form):
    with pytest.raises(ValueError, match="PromptTemplate: "):
        PromptTemplate(form)


def test_several_slots_take_rows_that_name_them():
    template = PromptTemplate("{first} and {second}? {answer}")
    assert template.slots == ("first", "second")
    assert template.prompt({"first": "rain", "second": "snow", "other": "x"}) == "rain and snow?"
    with pytest.raises(ValueError, match="has the slots first, second, so a row must be a mapping"):
        template.prompt("rain")
    with pytest.raises(ValueError, match="has no text for the slot 'second'"):
        template.prompt({"first": "rain"})


def test_braces_of_rows_and_of_the_form_are_text():
    template = PromptTemplate("{{set}} {text} = {answer}").with_demonstrations([("{a}", "{b}")])
    assert template.prompt("{c}") == "{set} {a} = {b}\n\n{set} {c} ="


def test_a_template_is_hashable_equal_by_value_and_pickles():
    one = PromptTemplate(instruction="Do.").with_demonstrations([("a", "b")])
    assert {one: 1}[pickle.loads(pickle.dumps(copy.deepcopy(one)))] == 1
    assert one != PromptTemplate(instruction="Do.")


def test_chat_without_a_chat_template_is_refused():
    assert PromptTemplate(chat=False).prompt("x", tokenizer(chat=True)) == "Input: x\nAnswer:"
    with pytest.raises(ValueError, match="has no chat template"):
        PromptTemplate(chat=True).prompt("x", tokenizer())


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["yes"], "at least two labels"),
        ([["yes"], []], "each with at least one answer"),
        (["yes", " no"], "without blanks"),
        (["yes", "yes"], "stands twice"),
        (["yes", ""], "without blanks"),
    ],
)
def test_a_verbalizer_refuses(answers, message):
    with pytest.raises(ValueError, match=message):
        Verbalizer(answers)


def test_answers_that_a_tokenizer_cannot_tell_apart_are_refused():
    class Lower:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(letter) for letter in text.lower()]}

    with pytest.raises(ValueError, match="the same"):
        Verbalizer(["Yes", "yes"]).tokens(Lower())
    with pytest.raises(ValueError, match="must be 'sum' or 'mean'"):
        Verbalizer(["a", "b"], length="max")

"""A DSPy program becomes a template: its instruction, its demonstrations in the order in which DSPy shows them, its labels."""

from enum import Enum
from typing import Literal

import pytest

from lightning_peft.prompts import PromptTemplate, Verbalizer
from lightning_peft.prompts.dspy_template import template_of


@pytest.fixture
def dspy():
    return pytest.importorskip("dspy", reason="needs the extra dspy")


def judge(dspy, kind=Literal["negative", "positive"], base=None):
    class Judge(dspy.Signature):
        """Judge the review."""

        text: str = dspy.InputField()
        stars: int = dspy.InputField()
        sentiment: kind = dspy.OutputField()

    return (base or dspy.Predict)(Judge)


def example(dspy, text, sentiment="positive", **more):
    return dspy.Example(text=text, stars=len(text), sentiment=sentiment, **more)


def shown_by_dspy(dspy, predictor):
    """The texts of the demonstrations in the messages that DSPy makes."""
    messages = dspy.ChatAdapter().format(predictor.signature, predictor.demos, {"text": "asked", "stars": 1})
    users = [message["content"] for message in messages if message["role"] == "user"][:-1]
    return [user.split("[[ ## text ## ]]\n")[1].split("\n")[0] for user in users]


def test_instruction_and_demonstrations_are_the_program_s(dspy):
    program = judge(dspy)
    program.demos = [example(dspy, "dull", "negative"), {"text": "a joy", "stars": 5, "sentiment": "positive"}]
    template, verbalizer = template_of(program)
    assert template.prompt({"text": "fine", "stars": "3"}) == (
        "Judge the review.\n\nText: dull\nStars: 4\nSentiment: negative\n\nText: a joy\nStars: 5\nSentiment: positive\n\n"
        "Text: fine\nStars: 3\nSentiment:"
    )
    assert verbalizer == Verbalizer(["negative", "positive"])
    assert [dict(one.slots)["text"] for one in template.demonstrations] == shown_by_dspy(dspy, program)


def test_of_a_chain_of_thought_the_answers_stay_in_the_order_in_which_dspy_shows_them(dspy):
    program = judge(dspy, base=dspy.ChainOfThought)
    predictor = program.predictors()[0]
    predictor.demos = [
        example(dspy, "first", reasoning="so"),
        example(dspy, "second", "negative"),
        example(dspy, "third", reasoning="thus"),
        example(dspy, "fourth"),
    ]
    template, _ = template_of(program, output="sentiment")
    found = [dict(one.slots)["text"] for one in template.demonstrations]
    assert found == shown_by_dspy(dspy, predictor) == ["second", "fourth", "first", "third"]
    assert [one.answer for one in template.demonstrations] == ["negative", "positive", "positive", "positive"]
    with pytest.raises(ValueError, match="output=None must be one of the program's outputs: reasoning, sentiment"):
        template_of(program)
    with pytest.raises(ValueError, match="output='label' must be one of"):
        template_of(program, output="label")


def test_another_form_takes_the_inputs_by_their_names(dspy):
    program = judge(dspy)
    program.demos = [example(dspy, "a joy")]
    template, _ = template_of(program, form="{text}\nIn short: {answer}")
    assert template.prompt("fine").endswith("a joy\nIn short: positive\n\nfine\nIn short:")


def test_labels_are_those_of_a_literal_and_other_types_have_none(dspy):
    assert template_of(judge(dspy, Literal[1, 2, 3]))[1] == Verbalizer(["1", "2", "3"])
    for kind in (str, Enum("Mood", ["good", "bad"])):
        template, verbalizer = template_of(judge(dspy, kind))
        assert verbalizer is None
        assert isinstance(template, PromptTemplate)


def test_braces_of_a_prefix_are_text(dspy):
    class Odd(dspy.Signature):
        text: str = dspy.InputField(prefix="The {text}:")
        label: str = dspy.OutputField()

    assert "The {text}: x" in template_of(dspy.Predict(Odd))[0].prompt("x")


def test_a_program_that_has_no_such_form_is_refused(dspy):
    class Two(dspy.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = dspy.Predict("text -> label"), dspy.Predict("text -> label")

    with pytest.raises(ValueError, match=r"2 predictors. Give one of them: program.predictors\(\)\[0\]"):
        template_of(Two())
    assert template_of(Two().one)[0].slots == ("text",)
    with pytest.raises(ValueError, match="input 'answer' has the name of the answer's slot"):
        template_of(dspy.Predict("answer -> label"))
    program = judge(dspy)
    program.demos = [dspy.Example(text="a joy", sentiment="positive")]
    with pytest.raises(ValueError, match="demonstration {'text': 'a joy', 'sentiment': 'positive'} lacks 'stars'"):
        template_of(program)

"""Flips of tokens go where the gradient points, and what they write is what was meant."""

import pytest
import torch

from lightning_peft.prompts import PromptTemplate, Rewrite, Verbalizer, label_log_probabilities
from lightning_peft.prompts.label_scores import prompt_tokens
from lightning_peft.prompts.search import PromptSearch
from lightning_peft.prompts.space import PromptSpace
from lightning_peft.prompts.token_flips import TokenFlips
from tests.prompts.language_nets import llama, tokenizer

FORM = PromptTemplate("Review: {text}\nSentiment: {answer}")
WORDS = Verbalizer(["negative", "positive"])
EXAMPLES = [("a joy", 1), ("dull", 0), ("not worth the time", 0), ("great", 1)]
START = "Judge the review."


def net():
    torch.manual_seed(0)
    model = llama().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def flips(model, tokens, **options):
    return TokenFlips(model, tokens, FORM, WORDS, EXAMPLES, **options)


def loss(model, tokens, instruction):
    """The mean loss of the right answers, by forwards of whole prompts."""
    template = PromptTemplate(FORM.form, instruction=instruction)
    total = 0.0
    for row, label in EXAMPLES:
        prompt = prompt_tokens(template, row, tokens)
        answer = tokens(f" {WORDS.shown(label)}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
    return total / len(EXAMPLES)


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"chat": True}])
def test_the_gradient_is_that_of_the_loss_by_finite_differences(options):
    model, tokens = net().double(), tokenizer(**options)
    ids = tokens(START, add_special_tokens=False)["input_ids"]
    found = flips(model, tokens).gradient(START)
    assert found.shape == (len(ids), 16)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    if "chat" in options:
        return
    place = next(
        place for place, token in enumerate(ids) if ids.count(token) == 1 and token not in used_elsewhere(tokens)
    )
    table, change = model.get_input_embeddings().weight, torch.randn(16, dtype=torch.float64) * 1e-4
    before = loss(model, tokens, START)
    with torch.no_grad():
        table[ids[place]] += change
    moved = loss(model, tokens, START) - before
    assert moved == pytest.approx(float(found[place].double() @ change), rel=0.02)


def used_elsewhere(tokens):
    return {
        token
        for row, label in EXAMPLES
        for token in [*prompt_tokens(FORM, row, tokens), *tokens(f" {WORDS.shown(label)}")["input_ids"]]
    }


def test_what_is_written_differs_in_one_token_and_lowers_the_loss_more_than_chance():
    model, tokens = net(), tokenizer()
    ids = tokens(START)["input_ids"]
    before = loss(model, tokens, START)
    by_gradient = flips(model, tokens, count=12, top=8)([(START, 0.5)])
    by_chance = flips(model, tokens, count=12, top=340)([(START, 0.5)])
    assert len(by_gradient) == 12
    for text in by_gradient:
        changed = tokens(text)["input_ids"]
        assert len(changed) == len(ids)
        assert sum(a != b for a, b in zip(changed, ids, strict=True)) == 1
    gains = [
        sum(before - loss(model, tokens, text) for text in texts) / len(texts) for texts in (by_gradient, by_chance)
    ]
    assert gains[0] > gains[1] + 0.01
    assert gains[0] > 0
    assert flips(model, tokens, count=12, top=8)([(START, 0.5)]) == by_gradient


def test_a_search_with_flips_raises_the_probability_of_the_right_answers():
    model, tokens = net(), tokenizer()
    space = PromptSpace([FORM], [WORDS], instructions=[START])
    writer = flips(model, tokens, count=6, top=8)
    report = PromptSearch(space, Rewrite(writer, rows=4), rounds=3, stop_at=2.0).run(model, tokens, EXAMPLES, EXAMPLES)
    assert len(space.instructions) > 6
    assert writer.usage.forwards == 3 * len(EXAMPLES) * 2
    scores = label_log_probabilities(model, tokens, [row for row, _ in EXAMPLES], report.prompt, WORDS)
    assert scores.isfinite().all()


def test_an_instruction_without_tokens_is_refused():
    with pytest.raises(ValueError, match="the best instruction is empty"):
        flips(net(), tokenizer())([("", 0.5)])

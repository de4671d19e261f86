"""Scores of labels are those of whole prompts, one by one; what prompts share is computed once."""

import pytest
import torch

from lightning_peft.budget import Usage
from lightning_peft.prompts import PromptTemplate, Verbalizer, label_log_probabilities
from lightning_peft.prompts.label_scores import prompt_tokens, shared_length
from tests.prompts.language_nets import CAUSAL, bert, tokenizer

FORM = PromptTemplate("Review: {text}\nSentiment: {answer}", instruction="Judge the review.")
SOLVED = FORM.with_demonstrations([("a joy", "positive"), ("dull", "negative")])
ROWS = ["not worth the time", "a film", "great from start to end, a joy", "it", "terrible"]
ONE = Verbalizer(["negative", "positive"])
MANY = Verbalizer([["bad", "terrible film"], ["good", "great"], ["terrible end"]])


def net(name):
    torch.manual_seed(3)
    model = (CAUSAL | {"bert": bert})[name]().double().eval()
    # Larger weights than the usual start, so that a prompt matters.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@torch.no_grad()
def by_hand(model, tokens, template, verbalizer, rows):
    """Every prompt and answer in a forward of its own."""
    table = []
    for row in rows:
        prompt, scores = prompt_tokens(template, row, tokens), []
        for answers in verbalizer.answers:
            ps = []
            for answer in answers:
                ids = tokens(template.gap(tokens) + answer, add_special_tokens=False)["input_ids"]
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
                each = torch.stack([logits[len(prompt) - 1 + place, token] for place, token in enumerate(ids)])
                ps.append(each.mean() if verbalizer.length == "mean" else each.sum())
            scores.append(torch.stack(ps).logsumexp(0))
        table.append(torch.stack(scores))
    return torch.stack(table)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("template", [FORM, SOLVED, PromptTemplate("{text}: {answer}")])
@pytest.mark.parametrize("verbalizer", [ONE, MANY, Verbalizer(MANY.answers, length="mean")])
def test_scores_are_those_of_whole_prompts_one_by_one(name, template, verbalizer):
    model, tokens = net(name), tokenizer()
    expected = by_hand(model, tokens, template, verbalizer, ROWS)
    for batch_size, share in ((2, True), (32, True), (3, False)):
        found = label_log_probabilities(
            model, tokens, ROWS, template, verbalizer, batch_size=batch_size, share_prefix=share
        )
        assert torch.allclose(found, expected, atol=1e-5)
    assert expected.std(0).min() > 1e-3  # rows differ


@pytest.mark.parametrize("options", [{"chat": True}, {"bos": True}])
def test_chat_forms_and_tokens_in_front_are_the_tokenizer_s(options):
    model, tokens = net("llama"), tokenizer(**options)
    found = label_log_probabilities(model, tokens, ROWS, SOLVED, MANY)
    assert torch.allclose(found, by_hand(model, tokens, SOLVED, MANY, ROWS), atol=1e-5)
    text = tokens.decode(prompt_tokens(SOLVED, "fine", tokens))
    if "chat" in options:
        assert text.startswith("<|system|>Judge the review.<|end|>\n<|user|>Review: a joy\nSentiment:<|end|>")
        assert text.endswith("<|user|>Review: fine\nSentiment:<|end|>\n<|assistant|>")
    else:
        assert text.startswith("<s>Judge")


def test_what_all_prompts_share_goes_through_once():
    model, tokens = net("llama"), tokenizer()
    prompts = [prompt_tokens(SOLVED, row, tokens) for row in ROWS]
    shared = shared_length(prompts)
    assert tokens.decode(prompts[0][:shared]).endswith("Review:")
    usage = Usage()
    label_log_probabilities(model, tokens, ROWS, SOLVED, ONE, batch_size=1, usage=usage)
    assert usage.forwards == 1 + len(ROWS)
    assert usage.tokens == shared + sum(len(prompt) - shared for prompt in prompts)
    assert usage.seconds > 0
    whole = Usage()
    label_log_probabilities(model, tokens, ROWS, SOLVED, ONE, batch_size=1, share_prefix=False, usage=whole)
    assert whole.tokens == sum(map(len, prompts))


def test_answers_of_one_token_cost_nothing_and_longer_ones_what_they_do_not_share():
    model, tokens, usage = net("llama"), tokenizer(), Usage()
    label_log_probabilities(model, tokens, ["it"], FORM, MANY, share_prefix=False, usage=usage)
    stems = {tuple(tokens(f" {a}")["input_ids"][:-1]) for answers in MANY.answers for a in answers}
    leaves = [one for one in stems if not any(other != one and other[: len(one)] == one for other in stems)]
    longest = max(map(len, leaves))
    assert usage.tokens == len(leaves) * (len(prompt_tokens(FORM, "it", tokens)) + longest)


def test_a_model_that_fills_in_masks_scores_all_tokens_of_an_answer_at_once():
    model, tokens = net("bert"), tokenizer()
    template = PromptTemplate("{text}. It was {answer}!", instruction="Judge.")
    found = label_log_probabilities(model, tokens, ROWS, template, MANY, batch_size=2)
    for number, row in enumerate(ROWS):
        for label, answers in enumerate(MANY.answers):
            ps = []
            for answer in answers:
                ids = tokens(f" {answer}", add_special_tokens=False)["input_ids"]
                text = f"Judge.\n\n{row}. It was {'<mask>' * len(ids)}!"
                whole = tokens(text, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    logits = model(input_ids=whole).logits[0].float().log_softmax(-1)
                at = (whole[0] == tokens.mask_token_id).nonzero()[:, 0]
                ps.append(sum(logits[place, token] for place, token in zip(at, ids, strict=True)))
            assert found[number, label] == pytest.approx(float(torch.stack(ps).logsumexp(0)), abs=1e-5)


def test_the_model_is_left_as_it_was():
    model, tokens = net("llama").train(), tokenizer()
    state = torch.get_rng_state()
    label_log_probabilities(model, tokens, ROWS, FORM, ONE)
    assert model.training
    assert all(child.training for child in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert label_log_probabilities(model, tokens, [], FORM, ONE).shape == (0, 2)


def test_a_prompt_longer_than_the_model_s_positions_is_refused_and_can_be_cut():
    model, tokens = net("gpt2"), tokenizer()
    long = ["a joy " * 600]
    with pytest.raises(ValueError, match="512 positions. Set max_slot_tokens"):
        label_log_probabilities(model, tokens, long, FORM, ONE)
    cut = PromptTemplate(FORM.form, max_slot_tokens=5)
    assert cut.prompt(long[0], tokens).count("joy") < 6
    label_log_probabilities(model, tokens, long, cut, ONE)


def test_an_answer_that_a_tokenizer_joins_with_the_prompt_is_refused():
    model, tokens = net("llama"), tokenizer()
    with pytest.raises(ValueError, match="joins the answer 'timent' with the end of the prompt"):
        label_log_probabilities(model, tokens, ["x"], PromptTemplate("{text} Sen{answer}"), Verbalizer(["timent", "x"]))


def test_text_behind_the_answer_is_for_masks():
    with pytest.raises(ValueError, match="must end with {answer}"):
        label_log_probabilities(net("llama"), tokenizer(), ["x"], PromptTemplate("{text} was {answer}!"), ONE)
    with pytest.raises(ValueError, match="a text holds the mask"):
        label_log_probabilities(net("bert"), tokenizer(), ["<mask>"], FORM, ONE)

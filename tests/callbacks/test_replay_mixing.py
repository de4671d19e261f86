"""Old rows come in an exact share, mixed in or beside, and a resumed run sees what an uninterrupted one would."""

import copy
import math
import pickle
from fractions import Fraction

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_peft import ReplayMixin
from lightning_peft.callbacks import ReplayMixing
from tests.toy import Toy, same, weights

OLD = 1000


def numbered(count: int, first: int = 0) -> TensorDataset:
    """Rows whose first feature is their number."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(first))
    x[:, 0] = torch.arange(first, first + count)
    return TensorDataset(x, torch.arange(count) % 2)


def numbers(batch) -> list[int]:
    return batch[0][:, 0].long().tolist()


class Counting(Toy):
    """Writes down the rows of every step; the numbers themselves teach nothing."""

    def __init__(self, new: int = 24, batch: int = 6, **loader) -> None:
        super().__init__()
        self.new, self.batch, self.loader = numbered(new), batch, {"shuffle": True, **loader}
        self.seen: list[list[int]] = []

    def forward(self, x):
        return super().forward(x * torch.tensor([0.0, 1, 1, 1]).to(x))

    def training_step(self, batch, batch_idx):
        self.seen.append(numbers(batch))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(self.new, self.batch, **self.loader)


class Rehearsing(ReplayMixin, Counting):
    """Practises old rows by a loss of its own."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.replayed: list[tuple[int, list[int]]] = []

    def replay_step(self, batch):
        self.replayed.append((len(self.seen) - 1, numbers(batch)))
        return mse_loss(self(batch[0])[:, 0], batch[1].to(batch[0]))


class Shares(pl.Callback):
    """Counts by itself how many rows each step had, and what the callback says about it."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append(float(trainer.callback_metrics["replay/ratio"]))


def memory(count: int = 7) -> TensorDataset:
    return numbered(count, OLD)


def keep(folder, at: int) -> pl.callbacks.ModelCheckpoint:
    """Save after every so many steps."""
    return pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=at, save_top_k=-1)


def every_step(net: Counting) -> list[tuple[int, int]]:
    """(old, all) rows of each step, whatever the mode."""
    beside = dict(getattr(net, "replayed", []))
    return [
        (sum(row >= OLD for row in seen) + len(beside.get(step, [])), len(seen) + len(beside.get(step, [])))
        for step, seen in enumerate(net.seen)
    ]


@pytest.mark.parametrize("limit", [None, 2, 0.5])
@pytest.mark.parametrize(
    ("ratio", "batch"), [(0.01, 32), (0.05, 6), (0.2, 8), (0.25, 6), (0.3, 8), (Fraction(1, 3), 6)]
)
@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_after_every_step_the_old_rows_are_the_ratio_of_all_rows_to_below_one(fit, kind, ratio, batch, limit):
    net, shares = kind(new=50 if batch < 32 else 150, batch=batch), Shares()
    replay = ReplayMixing(memory(), ratio)
    fit(net, replay, shares, epochs=3, limit_train_batches=limit)
    old = total = 0
    for (more, rows), logged in zip(every_step(net), shares.logged, strict=True):
        old, total = old + more, total + rows
        assert abs(old - Fraction(str(ratio)) * total) < 1
        assert logged == pytest.approx(old / total)
    length = len(net.train_dataloader()) if kind is Rehearsing else math.ceil(len(net.new) / (1 - ratio) / batch)
    steps = {None: length, 2: 2, 0.5: int(length * 0.5)}[limit]
    assert len(net.seen) == 3 * steps


@pytest.mark.parametrize("drop_last", [False, True])
def test_mixed_batches_keep_their_size_and_an_epoch_is_one_pass_of_the_new_rows(fit, drop_last):
    net = Counting(new=25, batch=6, drop_last=drop_last)
    fit(net, ReplayMixing(memory(), 0.25), epochs=2)  # 33.3 rows an epoch
    steps = 5 if drop_last else 6
    assert len(net.seen) == 2 * steps
    assert {len(seen) for seen in net.seen[:5]} == {6}
    if not drop_last:
        for epoch in (net.seen[:6], net.seen[6:]):
            assert {row for seen in epoch for row in seen if row < OLD} == set(range(25))


def test_mixed_every_new_row_comes_once_an_epoch_and_old_rows_pass_by_in_new_orders(fit):
    net = Counting(new=24, batch=6)
    fit(net, ReplayMixing(memory(4), 0.25), epochs=3)  # 8 old rows an epoch: two passes
    flat = [row for seen in net.seen for row in seen]
    new, old = [row for row in flat if row < OLD], [row for row in flat if row >= OLD]
    passes = [tuple(new[i : i + 24]) for i in range(0, 72, 24)]
    assert all(sorted(one) == list(range(24)) for one in passes)
    assert len(set(passes)) == 3
    rehearsals = [tuple(old[i : i + 4]) for i in range(0, 24, 4)]
    assert all(sorted(one) == list(range(OLD, OLD + 4)) for one in rehearsals)
    assert len(set(rehearsals)) > 3


def test_beside_new_batches_are_exactly_those_without_replay(fit):
    plain, rehearsing = Counting(), Rehearsing()
    for net, callbacks in ((plain, []), (rehearsing, [ReplayMixing(memory(), 0.4)])):
        pl.seed_everything(7, verbose=False)
        fit(net, *callbacks, epochs=2)
    assert rehearsing.seen == plain.seen
    assert len(rehearsing.replayed) == 8
    assert sum(len(rows) for _, rows in rehearsing.replayed) == 48 * 2 // 3


def by_hand(net: Toy, losses) -> None:
    optimizer = net.configure_optimizers()
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def pick(dataset: TensorDataset, rows: list[int], first: int = 0):
    index = torch.tensor(rows) - first
    return tuple(tensor[index] for tensor in dataset.tensors)


def test_mixed_training_is_plain_training_on_the_joint_batches(fit):
    net, other = Counting(), Counting()
    other.load_state_dict(net.state_dict())
    fit(net, ReplayMixing(memory(), 0.25), epochs=2)
    joint = {int(x[0]): (x, y) for data in (net.new, memory()) for x, y in data}

    def loss(rows):
        x, y = (torch.stack(part) for part in zip(*(joint[row] for row in rows), strict=True))
        return cross_entropy(other(x), y)

    by_hand(other, [lambda rows=rows: loss(rows) for rows in net.seen])
    assert same(weights(net), weights(other))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_beside_the_loss_is_the_training_loss_plus_weight_times_the_replay_loss(fit, weight):
    net, other = Rehearsing(), Counting()
    other.load_state_dict(net.state_dict())
    trainer = fit(net, ReplayMixing(memory(), 0.1, weight), epochs=2)  # some steps have no old row
    old = dict(net.replayed)
    assert 0 < len(old) < len(net.seen)

    def loss(step, rows):
        x, y = pick(net.new, rows)
        total = cross_entropy(other(x), y)
        if step in old:
            x, y = pick(memory(), old[step], OLD)
            total = total + weight * mse_loss(other(x)[:, 0], y.to(x))
        return total

    by_hand(other, [lambda step=step, rows=rows: loss(step, rows) for step, rows in enumerate(net.seen)])
    for name, value in weights(net).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-5, atol=1e-6)
    assert "replay/loss" in trainer.callback_metrics


def test_a_replay_batch_has_the_dtype_of_the_run(fit):
    net = Rehearsing()
    fit(net, ReplayMixing(memory(), 0.5), steps=2, precision="64-true")
    assert net.head.weight.dtype == torch.float64
    assert len(net.replayed) == 2


@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_the_seed_decides_the_old_rows(fit, kind):
    runs = []
    for seed in (0, 0, 1):
        net = kind()
        fit(net, ReplayMixing(memory(), 0.25, seed=seed))
        runs.append([row for rows in net.seen for row in rows if row >= OLD] or [rows for _, rows in net.replayed])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(("at", "workers"), [(3, 0), (6, 0), (8, 0), (3, 2), (8, 2)])  # an epoch has six steps
def test_mixed_a_run_resumed_at_a_step_sees_the_same_rows_and_ends_with_the_same_weights(fit, tmp_path, workers, at):
    def net():
        return Counting(num_workers=workers, persistent_workers=workers > 0)

    whole = net()
    start = weights(whole)
    fit(whole, ReplayMixing(memory(), 0.3), keep(tmp_path, at), epochs=2)
    resumed = net()
    resumed.load_state_dict(start)
    fit(resumed, ReplayMixing(memory(), 0.3), keep(tmp_path, at), epochs=2, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert len(whole.seen) == 12
    assert resumed.seen == whole.seen[at:]
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize(("at", "workers"), [(3, 0), (4, 0), (6, 0), (3, 2)])
def test_beside_a_run_resumed_at_a_step_replays_the_same_rows_at_the_same_steps(fit, tmp_path, workers, at):
    def replay():
        return ReplayMixing(DataLoader(memory(), num_workers=workers), 0.3)

    whole, resumed = Rehearsing(), Rehearsing()
    fit(whole, replay(), keep(tmp_path, at), epochs=2)
    fit(resumed, replay(), keep(tmp_path, at), epochs=2, ckpt_path=tmp_path / f"step={at}.ckpt")
    expected = [(step - at, rows) for step, rows in whole.replayed if step >= at]
    assert expected
    assert resumed.replayed == expected


@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_a_run_resumed_from_the_end_of_an_epoch_goes_on_with_the_next(fit, tmp_path, kind):
    whole, resumed = kind(shuffle=False), kind(shuffle=False)
    resumed.load_state_dict(whole.state_dict())

    def save():
        return pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)

    fit(whole, ReplayMixing(memory(), 0.3), save(), epochs=3)
    fit(resumed, ReplayMixing(memory(), 0.3), save(), epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    third = len(whole.seen) // 3
    assert resumed.seen == whole.seen[-third:]
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_accumulated_gradients_and_a_stop_inside_an_epoch_change_nothing_of_the_share(fit, kind):
    net = kind()
    fit(net, ReplayMixing(memory(), 0.3), steps=3, accumulate_grad_batches=2)
    # Four batches an epoch beside: the third optimizer step comes after six batches as well.
    assert len(net.seen) == 6
    old, total = (sum(part) for part in zip(*every_step(net), strict=True))
    assert abs(old - Fraction(3, 10) * total) < 1


def test_a_loader_passed_to_fit_gives_the_same_run(fit):
    asked, passed = Counting(), Counting()
    passed.load_state_dict(asked.state_dict())
    fit(asked, ReplayMixing(memory(), 0.3), epochs=2)
    fit(passed, ReplayMixing(memory(), 0.3), epochs=2, fit_with=(passed.train_dataloader(),))
    assert passed.seen == asked.seen
    assert same(weights(passed), weights(asked))


def test_a_loader_passed_to_fit_resumes_at_its_step(fit, tmp_path):
    def run(net, **options):
        fit(
            net, ReplayMixing(memory(), 0.3), keep(tmp_path, 8), epochs=2, fit_with=(net.train_dataloader(),), **options
        )
        return net

    whole = run(Counting())
    assert run(Counting(), ckpt_path=tmp_path / "step=8.ckpt").seen == whole.seen[8:]


def test_a_loader_passed_to_fit_is_mixed_once_and_whole_again_after_a_limited_run(fit):
    net, replay = Counting(), ReplayMixing(memory(), 0.25)
    loader = net.train_dataloader()
    fit(net, replay, limit_train_batches=2, fit_with=(loader,))
    fit(net, replay, fit_with=(loader,))
    assert len(net.seen) == 2 + 6
    old, total = (sum(part) for part in zip(*every_step(net), strict=True))
    assert abs(old - Fraction(1, 4) * total) < 2  # in either run less than one


def test_a_datamodule_is_mixed_as_well_as_a_module(fit):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(numbered(24), 6, shuffle=True)

    asked, given = Counting(), Counting()
    fit(asked, ReplayMixing(memory(), 0.25))
    data = Data()
    fit(given, ReplayMixing(memory(), 0.25), fit_with=(None, None, data))
    assert given.seen == asked.seen
    assert "train_dataloader" not in vars(data)


class Failing(Counting):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("out of memory")


def test_after_a_fit_or_a_failed_one_the_module_gives_its_own_loader_again(fit):
    net, replay = Counting(), ReplayMixing(memory(), 0.25)
    fit(net, replay)
    assert len(net.train_dataloader()) == 4
    failing = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(failing, ReplayMixing(memory(), 0.25))
    assert len(failing.train_dataloader()) == 4


def test_a_loader_set_on_the_instance_is_there_again_after_the_fit(fit):
    net = Counting()
    own = net.train_dataloader = lambda: DataLoader(numbered(12), 6)
    fit(net, ReplayMixing(memory(), 0.25))
    assert net.train_dataloader is own
    assert len({row for rows in net.seen for row in rows if row < OLD}) == 12


def test_one_callback_serves_two_fits(fit):
    replay, first, second = ReplayMixing(memory(), 0.25), Counting(), Counting()
    fit(first, replay)
    fit(second, replay)
    assert first.seen == second.seen


def test_a_trainer_that_fits_on_goes_on_with_the_next_epoch(fit, trainer):
    whole, twice = Counting(), Counting()
    fit(whole, ReplayMixing(memory(), 0.25), epochs=2)
    made = trainer(ReplayMixing(memory(), 0.25), epochs=1)
    made.fit(twice)
    made.fit_loop.max_epochs = 2
    made.fit(twice)
    assert twice.seen == whole.seen


def test_a_trainer_that_fits_on_without_replay_has_its_loader_as_it_was(trainer):
    net, made = Counting(), trainer(ReplayMixing(memory(), 0.25), epochs=1)
    made.fit(net)
    made.callbacks.clear()
    made.fit_loop.max_epochs = 2
    net.seen.clear()
    made.fit(net)
    assert sorted(number for batch in net.seen for number in batch) == list(range(24))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_a_copy_of_the_callback_gives_the_same_rows_before_and_after_a_fit(fit, kind, twin):
    replay, nets = ReplayMixing(memory(), 0.25), []
    for callback in (twin(replay), replay, None):
        nets.append(kind(shuffle=False))
        fit(nets[-1], callback or twin(replay))
    assert nets[0].seen == nets[1].seen == nets[2].seen
    assert every_step(nets[0]) == every_step(nets[1]) == every_step(nets[2])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_middle_of_a_fit_has_the_state_but_not_the_loaders(fit, twin):
    class Copies(pl.Callback):
        def on_train_batch_end(self, *args):
            copies.append(twin(replay))

    copies = []
    replay = ReplayMixing(DataLoader(memory(), 4, num_workers=1), 0.25)
    fit(Rehearsing(), replay, Copies(), steps=3)
    assert [made.state_dict() for made in copies] == [{"epoch": 0, "step": step} for step in (1, 2, 3)]


def random_collate(rows):
    torch.rand(1)
    return torch.utils.data.default_collate(rows)


def test_trying_the_collate_function_takes_no_number_from_the_generator_of_the_run():
    state = torch.get_rng_state()
    ReplayMixing(memory(), 0.25)._try_rows(DataLoader(numbered(24), 6, collate_fn=random_collate), numbered(1)[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("net", "keys"), [(Counting, ["ratio"]), (Rehearsing, ["ratio", "loss"])])
def test_a_run_shorter_than_the_logging_interval_has_its_curves(fit, tmp_path, net, keys):
    fit(net(), ReplayMixing(memory(), 0.25), epochs=2, logger=TensorBoardLogger(tmp_path, name="", version=""))
    log = EventAccumulator(str(tmp_path)).Reload()
    for key in keys:
        assert len(log.Scalars(f"replay/{key}")) == 2


def test_the_length_of_an_epoch_is_printed_at_the_start(fit, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_peft.callbacks.replay_mixing.rank_zero_info", said.append)
    fit(Counting(), ReplayMixing(memory(), 0.25))
    assert said == ["ReplayMixing: 25.0% old rows from a memory of 7; an epoch is 6 steps."]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(memory())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.5}, r"ratio=1.5 must lie inside \(0, 1\)"),
        ({"ratio": 0}, r"ratio=0 must lie inside \(0, 1\)"),
        ({"memory": []}, "memory: the list is empty; it needs at least one row"),
        ({"memory": Stream()}, "memory: Stream has no length; a map-style dataset is needed"),
        ({"memory": DataLoader(Stream())}, "memory: Stream has no length"),
        ({"weight": 0}, "weight=0 must be above 0; leave the callback out"),
        ({"weight": -1.0}, r"weight=-1.0 must be above 0"),
        ({"weight": float("nan")}, "weight=nan must be above 0"),
        ({"ratio": lambda step: 1.0}, r"ratio\(0\) returned 1.0; it must return a share in \[0, 1\)"),
        ({"unit": "words"}, "unit='words' must be one of 'rows', 'tokens', 'loss'"),
        ({"unit": "tokens"}, "unit='tokens' with tokens=None: a function that counts goes with 'tokens'"),
        ({"tokens": len}, "unit='rows' with tokens=.*: a function that counts goes with 'tokens'"),
        ({"unit": "loss", "weight": 2.0}, "weight=2.0 with unit='loss'"),
    ],
)
def test_bad_arguments_are_refused_at_once_with_value_and_cure(arguments, message):
    with pytest.raises(ValueError, match=f"ReplayMixing: {message}"):
        ReplayMixing(**{"memory": memory(), **arguments})


def without_mixin() -> Counting:
    return type("Forgetful", (Counting,), {"replay_step": Rehearsing.replay_step})()


def without_step() -> Counting:
    return type("Idle", (ReplayMixin, Counting), {})()


def by_hand_optimized() -> Counting:
    net = Rehearsing()
    net.automatic_optimization = False
    return net


def with_loader(loader) -> Counting:
    net = Counting()
    net.train_dataloader = lambda: loader
    return net


def beside_with_loader(loader) -> Counting:
    net = Rehearsing()
    net.train_dataloader = lambda: loader
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_mixin, r"Forgetful has a replay_step, .* Write class Forgetful\(ReplayMixin, ...\)"),
        (without_step, r"Idle has ReplayMixin but no replay_step. Define replay_step\(self, batch\)"),
        (by_hand_optimized, "Rehearsing optimizes by hand"),
        (
            lambda: with_loader(DataLoader(numbered(8), 4, sampler=WeightedRandomSampler([1.0] * 8, 8))),
            "WeightedRandomSampler .*Use shuffle=True or False",
        ),
        (lambda: with_loader(DataLoader(Stream(), None)), "rows of a Stream, which has no length, need a batch_size"),
        (lambda: with_loader([numbered(8)]), "train_dataloader returned a list"),
        (
            lambda: with_loader(DataLoader([(0, None)] * 8, 4)),
            "the training loader cannot put its own rows into a batch .*NoneType.* Give it the collate_fn",
        ),
        (lambda: with_loader(DataLoader(numbered(4), 6, drop_last=True)), "4 rows fill no batch of 6 under drop_last"),
        (lambda: beside_with_loader(DataLoader(numbered(8), None)), "DataLoader without a fixed batch_size"),
        (
            lambda: with_loader(DataLoader(TensorDataset(torch.ones(8, 9), torch.ones(8, 1)), 4)),
            "the first row of the memory, .* cannot be put into a batch .*Old rows must look like the training rows",
        ),
    ],
    ids=[
        "no mixin",
        "no step",
        "manual",
        "sampler",
        "stream",
        "list",
        "own rows",
        "drop_last",
        "beside unbatched",
        "collate",
    ],
)
def test_what_cannot_be_replayed_is_refused_before_the_first_step(fit, make, message):
    net = make()
    start = weights(net)
    with pytest.raises(ValueError, match=f"ReplayMixing: .*{message}"):
        fit(net, ReplayMixing(memory(), 0.25))
    assert net.seen == []
    assert same(weights(net), start)


def test_two_memories_side_by_side_are_refused_because_one_would_be_lost(fit):
    net = Rehearsing()
    with pytest.raises(ValueError, match="ConcatDataset"):
        fit(net, ReplayMixing(memory(), 0.25), ReplayMixing(memory(), 0.25, seed=1))
    assert net.seen == []


def test_a_validation_run_is_left_alone(trainer):
    class Validating(Counting):
        def validation_step(self, batch, batch_idx):
            self.seen.append(numbers(batch))

        def val_dataloader(self):
            return DataLoader(self.new, 12)

    net = Validating()
    trainer(ReplayMixing(memory(), 0.25)).validate(net, verbose=False)
    assert net.seen == [list(range(12)), list(range(12, 24))]
    assert "train_dataloader" not in vars(net)

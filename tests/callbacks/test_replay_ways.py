"""Replay whose ratio changes, of tokens, of the loss, from streams of rows, and beside what Lightning does with loaders."""

import itertools
import math
from fractions import Fraction

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_peft.callbacks import ExactResume, ReplayMixing
from lightning_peft.data.mix_loader import Both
from lightning_peft.data.ratio import CosineRatio, LinearRatio
from tests.callbacks.test_replay_mixing import OLD, Counting, Rehearsing, every_step, keep, memory, numbered
from tests.toy import same, weights


def old_rows(net) -> list[int]:
    return [old for old, _ in every_step(net)]


def expected(ratio, batch, steps, *, odds=False) -> list[int]:
    """What a plain sum in exact fractions gives."""
    shares = [Fraction(round((r / (1 - r) if odds else r) * 2**20), 2**20) for r in map(ratio, range(steps))]
    upto = [math.floor(sum(shares[:step]) * batch) for step in range(steps + 1)]
    return [after - before for before, after in itertools.pairwise(upto)]


RATIOS = [LinearRatio(0.5, 0.1, 8), CosineRatio(0.0, 0.6, 10), lambda step: 0.3 if step % 3 else 0.0]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_a_ratio_that_changes_is_summed_exactly(kind, ratio, fit):
    net = kind(new=24, batch=6)
    replay = ReplayMixing(memory(), ratio)
    fit(net, replay, epochs=3)
    assert len(net.seen) == 12
    assert old_rows(net) == expected(ratio, 6, 12, odds=kind is Rehearsing)
    assert replay._generate_state_key(seed=0) == replay.state_key


def test_with_a_ratio_that_changes_new_rows_come_once_a_pass_across_epochs(fit):
    net = Counting(new=24, batch=6)
    fit(net, ReplayMixing(memory(), LinearRatio(0.5, 0.1, 8)), epochs=6)
    new = [row for step in net.seen for row in step if row < OLD]
    assert sorted(new[:24]) == sorted(new[24:48]) == list(range(24))
    assert new[:24] != new[24:48]


def test_an_uneven_last_batch_counts_with_the_rows_it_has(fit):
    net = Rehearsing(new=22, batch=6)
    fit(net, ReplayMixing(memory(), lambda step: 0.25), epochs=3)
    total = 0
    for old, rows in every_step(net):
        total += rows
        assert old >= 0
    old = sum(old_rows(net))
    assert abs(old - 0.25 * total) < 1


class Steers(pl.Callback):
    """Changes the ratio by what it has seen, as a budget does."""

    def __init__(self):
        self.told = []

    def setup(self, trainer, pl_module, stage):
        self.replay = next(one for one in trainer.callbacks if isinstance(one, ReplayMixing))
        self.replay.steer(0.5)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % 4 == 0:
            ratio = float(outputs["loss"].detach()) % 0.5
            self.told.append((self.replay.change_ratio(ratio), ratio))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_a_steered_ratio_acts_from_the_first_step_that_is_not_chosen_and_resumes_exactly(kind, workers, fit, tmp_path):
    def run(folder, *, ckpt_path=None):
        torch.manual_seed(1)
        net, steers = kind(new=48, batch=6, num_workers=workers), Steers()
        net.lr = 1e-3
        callbacks = [steers, ReplayMixing(memory(), 0.1), ExactResume(), keep(tmp_path / folder, 7)]
        fit(net, *callbacks, epochs=2, ckpt_path=ckpt_path)
        return net, steers

    net, steers = run("whole")
    ahead = 2 * workers if kind is Counting else 0
    assert [step for step, _ in steers.told] == [4 * n + ahead for n in range(1, len(steers.told) + 1)]
    told = [(0, 0.5), *steers.told]
    ratio = lambda step: next(r for first, r in reversed(told) if first <= step)  # noqa: E731
    assert old_rows(net) == expected(ratio, 6, 16, odds=kind is Rehearsing)
    (path,) = (tmp_path / "whole").glob("*step=7*")
    again, _ = run("again", ckpt_path=path)
    assert again.seen == net.seen[7:]
    assert same(weights(again), weights(net))


def test_only_a_steered_ratio_can_be_changed(fit):
    class Changes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.callbacks[0].change_ratio(0.3)

    with pytest.raises(ValueError, match=r"ReplayMixing: the ratio is 25.0%; call steer\(\) before the fit"):
        fit(Counting(), ReplayMixing(memory(), 0.25), Changes())


class Sentences(Dataset):
    """Rows of unequal length, padded; the length is the second feature."""

    def __init__(self, lengths, first=0):
        self.rows = numbered(len(lengths), first)
        self.lengths = lengths

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        x, y = self.rows[index]
        x = x.clone()
        x[1] = self.lengths[index]
        return x, y


def length(row) -> int:
    return int(row[0][1])


def test_a_share_of_tokens_is_exact_over_whole_passes_and_reported(fit):
    class Counts(Counting):
        tokens = (0, 0)

        def training_step(self, batch, batch_idx):
            old = batch[0][:, 0] >= OLD
            lengths = batch[0][:, 1].long()
            self.tokens = (self.tokens[0] + int(lengths[old].sum()), self.tokens[1] + int(lengths.sum()))
            return super().training_step(batch, batch_idx)

    net = Counts()
    new, old = Sentences([2, 4, 6, 8] * 30), Sentences([30, 50] * 5, OLD)
    net.train_dataloader = lambda: DataLoader(new, 8, shuffle=True)
    replay = ReplayMixing(old, 0.4, unit="tokens", tokens=length)
    made = fit(net, replay, epochs=10)
    assert net.tokens[0] / net.tokens[1] == pytest.approx(0.4, abs=0.005)
    assert float(made.callback_metrics["replay/tokens"]) == pytest.approx(net.tokens[0] / net.tokens[1])
    assert float(made.callback_metrics["replay/ratio"]) == pytest.approx(0.4 * 5 / (0.4 * 5 + 0.6 * 40), abs=0.005)


def test_a_row_without_tokens_is_named(fit):
    net = Counting()
    with pytest.raises(ValueError, match="tokens returned 0 for new row 3; it must return how many tokens"):
        net.train_dataloader = lambda: DataLoader(Sentences([1, 2, 3, 0]), 2)
        fit(net, ReplayMixing(memory(), 0.25, unit="tokens", tokens=length))


@pytest.mark.parametrize("ratio", [0.1, LinearRatio(0.4, 0.2, 4)])
def test_a_share_of_the_loss_weighs_both_losses(ratio, fit):
    class Losses(Rehearsing):
        losses = ()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses = (*self.losses, tuple(float(v) for v in (outputs["loss"], self.new_loss, self.replay_loss)))

    net = Losses(new=24, batch=6)
    fit(net, ReplayMixing(memory(), ratio, unit="loss"), epochs=1)
    shares = [ratio] * 4 if isinstance(ratio, float) else [ratio(step) for step in range(4)]
    for share, (whole, new, old) in zip(shares, net.losses, strict=True):
        assert whole == pytest.approx((1 - share) * new + share * old, rel=1e-6)
    assert all(count >= 1 for count in old_rows(net))


def test_a_share_of_the_loss_needs_a_loss_on_old_rows(fit):
    with pytest.raises(ValueError, match="unit='loss' needs a loss on old rows. Define replay_step"):
        fit(Counting(), ReplayMixing(memory(), 0.25, unit="loss"))


class Streaming(IterableDataset):
    """Rows one after the other, divided over workers."""

    def __init__(self, count=50):
        self.rows = numbered(count)

    def __iter__(self):
        info = get_worker_info()
        first, stride = (0, 1) if info is None else (info.id, info.num_workers)
        return (self.rows[i] for i in range(first, len(self.rows), stride))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ratio", [0.25, 0.05, LinearRatio(0.5, 0.1, 8)])
def test_the_ratio_is_kept_among_the_rows_of_a_stream(ratio, workers, fit):
    net = Counting(batch=6)
    net.train_dataloader = lambda: DataLoader(Streaming(), 6, num_workers=workers)
    fit(net, ReplayMixing(memory(), ratio), epochs=2)
    share = (lambda step: ratio) if isinstance(ratio, float) else ratio
    planned = expected(share, 6, len(net.seen))
    assert old_rows(net)[:8] == planned[:8]
    if workers == 0:  # the second pass goes on with the next step
        second = next(step for step, rows in enumerate(net.seen) if len(rows) < 6) + 1
        assert old_rows(net)[second : second + 8] == planned[second : second + 8]
    new = [row for rows in net.seen for row in rows if row < OLD]
    assert sorted(new) == sorted([*range(50)] * 2)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_old_rows_of_a_stream_go_on_at_their_step_when_a_run_resumes(fit, tmp_path):
    def run(folder, ckpt_path=None):
        net = Counting(batch=6)
        net.train_dataloader = lambda: DataLoader(Streaming(), 6)
        fit(net, ReplayMixing(memory(), 0.25), keep(tmp_path / folder, 3), epochs=1, ckpt_path=ckpt_path)
        return [[row for row in rows if row >= OLD] for rows in net.seen]

    whole = run("whole")
    (path,) = (tmp_path / "whole").glob("*step=3*")
    again = run("again", path)
    assert again[:4] == whole[3:7]


@pytest.mark.parametrize("kind", [Counting, Rehearsing])
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_repeats_the_same_batches(kind, fit):
    net = kind(new=24, batch=6, shuffle=False)
    replay = ReplayMixing(memory(), 0.25)
    fit(net, replay, epochs=3, overfit_batches=2)
    assert len(net.seen) == 6
    assert net.seen[:2] == net.seen[2:4] == net.seen[4:6]
    old, rows = map(sum, zip(*every_step(net), strict=True))
    assert replay.drawn is not None
    assert abs(old / rows - 0.25) < 1 / 6


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", [Counting, Rehearsing])
def test_loaders_made_anew_change_nothing(kind, every, fit):
    nets = [kind(), kind()]
    for net, options in zip(nets, ({}, {"reload_dataloaders_every_n_epochs": every}), strict=True):
        torch.manual_seed(3)
        fit(net, ReplayMixing(memory(), 0.25), epochs=3, **options)
    assert old_rows(nets[0]) == old_rows(nets[1])
    if kind is Counting:
        assert nets[0].seen == nets[1].seen


def test_workers_that_are_kept_see_every_epoch(fit):
    nets = [Counting(), Counting(num_workers=1, persistent_workers=True)]
    for net in nets:
        fit(net, ReplayMixing(memory(), 0.25), epochs=3)
    assert nets[0].seen == nets[1].seen


def test_a_memory_that_grows_between_fits_is_drawn_from_whole(fit):
    class Grows(list):
        pass

    rows = Grows(memory(3))
    replay = ReplayMixing(rows, 0.25)
    fit(Counting(), replay)
    rows.extend(memory(7)[i] for i in range(3, 7))
    net = Counting()
    fit(net, replay, epochs=2)
    assert {row for step in net.seen for row in step if row >= OLD} > {OLD, OLD + 1, OLD + 2}


class Many(list):
    asked = ()

    def __getitems__(self, indices):
        self.asked = (*self.asked, tuple(indices))
        return [self[i] for i in indices]


def test_rows_are_asked_for_together_where_a_dataset_can():
    new, old = Many(range(5)), list(range(10, 13))
    both = Both(new, old)
    loader = DataLoader(both, batch_sampler=[[4, 5, 0], [7, 6]])
    assert [batch.tolist() for batch in loader] == [[4, 10, 0], [12, 11]]
    assert new.asked == ((4, 0), ())
    assert not hasattr(Both([1], [2]), "__getitems__")


# --- batch normalisation ----------------------------------------------------------------------------------------------


class WithNorm:
    """Running statistics that are those of the last forward, over the rows' numbers."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.norm = torch.nn.BatchNorm1d(4, momentum=1.0)
        self.means: list[float] = []

    def forward(self, x):
        self.norm(x)
        return super().forward(x)

    def on_train_batch_end(self, *_):
        self.means.append(float(self.norm.running_mean[0]))


def test_mixed_in_old_and_new_rows_are_normalised_together_in_one_forward(fit):
    net = type("Net", (WithNorm, Counting), {})(new=24, batch=6)
    fit(net, ReplayMixing(memory(), 0.5))
    assert int(net.norm.num_batches_tracked) == len(net.seen)
    assert all(0 < sum(row >= OLD for row in step) < len(step) for step in net.seen)
    assert net.means == pytest.approx([sum(step) / len(step) for step in net.seen], rel=1e-6)


def test_beside_they_are_normalised_apart_first_the_new_and_then_the_old(fit):
    net = type("Net", (WithNorm, Rehearsing), {})(new=24, batch=6)
    fit(net, ReplayMixing(memory(), 0.5))
    assert int(net.norm.num_batches_tracked) == 2 * len(net.seen)
    assert net.means == pytest.approx([sum(rows) / len(rows) for _, rows in net.replayed], rel=1e-6)

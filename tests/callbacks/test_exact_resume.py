"""A run that was killed and resumed ends with the weights of one that was not, bit for bit."""

import copy
import pickle
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from lightning_peft import ReplayMixin
from lightning_peft.callbacks import ExactResume, FreezeSchedule, Phase, ReplayMixing
from tests.toy import Toy, rows, same, weights


class Noisy(Dataset):
    """Rows that are transformed at random as they are read, by all three generators."""

    def __init__(self, count=24):
        self.rows = rows(count)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        x, y = self.rows[index]
        return x + 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y


def shuffled():
    return DataLoader(Noisy(), 6, shuffle=True)


class Net(Toy):
    """Dropout, shuffling, a validation that draws too."""

    def __init__(self, loader=shuffled):
        torch.manual_seed(3)
        super().__init__(dropout=0.3)
        self.loader = loader

    def train_dataloader(self):
        return self.loader()

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        return sum(F.cross_entropy(self(x), y) for x, y in parts)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def val_dataloader(self):
        return DataLoader(Noisy(8), 4, shuffle=True)


class KilledError(Exception):
    """What stops a run as a kill would: no hook of its end runs."""


class KillAt(pl.Callback):
    """Stop after so many batches, once the checkpoint of that batch is written."""

    def __init__(self, batches):
        self.left = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left == 0:
            raise KilledError
        self.left -= 1


def resumed_and_whole(fit, tmp_path, make, *, stop, epochs=3, callbacks=tuple, resume=ExactResume, **options):
    """The weights of a run that was killed after ``stop`` batches and resumed, and of the same run in one piece."""

    def run(folder, *more, ckpt_path=None, seed=7):
        pl.seed_everything(seed, verbose=False)
        keep = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        try:
            net = make()
            fit(net, resume(), *callbacks(), *more, keep, epochs=epochs, ckpt_path=ckpt_path, **options)
        except KilledError:
            return None
        return weights(net)

    whole = run("whole")
    assert run("killed", KillAt(stop)) is None
    return run("killed", KillAt(-1), ckpt_path=tmp_path / "killed" / "last.ckpt", seed=99), whole


def generator_of_its_own():
    return DataLoader(Noisy(), 6, shuffle=True, generator=torch.Generator().manual_seed(11))


class Shuffles:
    """A sampler of the user's own, with a generator under a name of its own."""

    def __init__(self, rng):
        self.rng = rng

    def __iter__(self):
        if isinstance(self.rng, torch.Generator):
            return iter(torch.randperm(24, generator=self.rng).tolist())
        return iter(self.rng.permutation(24).tolist())

    def __len__(self):
        return 24


LOADERS = {
    "a generator of another name": lambda: DataLoader(Noisy(), 6, sampler=Shuffles(torch.Generator().manual_seed(4))),
    "shuffled": shuffled,
    "in order": lambda: DataLoader(Noisy(), 6),
    "a generator of its own": generator_of_its_own,
    "an uneven end": lambda: DataLoader(Noisy(22), 6, shuffle=True),
    "weighted": lambda: DataLoader(Noisy(), 6, sampler=WeightedRandomSampler([1.0] * 24, 24)),
    "a batch sampler": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(24)), 6, False)),
    "a generator inside a batch sampler": lambda: DataLoader(
        Noisy(),
        batch_sampler=BatchSampler(RandomSampler(range(24), generator=torch.Generator().manual_seed(5)), 6, False),
    ),
    "two loaders": lambda: {
        "long": DataLoader(Noisy(), 6, shuffle=True),
        "short": DataLoader(Noisy(12), 5, shuffle=True),  # cycled
    },
    "combined": lambda: CombinedLoader(
        {"a": DataLoader(Noisy(), 6, shuffle=True), "b": DataLoader(Noisy(30), 6, shuffle=True)}, "min_size"
    ),
}


LARGE = pytest.mark.large


@pytest.mark.parametrize("stop", [3, 4, 5, *(pytest.param(stop, marks=LARGE) for stop in (1, 2, 6, 7, 8, 9, 10, 11))])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_run_ends_as_one_in_one_piece(loader, stop, fit, tmp_path):
    again, whole = resumed_and_whole(fit, tmp_path, lambda: Net(LOADERS[loader]), stop=stop)
    assert same(again, whole)


def test_without_it_a_resumed_run_ends_elsewhere(fit, tmp_path):
    """Or the tests above would show nothing."""
    again, whole = resumed_and_whole(fit, tmp_path, Net, stop=5, resume=pl.Callback)
    assert not same(again, whole)


@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("reload", [False, True])
def test_worker_processes_go_on_and_exactly_if_their_rows_are_loaded_again(reload, stop, fit, tmp_path):
    data = Noisy() if reload else rows(24)  # without, the rows must not depend on what a worker drew
    again, whole = resumed_and_whole(
        fit,
        tmp_path,
        lambda: Net(lambda: DataLoader(data, 6, shuffle=True, num_workers=2)),
        stop=stop,
        epochs=2,
        resume=lambda: ExactResume(reload=reload),
    )
    assert same(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4, 6])
@pytest.mark.parametrize("reload", [False, True])
def test_worker_processes_that_are_kept_go_on(reload, stop, fit, tmp_path):
    def loader():
        return DataLoader(rows(24), 6, shuffle=True, num_workers=1, persistent_workers=True)

    again, whole = resumed_and_whole(
        fit, tmp_path, lambda: Net(loader), stop=stop, epochs=2, resume=lambda: ExactResume(reload=reload)
    )
    assert same(again, whole)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_optimizer_that_accumulates_while_another_steps_keeps_its_gradients(stop, fit, tmp_path):
    class Uneven(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.head, self.backbone)]

        def training_step(self, batch, batch_idx):
            often, seldom = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            often.step()
            often.zero_grad()
            if batch_idx % 2:
                seldom.step()
                seldom.zero_grad()

    def run(*more, ckpt_path=None, seed=7):
        pl.seed_everything(seed, verbose=False)
        net = Uneven()
        try:
            fit(net, ExactResume(), *more, ckpt_path=ckpt_path)
        except KilledError:
            return None
        return weights(net)

    class EachBatch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "each.ckpt")

    whole = run()
    assert run(EachBatch(), KillAt(stop)) is None
    assert same(run(ckpt_path=tmp_path / "each.ckpt", seed=99), whole)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7])
def test_gradients_that_are_half_accumulated_are_kept(stop, fit, tmp_path):
    """A checkpoint among accumulated gradients: asked for by a clock or by hand."""

    class EachBatch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "each.ckpt")

    def run(*more, ckpt_path=None, seed=7):
        pl.seed_everything(seed, verbose=False)
        net = Net()
        callbacks = [FreezeSchedule([Phase(["head.*"], steps=1), Phase(["*"])]), ExactResume(), *more]
        try:
            fit(net, *callbacks, epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.3, ckpt_path=ckpt_path)
        except KilledError:
            return None
        return weights(net)

    whole = run()
    assert run(EachBatch(), KillAt(stop)) is None
    kept = torch.load(tmp_path / "each.ckpt", weights_only=True)["callbacks"]["ExactResume"]["processes"][0]
    assert ("gradients" in kept) is bool(stop % 2)
    assert same(run(ckpt_path=tmp_path / "each.ckpt", seed=99), whole)


@pytest.mark.parametrize("stop", [1, 4, 9])
@pytest.mark.parametrize("beside", [False, True])
def test_replay_goes_on_too(beside, stop, fit, tmp_path):
    class Rehearses(ReplayMixin, Net):
        def replay_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    again, whole = resumed_and_whole(
        fit,
        tmp_path,
        Rehearses if beside else Net,
        stop=stop,
        callbacks=lambda: [ReplayMixing(Noisy(10), ratio=0.3)],
    )
    assert same(again, whole)


def test_validation_no_longer_changes_what_training_draws(fit):
    def run(*callbacks, **options):
        pl.seed_everything(7, verbose=False)
        net = Net()
        fit(net, *callbacks, epochs=2, **options)
        return weights(net)

    often, never = {"val_check_interval": 1}, {"limit_val_batches": 0}
    assert same(run(ExactResume(), **often), run(ExactResume(), **never))
    assert same(run(ExactResume(), **never), run(**never))  # it only observes
    assert not same(run(**often), run(**never))


def test_loaders_passed_to_fit_go_on(fit, tmp_path):
    again, whole = resumed_and_whole(
        fit, tmp_path, lambda: Net(lambda: None), stop=6, fit_with=(DataLoader(Noisy(), 6, shuffle=True),)
    )
    assert same(again, whole)


def test_a_loader_that_cannot_go_on_is_named(fit):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows(24))

    with pytest.warns(
        UserWarning, match=r"a training loader \(DataLoader\) cannot go on .* state_dict and load_state_dict"
    ):
        fit(Net(lambda: DataLoader(Stream(), 6)), ExactResume(), limit_val_batches=0)

    class Plain:
        def __iter__(self):
            return iter(DataLoader(rows(24), 6))

    with pytest.warns(UserWarning, match=r"a training loader \(Plain\) cannot go on"):
        fit(Net(Plain), ExactResume(), limit_val_batches=0)


def test_loaders_that_count_otherwise_are_named_and_left_alone(fit):
    class Halves(DataLoader):
        def __iter__(self):
            for x, y in super().__iter__():
                yield x[:3], y[:3]
                yield x[3:], y[3:]

    class NoLength:
        def __iter__(self):
            return iter([[0, 1], [2, 3]])

    for loader in (
        Halves(rows(24), 6),
        DataLoader(rows(24), batch_sampler=NoLength()),
        DataLoader(rows(24), 6, sampler=Shuffles(np.random.default_rng(3))),
        DataLoader(rows(24), 6, num_workers=1, in_order=False),
    ):
        with pytest.warns(UserWarning, match="cannot go on where it stopped"):
            fit(
                Net(lambda made=loader: made),
                ExactResume(),
                ModelCheckpoint(every_n_train_steps=1),
                limit_val_batches=0,
            )


def test_a_combined_loader_of_the_user_s_stays_what_it_was(fit):
    combined = CombinedLoader({"a": DataLoader(rows(24), 6, shuffle=True)}, "min_size")
    fit(Net(lambda: None), ExactResume(), fit_with=(combined,))
    assert [type(loader) for loader in combined.flattened] == [DataLoader]


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_loaders_that_are_made_anew_each_epoch_go_on(stop, fit, tmp_path):
    again, whole = resumed_and_whole(
        fit, tmp_path, lambda: Net(generator_of_its_own), stop=stop, reload_dataloaders_every_n_epochs=1
    )
    assert same(again, whole)


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
def test_a_step_that_takes_the_iterator_is_told_what_is_lost(fit):
    class Takes(Net):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.warns(UserWarning, match="training_step takes dataloader_iter, so which rows were used is not known"):
        fit(Takes(), ExactResume(), limit_val_batches=0)


def test_a_loader_that_leads_elsewhere_is_noticed(fit, tmp_path):
    counts = iter([24, 24, 23])

    def make():
        data = Noisy(next(counts))
        return Net(lambda: DataLoader(data, 6, shuffle=True))

    with pytest.warns(UserWarning, match="after 2 batches the training loader is not where the checkpoint was taken"):
        resumed_and_whole(fit, tmp_path, make, stop=2)


def test_a_checkpoint_without_it_says_what_is_lost(fit, tmp_path):
    fit(Net(), steps=2).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(
        UserWarning, match="written without ExactResume, so random numbers and the place in the data are lost"
    ):
        fit(Net(), ExactResume(), steps=3, ckpt_path=tmp_path / "plain.ckpt")


def test_a_checkpoint_of_another_number_of_processes_is_refused(fit, tmp_path):
    fit(Net(), ExactResume(), steps=2).save_checkpoint(tmp_path / "one.ckpt")
    kept = torch.load(tmp_path / "one.ckpt", weights_only=True)
    kept["callbacks"]["ExactResume"]["processes"] *= 2
    torch.save(kept, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="written by 2 processes, this run has 1"):
        fit(Net(), ExactResume(), steps=3, ckpt_path=tmp_path / "two.ckpt")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_made_in_a_run_begins_anew(again, fit):
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.copied = again(resume)

    resume, copies = ExactResume(reload=True), Copies()
    fit(Net(), resume, copies)
    assert copies.copied.reload
    fit(Net(), copies.copied)


def test_the_user_s_loader_stays_what_it_was(fit):
    loader = DataLoader(Noisy(), 6, shuffle=True)
    fit(Net(lambda: None), ExactResume(), fit_with=(loader,))
    assert type(loader) is DataLoader


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("writes_first", [False, True])
def test_a_checkpoint_that_a_validation_wrote_goes_on_too(writes_first, stop, fit, tmp_path):
    class AfterValidation(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "after.ckpt")

    def run(*more, ckpt_path=None, seed=7):
        pl.seed_everything(seed, verbose=False)
        net, writes = Net(), AfterValidation()
        callbacks = [writes, ExactResume()] if writes_first else [ExactResume(), writes]
        try:
            fit(net, *callbacks, *more, epochs=2, val_check_interval=2, ckpt_path=ckpt_path)
        except KilledError:
            return None
        return weights(net)

    whole = run()
    assert run(KillAt(stop)) is None
    assert same(run(ckpt_path=tmp_path / "after.ckpt", seed=99), whole)


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("after", ["validation", "epoch"])
@pytest.mark.parametrize("stop", [4, 8, 10])
def test_a_scheduler_that_waits_for_a_plateau_misses_no_look(after, frequency, stop, fit, tmp_path):
    """Lightning lets it look after the checkpoint of an epoch is written, and never again when it resumes."""

    class Waits(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            made = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            config = {"scheduler": made, "monitor": "val_loss", "interval": "epoch", "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": config}

    def run(folder, *more, ckpt_path=None, seed=7):
        pl.seed_everything(seed, verbose=False)
        keep = ModelCheckpoint(tmp_path / folder, save_last=True, save_on_train_epoch_end=after == "epoch")
        net = Waits()
        try:
            made = fit(net, ExactResume(), *more, keep, epochs=5, ckpt_path=ckpt_path)
        except KilledError:
            return None
        return weights(net), made.lr_scheduler_configs[0].scheduler.state_dict()

    end, state = run("whole")
    assert run("killed", KillAt(stop)) is None
    again, found = run("killed", KillAt(-1), ckpt_path=tmp_path / "killed" / "last.ckpt", seed=99)
    assert found == state
    assert same(again, end)

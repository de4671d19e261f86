"""A checkpoint that is written between a batch and what follows it: nothing that was left is left out, nothing comes twice."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft.callbacks import ExactResume, FreezeSchedule, Phase, Plateau
from tests.callbacks.test_exact_resume import Net, Noisy, generator_of_its_own
from tests.toy import same, weights

LARGE = pytest.mark.large
pytestmark = pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")  # before the first validation


class Records(Net):
    """Logs means of epochs, a torchmetrics object and a sum; keeps what it was told of each epoch's end."""

    def __init__(self, interval="epoch", monitor="val_loss", loader=generator_of_its_own, manual=False):
        super().__init__(loader)
        self.accuracy, self.interval, self.monitor = MulticlassAccuracy(2), interval, monitor
        self.ends, self.validations, self.trained = [], [], False
        self.automatic_optimization = not manual

    def on_train_start(self):
        self.trained = True

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = super().training_step(batch, batch_idx)
        self.accuracy(self(x), y)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("total", loss, on_epoch=True, on_step=False, reduce_fx="sum")
        self.log("largest", loss, on_epoch=True, on_step=False, reduce_fx="max")
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None

    def on_validation_epoch_end(self):
        self.validations.append((self.trainer.global_step, float(self.trainer.callback_metrics["val_loss"])))

    def on_train_epoch_end(self):
        self.ends.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if not self.automatic_optimization:
            return optimizer
        made = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        config = {"scheduler": made, "monitor": self.monitor, "interval": self.interval, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Everywhere(pl.Callback):
    """Write a checkpoint in each of these hooks; count them over the run."""

    def __init__(self, folder):
        self.folder, self.batches, self.written = folder, 0, []

    def on_train_batch_end(self, trainer, *_):
        self.batches += 1
        self._write(trainer, "batch")

    def on_validation_batch_end(self, trainer, *_):
        self._write(trainer, "validating")

    def on_validation_end(self, trainer, pl_module):
        self._write(trainer, "validated")

    def on_train_epoch_end(self, trainer, pl_module):
        self._write(trainer, "epoch")

    def on_train_end(self, trainer, pl_module):
        self._write(trainer, "end")

    def _write(self, trainer, hook):
        path = self.folder / f"{hook}-{self.batches}.ckpt"
        trainer.save_checkpoint(path)
        self.written.append(path)


def run(fit, net, *callbacks, seed=7, **options):
    pl.seed_everything(seed, verbose=False)
    blind = options.get("limit_val_batches") == 0
    until = Plateau("loss_epoch", patience=2, each="epoch") if blind else Plateau("val_loss", patience=2)
    phases = [Phase(["head.*"], until=until), Phase(["*"])]
    schedule = [FreezeSchedule(phases)] if net.automatic_optimization else []
    made = fit(net, ExactResume(), *schedule, *callbacks, **{"epochs": 4, "num_sanity_val_steps": 0, **options})
    return SimpleNamespace(
        weights=weights(net),
        schedulers=[config.scheduler.state_dict() for config in made.lr_scheduler_configs],
        phases=[one.state_dict() for one in schedule],
        logged_at=made.fit_loop.epoch_loop._batches_that_stepped,
        steps=made.global_step,
        net=net,
    )


def assert_all_go_on(fit, make, folder, **options):
    """Resume from everywhere; each run must end as the whole one did, and do what that did from there on."""
    everywhere = Everywhere(folder)
    whole = run(fit, make(), everywhere, **options)
    assert len(everywhere.written) > 8
    for path in everywhere.written:
        again = run(fit, make(), ckpt_path=path, seed=99, **options)
        where = path.stem
        assert same(again.weights, whole.weights), where
        if again.net.trained:  # else the run was over
            assert again.schedulers == whole.schedulers, where
            assert again.phases == whole.phases, where
            assert (again.logged_at, again.steps) == (whole.logged_at, whole.steps), where
        ends, validations = len(again.net.ends), len(again.net.validations)
        assert again.net.ends == whole.net.ends[len(whole.net.ends) - ends :], where
        assert again.net.validations == whole.net.validations[len(whole.net.validations) - validations :], where
        if where.startswith("batch"):
            begun = int(where.partition("-")[2])
            assert ends == again.net.trained * sum(4 * (epoch + 1) >= begun for epoch in range(len(whole.net.ends))), (
                where
            )


@pytest.mark.parametrize(
    ("interval", "monitor", "each"),
    [
        ("epoch", "val_loss", 4),
        ("step", "val_loss", 3),
        pytest.param("epoch", "loss_epoch", 2, marks=LARGE),
        pytest.param("epoch", "accuracy", 3, marks=LARGE),
        pytest.param("step", "loss_step", 4, marks=LARGE),
        pytest.param("step", "val_loss", 2, marks=LARGE),
    ],
)
def test_nothing_is_left_out_and_nothing_comes_twice(interval, monitor, each, fit, tmp_path):
    assert_all_go_on(fit, lambda: Records(interval, monitor), tmp_path, val_check_interval=each)


def test_steps_that_are_taken_by_hand_go_on(fit, tmp_path):
    assert_all_go_on(fit, lambda: Records(manual=True), tmp_path, val_check_interval=2)


@pytest.mark.parametrize("every", [pytest.param(1, marks=LARGE), 2, pytest.param(3, marks=LARGE)])
def test_loaders_made_anew_every_few_epochs_go_on(every, fit, tmp_path):
    assert_all_go_on(fit, Records, tmp_path, reload_dataloaders_every_n_epochs=every)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        pytest.param({"check_val_every_n_epoch": 2}, marks=LARGE),
        {"limit_val_batches": 0},
    ],
)
def test_other_rhythms_go_on(options, fit, tmp_path):
    monitor = "loss_epoch" if "limit_val_batches" in options else "val_loss"
    assert_all_go_on(fit, lambda: Records(monitor=monitor), tmp_path, **options)


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"val_check_interval": 3}])
def test_a_run_counted_by_steps_takes_no_batch_more(options, fit, tmp_path):
    assert_all_go_on(fit, lambda: Records("step", "loss_step"), tmp_path, epochs=-1, max_steps=10, **options)


def test_a_finished_run_goes_on_as_a_longer_one(fit, tmp_path):
    everywhere = Everywhere(tmp_path)
    run(fit, Records(), everywhere, epochs=2)
    whole = run(fit, Records(), epochs=4)
    again = run(fit, Records(), ckpt_path=everywhere.written[-1], seed=99, epochs=4)
    assert same(again.weights, whole.weights)
    assert again.net.ends == whole.net.ends[2:]
    assert again.schedulers == whole.schedulers


def test_without_it_the_end_of_the_epoch_is_left_out(fit, tmp_path):
    """What Lightning does by itself: if this fails, much of the callback can go."""
    everywhere = Everywhere(tmp_path)
    whole, again = Records(), Records()
    fit(whole, everywhere, epochs=2, num_sanity_val_steps=0)
    fit(again, epochs=2, ckpt_path=tmp_path / "batch-4.ckpt")
    assert len(whole.ends) == 2
    assert len(again.ends) == 1


def test_metrics_of_a_module_that_has_fewer_now_are_let_go(fit, tmp_path):
    class Fewer(Records):
        def __init__(self):
            super().__init__()
            del self.accuracy

        def training_step(self, batch, batch_idx):
            return Net.training_step(self, batch, batch_idx)

    everywhere = Everywhere(tmp_path)
    run(fit, Records(), everywhere, epochs=1)
    net = Fewer()
    run(fit, net, ckpt_path=tmp_path / "batch-2.ckpt", epochs=1)
    assert len(net.ends) == 1


def test_a_loader_s_rows_are_not_loaded_again_at_the_end_of_an_epoch(fit, tmp_path):
    asked = []

    class Counted(Noisy):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    def make():
        return Records(loader=lambda: DataLoader(Counted(), 6, shuffle=True))

    run(fit, make(), Everywhere(tmp_path), epochs=2)
    asked.clear()
    run(fit, make(), ckpt_path=tmp_path / "batch-4.ckpt", epochs=2)
    assert len(asked) == 24


def test_a_checkpoint_before_any_training_is_written(trainer, tmp_path):
    made = trainer(ExactResume())
    made.strategy.connect(Records())
    made.save_checkpoint(tmp_path / "before.ckpt")
    assert (tmp_path / "before.ckpt").exists()

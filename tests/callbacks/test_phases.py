"""What ends a phase: a metric that is flat, or a function; presets; frozen layers that do not move at all."""

import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft.callbacks import FreezeSchedule, Phase, Plateau
from tests.callbacks.test_freeze_schedule import ALL, HEAD, Moved
from tests.toy import Batches, Toy, rows, same, weights

VALUES = [1.0, 0.8, 0.9, 0.85, 0.9, 0.95]


class Scripted(Toy):
    """Logs a metric that is known beforehand, after every validation and every epoch."""

    def __init__(self, values=VALUES, skip: int = 0) -> None:
        super().__init__()
        self.values, self.skip = list(values), skip
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def train_dataloader(self):
        return Batches(self.skip)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(rows(6), 6)

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val_loss", self.values[int(self.seen)])
            self.seen += 1


class Loud(Scripted):
    def training_step(self, batch, batch_idx):
        self.log("quality", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def steps(moved: Moved) -> list[int]:
    """How many steps trained the head, then everything, then the head again, ..."""
    runs = [[moved.steps[0], 0]]
    for step in moved.steps:
        if step != runs[-1][0]:
            runs.append([step, 0])
        runs[-1][1] += 1
    assert all(names in (HEAD, ALL) for names, _ in runs)
    return [count for _, count in runs]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 2, 2, 2, 1, 1], {"patience": 2}, [4 * 4, 2 * 4]),
        ([3, 2, 2.5, 1.9, 2, 2], {"patience": 2}, [6 * 4]),  # seen after the last epoch: too late
        ([3, 2, 2.5, 1.9, 2, 2], {"patience": 2, "min_delta": 0.2}, [4 * 4, 2 * 4]),
        ([1, 2, 3, 3, 3, 3], {"patience": 1, "mode": "max"}, [4 * 4, 2 * 4]),
        ([1, 1, 1, 1, 1, 1], {"patience": 3}, [4 * 4, 2 * 4]),
    ],
)
def test_a_phase_ends_when_the_metric_is_flat(values, options, expected, fit):
    moved = Moved()
    schedule = FreezeSchedule([Phase(["head.*"], until=Plateau("val_loss", **options)), Phase(["*"])])
    fit(Scripted(values), schedule, moved, epochs=6)
    assert steps(moved) == expected


def test_a_validation_in_mid_epoch_ends_the_phase_at_the_next_step(fit):
    moved = Moved()
    schedule = FreezeSchedule([Phase(["head.*"], until=Plateau("val_loss", patience=1)), Phase(["*"])])
    fit(Scripted([1, 0.5, 0.5, 0, 0, 0]), schedule, moved, epochs=2, val_check_interval=2)
    assert steps(moved) == [6, 2]


def test_it_never_ends_among_accumulated_gradients(fit):
    moved = Moved()
    schedule = FreezeSchedule([Phase(["head.*"], until=Plateau("val_loss", patience=1)), Phase(["*"])])
    fit(Scripted([1, 1, 1, 1]), schedule, moved, epochs=1, val_check_interval=1, accumulate_grad_batches=4)
    assert [step for step in moved.steps if step] == [HEAD]
    moved = Moved()
    fit(Scripted([1] * 8), schedule, moved, epochs=2, val_check_interval=1, accumulate_grad_batches=2)
    assert [step for step in moved.steps if step] == [HEAD, ALL, ALL, ALL]


def test_a_metric_of_training_is_looked_at_after_each_epoch(fit):
    moved = Moved()
    schedule = FreezeSchedule([Phase(["head.*"], until=Plateau("quality", 2, each="epoch")), Phase(["*"])])
    fit(Loud(), schedule, moved, epochs=5)
    assert steps(moved) == [3 * 4, 2 * 4]


def test_the_same_plateau_starts_anew_in_each_phase_that_has_it(fit):
    moved, plateau = Moved(), Plateau("val_loss", patience=1)
    turns = [Phase(["head.*"], until=plateau), Phase(["*"], until=plateau), Phase(["head.*"])]
    fit(Scripted([1, 1, 5, 5, 5]), FreezeSchedule(turns), moved, epochs=5)
    assert steps(moved) == [2 * 4, 2 * 4, 1 * 4]


def enough(trainer, module) -> bool:
    return trainer.global_step % 3 == 0


def test_a_function_ends_the_phase_after_the_step_it_says(fit):
    moved = Moved()
    turns = [Phase(["head.*"], until=enough), Phase(["*"], until=enough), Phase(["head.*"])]
    fit(Scripted(), FreezeSchedule(turns), moved, epochs=2)
    assert steps(moved) == [3, 3, 2]


@pytest.mark.parametrize("until", [Plateau("val_loss", patience=2), enough], ids=["plateau", "function"])
@pytest.mark.parametrize("stop", range(1, 13))
def test_resuming_at_any_step_ends_the_phase_where_it_would_have_ended(stop, until, fit, tmp_path):
    def run(skip, ckpt_path=None):
        net = Scripted([1, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1], skip)
        schedule = FreezeSchedule([Phase(["head.*"], until=pickle.loads(pickle.dumps(until))), Phase(["*"])])
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1, filename="{step}")
        late = ModelCheckpoint(tmp_path / "late", save_top_k=-1, filename="{step}", save_on_train_epoch_end=False)
        fit(net, schedule, keep, late, epochs=4, val_check_interval=2, ckpt_path=ckpt_path)
        return net, schedule

    whole, schedule = run(0)
    # Lightning never makes up for a validation that was due when a checkpoint was written: there we take the one after it.
    kept = tmp_path / ("kept" if stop % 2 else "late") / f"step={stop}.ckpt"
    resumed, again = run(stop % 4, ckpt_path=kept)
    assert schedule.number == 1
    assert same(weights(resumed), weights(whole))
    assert again.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plateau("x", patience=0), "patience=0 must be a whole number"),
        (lambda: Plateau("x", mode="less"), "mode='less' is unknown; take one of min, max"),
        (lambda: Plateau("x", each="step"), "each='step' is unknown"),
        (lambda: Plateau("x", min_delta=-1), "min_delta=-1 must be finite"),
        (lambda: Phase(["*"], until=3), "until=3 must be a Plateau or a function"),
        (lambda: Phase(["*"], until=enough, steps=3), "steps=3 and until=.* exclude each other"),
        (
            lambda: FreezeSchedule.alternate(["a"], ["b"], rounds=2),
            "rounds=2 must be at least 1, and steps= or epochs=",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "until", "message"),
    [
        (Toy, Plateau("val_loss"), "needs validations, and the run has none"),
        (Scripted, Plateau("loss_of_val"), r"'loss_of_val' was not logged .* these were: .*'val_loss'"),
        (lambda: Scripted([float("nan")] * 2), Plateau("val_loss"), "'val_loss' is nan in epoch 0; training diverged"),
    ],
)
def test_a_metric_that_is_not_there_is_named(make, until, message, fit):
    with pytest.raises(ValueError, match=message):
        fit(make(), FreezeSchedule([Phase(["head.*"], until=until), Phase(["*"])]), epochs=2)


def test_presets():
    def trains(schedule):
        return [(phase.train, phase.end) for phase in schedule.phases]

    last = (["*"], "end of the run")
    blocks = ["head.*", "b.*", "a.*"]
    assert trains(FreezeSchedule.gradual(blocks, epochs=2)) == [
        *((blocks[:count], "2 epochs") for count in (1, 2, 3)), last,
    ]  # fmt: skip
    assert trains(FreezeSchedule.chain_thaw(blocks)) == [*(([block], "1 epoch") for block in blocks), last]
    assert trains(FreezeSchedule.surgical("a.*", "b.*")) == [(["a.*", "b.*"], "end of the run")]
    assert trains(FreezeSchedule.alternate(["a"], ["b"], rounds=2, steps=5)) == [
        (["a"], "5 steps"), (["b"], "5 steps"), (["a"], "5 steps"), (["b"], "end of the run"),
    ]  # fmt: skip


def test_describe_prints_what_trains_in_each_phase(net, capsys):
    phases = [Phase(["head.*"], until=Plateau("val_loss", 2)), Phase(["backbone.0.*"], steps=1), Phase(["*"])]
    table = FreezeSchedule(phases).describe(net)
    counts = [sum(p.numel() for name, p in net.named_parameters() if name.startswith(start))
              for start in ("head", "backbone.0", "")]  # fmt: skip
    assert list(table.columns[4].cells) == [f"{count:,}" for count in counts]
    printed = capsys.readouterr().out
    assert all(end in printed for end in ("val_loss flat for 2", "1 step ", "end of the run"))
    with pytest.raises(ValueError, match=r"phase 0: no parameter|tail"):
        FreezeSchedule.surgical("tail.*").describe(net)


class Normed(Toy):
    """With batch normalisation, with and without parameters, and dropout, in both of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)
        )
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


class Modes(pl.Callback):
    """Which layers ran in training mode, at every step; and a user's own call of train() before each."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(
            {name for name, layer in pl_module.named_modules() if layer.training and not list(layer.children())}
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.train()


def test_frozen_batch_norm_does_not_move_and_dropout_is_as_the_phase_says(fit):
    net, modes = Normed(), Modes()
    before = weights(net)
    everything = {name for name, layer in net.named_modules() if not list(layer.children())}
    norms, dropout = {"backbone.1", "backbone.4"}, {"backbone.2"}
    phases = [Phase(["head.*"], steps=2), Phase(["head.*"], steps=2, frozen_dropout=False), Phase(["*"], steps=1)]
    fit(net, FreezeSchedule([*phases, Phase(["head.*"])]), modes, epochs=2)
    assert modes.steps == [
        *[everything - norms] * 2, *[everything - norms - dropout] * 2, everything, *[everything - norms] * 3
    ]  # fmt: skip
    assert int(net.backbone[1].num_batches_tracked) == int(net.backbone[4].num_batches_tracked) == 1
    assert int(net.head[0].num_batches_tracked) == 8
    assert all(layer.training for layer in net.modules())
    net = Normed()
    net.load_state_dict(before)
    fit(net, FreezeSchedule([Phase(["head.*"])]), epochs=2)
    after = weights(net)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith("head.")
    }


def test_a_layer_that_the_user_keeps_in_eval_mode_stays_in_it(fit):
    net = Normed()
    net.backbone[1].eval()
    fit(net, FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"])]), epochs=1)
    assert not net.backbone[1].training
    assert net.backbone[4].training

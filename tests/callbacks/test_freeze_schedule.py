"""What trains when: exact steps, exact resume, and nothing thawed by accident."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_peft import LoRA, LoRAMixin
from lightning_peft.callbacks import FreezeSchedule, Phase
from lightning_peft.freezing import trainable_names
from tests.toy import Batches, Toy, same, weights


class LoRAToy(LoRAMixin, Toy):
    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))


class Moved(pl.Callback):
    """Which parameters each step moved."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = weights(pl_module)
        self.steps.append({name for name in after if not torch.equal(after[name], self.before[name])})


HEAD = {"head.weight", "head.bias"}
ALL = HEAD | {f"backbone.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
UPPER = HEAD | {"backbone.2.weight", "backbone.2.bias"}


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([Phase(["head.*"], steps=3), Phase(["*"])], [HEAD] * 3 + [ALL] * 5),
        ([Phase(["head.*"], epochs=1), Phase(["*"])], [HEAD] * 4 + [ALL] * 4),
        ([Phase(["head.*"], steps=2), Phase(["head.*", "backbone.2.*"], steps=3), Phase(["*"])],
         [HEAD] * 2 + [UPPER] * 3 + [ALL] * 3),
        ([Phase(["*"], steps=3), Phase(["head.*"])], [ALL] * 3 + [HEAD] * 5),
        ([Phase(["head.*"], epochs=1), Phase(["*"], steps=2), Phase(["head.*"])], [HEAD] * 4 + [ALL] * 2 + [HEAD] * 2),
        ([Phase(["head.*"], steps=2), Phase(["*"], epochs=1), Phase(["head.*"])], [HEAD] * 2 + [ALL] * 2 + [HEAD] * 4),
        ([Phase(["head.*"], steps=4), Phase(["*"], epochs=1), Phase(["head.*"])], [HEAD] * 4 + [ALL] * 4),
        ([Phase(["head.*"], steps=1)], [HEAD] * 8),
    ],
)  # fmt: skip
def test_exactly_the_phase_s_parameters_move_in_each_step(phases, expected, net, fit):
    moved = Moved()
    fit(net, FreezeSchedule(phases), moved, epochs=2)
    # Exact, not close: momentum and weight decay would move a weight that is only "almost" frozen.
    assert moved.steps == expected


def test_head_first_is_the_head_then_everything(net, fit):
    moved = Moved()
    fit(net, FreezeSchedule.head_first("head", steps=2), moved)
    assert moved.steps == [HEAD] * 2 + [ALL] * 2


def test_a_phase_counts_optimizer_steps_under_accumulation(net, fit):
    moved = Moved()
    fit(net, FreezeSchedule.head_first("head", steps=1), moved, accumulate_grad_batches=2)
    assert moved.steps == [set(), HEAD, set(), ALL]


def test_the_star_never_thaws_the_base_under_a_lora(fit):
    net = LoRAToy()
    fit(net, FreezeSchedule.head_first("head", steps=1))
    assert torch.equal(net.backbone[0].weight, Toy().backbone[0].weight)
    assert net.backbone[0].adapters["default"].lora_B.abs().max() > 0


def test_thaw_base_frees_the_base_although_the_optimizer_filters(fit, tmp_path):
    net = LoRAToy()
    schedule = FreezeSchedule([Phase(["head.*"], steps=1), Phase(["*"], steps=1, thaw_base=True), Phase(["head.*"])])
    moved = Moved()
    trainer = fit(net, schedule, moved)
    assert moved.steps[0] == HEAD
    assert {"backbone.0.weight", "backbone.0.adapters.default.lora_B"} < moved.steps[1]
    assert moved.steps[2:] == [HEAD, HEAD]
    # The base has left the pretrained weights: the checkpoint must hold it, also now that it is frozen again.
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = LoRAToy.load_from_checkpoint(tmp_path / "net.ckpt")
    assert same(weights(again), weights(net))


def test_a_checkpoint_from_before_the_thaw_loads_into_the_same_run(fit, tmp_path):
    net = LoRAToy()
    schedule = FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"], thaw_base=True)])
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    fit(net, schedule, keep)
    net.on_load_checkpoint(early := torch.load(tmp_path / "kept" / "step=1.ckpt", weights_only=True))
    net.load_state_dict(early["state_dict"])
    assert torch.equal(net.backbone[0].weight, Toy().backbone[0].weight)


@pytest.mark.parametrize("stop", range(1, 9))
@pytest.mark.parametrize(
    "phases",
    [
        [Phase(["head.*"], steps=3), Phase(["*"], steps=2), Phase(["head.*", "backbone.2.*"])],
        [Phase(["head.*"], epochs=1), Phase(["*"])],
    ],
)
def test_resuming_at_any_step_goes_on_as_if_nothing_had_happened(phases, stop, fit, tmp_path):
    def run(skip, ckpt_path=None):
        net = Toy()
        net.train_dataloader = lambda: Batches(skip)
        schedule = FreezeSchedule(phases)
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1, filename="{step}")
        fit(net, schedule, keep, epochs=3, ckpt_path=ckpt_path)
        return net, schedule

    whole, schedule = run(0)
    pl.seed_everything(99, verbose=False)
    resumed, again = run(stop % 4, ckpt_path=tmp_path / "kept" / f"step={stop}.ckpt")
    assert same(weights(resumed), weights(whole))
    assert again.state_dict() == schedule.state_dict()


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # torch's own SequentialLR, up to 2.6
@pytest.mark.parametrize("scheduler", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR", "SequentialLR", "StepLR"])
def test_learning_rate_schedulers_go_on_as_without_a_schedule(scheduler, fit):
    class Scheduled(Toy):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            module = torch.optim.lr_scheduler
            made = {
                "LambdaLR": lambda: module.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
                "OneCycleLR": lambda: module.OneCycleLR(optimizer, 0.1, total_steps=20),
                "CosineAnnealingLR": lambda: module.CosineAnnealingLR(optimizer, 10),
                "SequentialLR": lambda: module.SequentialLR(
                    optimizer, [module.ConstantLR(optimizer), module.ExponentialLR(optimizer, 0.9)], [3]
                ),
                "StepLR": lambda: module.StepLR(optimizer, 2),
            }[scheduler]()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}

    rates = []
    for callbacks in ([], [FreezeSchedule.head_first("head", steps=3)]):
        trainer = fit(Scheduled(), *callbacks, epochs=2)
        rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
    assert rates[0] == rates[1]


def test_flags_are_given_back_at_the_end_and_after_an_interruption(net, fit):
    found = trainable_names(net)
    fit(net, FreezeSchedule([Phase(["head.*"])]))
    assert trainable_names(net) == found

    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(net, FreezeSchedule([Phase(["head.*"])]), Interrupt())
    assert trainable_names(net) == found


def test_a_second_fit_with_the_same_schedule_starts_it_anew(net, fit):
    schedule = FreezeSchedule.head_first("head", steps=2)
    fit(net, schedule)
    moved = Moved()
    fit(net, schedule, moved)
    assert moved.steps == [HEAD] * 2 + [ALL] * 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_is_a_schedule_of_its_own(again, net, fit):
    schedule = FreezeSchedule.head_first("head", steps=2)
    fit(net, again(schedule))
    assert schedule.number == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase([]), r"train=\[\] must be a list"),
        (lambda: Phase("head.*"), "train='head.*' must be a list"),
        (lambda: Phase(["*"], epochs=1, steps=1), "exclude each other"),
        (lambda: Phase(["*"], steps=0), "steps=0 must be a whole number"),
        (lambda: FreezeSchedule([]), r"phases=\[\] is empty"),
        (lambda: FreezeSchedule([Phase(["*"]), Phase(["*"])]), "phase 0 .* needs epochs=, steps= or until="),
    ],
)
def test_bad_input_is_refused_when_it_is_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def before_training(net, fit, phases, message, **options):
    moved = Moved()
    with pytest.raises(ValueError, match=message):
        fit(net, FreezeSchedule(phases), moved, **options)
    assert moved.steps == []


def test_bad_names_are_refused_before_the_first_step_of_any_phase(net, fit):
    phases = [Phase(["*"], epochs=50), Phase(["haed.*"])]
    before_training(net, fit, phases, r"phase 1: 'haed.\*' matches none of 6 parameters. Nearest: head.")


def test_a_phase_of_frozen_parameters_only_says_thaw_base(fit):
    phases = [Phase(["head.*"], epochs=1), Phase(["backbone.*.weight"])]
    before_training(LoRAToy(), fit, phases, r"matches 2 parameters, all of them frozen .* thaw_base=True")


def test_a_parameter_that_no_optimizer_holds_is_an_error(fit):
    class HeadOnly(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    before_training(HeadOnly(), fit, [Phase(["head.*"], steps=1), Phase(["*"])],
                    r"phase 1 trains 4 parameters that no optimizer holds, first \['backbone.0.weight'")  # fmt: skip


def test_a_checkpoint_of_a_longer_schedule_is_refused(net, fit, tmp_path):
    long = FreezeSchedule([Phase(["head.*"], steps=1), Phase(["*"], steps=1), Phase(["head.*"])])
    fit(net, long, steps=3).save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match="in phase 2, but this schedule has 1 phases"):
        fit(Toy(), FreezeSchedule([Phase(["*"])]), ckpt_path=tmp_path / "net.ckpt", steps=4)


def test_the_log_is_a_staircase_with_a_riser_at_each_change_and_a_tread_to_the_end(net, fit, tmp_path):
    phases = [Phase(["head.*"], steps=2), Phase(["*"], epochs=1), Phase(["head.*"])]
    fit(net, FreezeSchedule(phases), epochs=2, logger=TensorBoardLogger(tmp_path, name="", version=""))
    log = EventAccumulator(str(tmp_path)).Reload()
    drawn = [(event.step, int(event.value)) for event in log.Scalars("schedule/phase")]
    assert drawn == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (8, 2)]
    head, whole = (sum(p.numel() for p in part.parameters()) for part in (net.head, net))
    counts = [int(event.value) for event in log.Scalars("schedule/trainable_parameters")]
    assert counts == [head, head, whole, whole, head, head]

"""What goes together: the cells of docs/composition.md, the order of callbacks, and the pairs that are hard."""

import copy
import csv
import itertools
import json
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_peft import LinearProbeMixin, callbacks, mixins
from lightning_peft.callbacks import ForgettingEvaluation, FreezeSchedule, OldTask, Phase, ReplayMixing, ZeroInitHead
from lightning_peft.recipes import keep_what_it_knows
from tests import composition
from tests.composition import CALLBACKS, FEATURES, MODULES
from tests.toy import Toy, rows, same, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:WeightDrift. weight decay of SGD"),  # the toy's has momentum
    pytest.mark.filterwarnings("ignore:DecayToPretrained. SGD also decays"),
    # torch.compile itself looks at the .grad of a loss that crosses a break of its graph
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
PAIRWISE = composition.pairwise()


def told() -> dict[str, str]:
    """The table as it stands in docs/, by "mixin / callback / feature"."""
    found = {}
    for part in (composition.ROOT / "docs" / "composition.md").read_text().split("\n### ")[1:]:
        module, *lines = part.splitlines()
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        for name, *cells in table[2:]:
            found |= {f"{module} / {name} / {feature}": cell for feature, cell in zip(FEATURES, cells, strict=True)}
    return found


def test_every_public_mixin_and_callback_has_its_place():
    public = {
        name for name, kind in vars(callbacks).items() if isinstance(kind, type) and issubclass(kind, pl.Callback)
    }
    assert CALLBACKS.keys() == public
    # AdapterMixin is what adapted() puts before a module; some presets of MAMLMixin add nothing but a setting.
    settings = {
        name
        for name in mixins.__all__
        if isinstance(kind := getattr(mixins, name), type) and "preset" in vars(kind) and "outer_loss" not in vars(kind)
    } - {"MAMLMixin"}
    assert settings == {"FOMAMLMixin", "ANILMixin", "MetaSGDMixin"}
    assert MODULES.keys() - {"no mixin"} == set(mixins.__all__) - {"AdapterMixin"} - settings


def test_the_pairs_are_all_there():
    for places in ((0, 1), (0, 2)):
        wanted, found = (
            {tuple(cell[place] for place in places) for cell in cells} for cells in (composition.everything(), PAIRWISE)
        )
        assert found == wanted
    usual = [name for name in CALLBACKS if name not in composition.PROTECTING]
    assert {cell[1:] for cell in PAIRWISE} >= set(itertools.product(usual, FEATURES))
    assert {cell[2] for cell in PAIRWISE if cell[1] in composition.PROTECTING} == set(FEATURES)


def test_no_cell_of_the_table_is_empty_or_bad():
    table = told()
    assert table.keys() == {" / ".join(names) for names in composition.everything()}
    assert [key for key, cell in table.items() if not re.fullmatch(r"(exact|refused \[\d+\])(; DDP: .*)?", cell)] == []


def test_an_empty_cell_fails():
    full = {" / ".join(names): "exact" for names in composition.everything()}
    assert "exact" in composition.table(full, full)
    with pytest.raises(KeyError):
        composition.table(full, dict(list(full.items())[1:]))


@pytest.mark.slow
def test_pairs_train_and_resume_as_the_table_says_in_one_process(tmp_path):
    agree(PAIRWISE, composition.all_cells(PAIRWISE, tmp_path))


@pytest.mark.slow
def test_a_third_of_the_pairs_trains_and_resumes_as_the_table_says_in_two_processes(tmp_path):
    sample = PAIRWISE[::3]  # the other cells are in the next test
    first, second = composition.two_processes(sample, tmp_path)
    assert first == second
    agree(sample, first, part=-1)


@pytest.mark.large
def test_all_cells_are_as_the_table_says(tmp_path):
    cells = composition.everything()
    agree(cells, composition.all_cells(cells, tmp_path / "one"))
    first, second = composition.two_processes(cells, tmp_path)
    assert first == second
    agree(cells, first, part=-1)


def agree(cells, found, part=0):
    """Compare what became of cells with the table; part -1 is what it says of two processes."""
    table = told()
    for key in map(" / ".join, cells):
        said = table[key].split("; DDP: ")[part].partition(" [")[0]
        assert found[key].partition(":")[0] == said, f"{key}: {found[key]}"


# --- order ------------------------------------------------------------------------------------------------------------


def error(module, batch):
    return module(batch[0]).softmax(1)[:, 1], batch[1].float()


def everything_at_once() -> list[pl.Callback]:
    old = OldTask(rows(20, seed=4), MeanSquaredError(), error)
    four = keep_what_it_knows(memory=rows(20, seed=3), old_tasks={"old": old}, head_steps=3, ratio=0.25)
    return [*four, EMAWeightAveraging(decay=0.5)]


def test_the_order_of_the_callbacks_does_not_matter(fit, tmp_path):
    found = []
    rotations = [[(place + turn) % 5 for place in range(5)] for turn in range(5)]
    for number, order in enumerate([*rotations, [4, 3, 2, 1, 0]]):  # each callback in each place
        pl.seed_everything(1, verbose=False)
        net, added = composition.Plain(), everything_at_once()
        logger = CSVLogger(tmp_path / str(number), name="", version="")
        fit(net, *(added[place] for place in order), epochs=2, logger=logger, log_every_n_steps=1)
        logger.save()
        found.append((weights(net), added[3].before, added[3].after, logged(tmp_path / str(number))))
    assert len(found) == 6
    for end, before, after, log in found[1:]:
        assert same(end, found[0][0])
        assert (before, after, log) == found[0][1:]


def logged(folder: Path) -> set[str]:
    """Return the cells of a log, whatever the order of its lines and columns."""
    with (folder / "metrics.csv").open(newline="") as stream:
        return {
            json.dumps([line["step"], key, value])
            for line in csv.DictReader(stream)
            for key, value in line.items()
            if value and key not in ("step", "epoch")
        }


# --- hard pairs -------------------------------------------------------------------------------------------------------


class Recorder(pl.Callback):
    """Keep every batch of a run, with the old rows beside it."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([part.clone() for part in batch])


def test_a_phase_ends_among_no_accumulated_gradients_with_replay(fit):
    """Three steps of two batches of head alone, then all: as a loop written by hand does it on the same batches."""
    net, recorder = composition.Plain(), Recorder()
    hand = copy.deepcopy(net)
    schedule, replay = FreezeSchedule.head_first("head", steps=3), ReplayMixing(rows(20, seed=3), ratio=0.25)
    trainer = fit(net, schedule, replay, recorder, epochs=2, accumulate_grad_batches=2)
    assert (trainer.global_step, len(recorder.batches)) == (6, 12)

    optimizer = hand.configure_optimizers()
    for step in range(6):
        for parameter in hand.backbone.parameters():
            parameter.requires_grad_(step >= 3)
        optimizer.zero_grad()
        for x, y in recorder.batches[2 * step : 2 * step + 2]:
            (F.cross_entropy(hand(x), y) / 2).backward()
        optimizer.step()
    assert same(weights(net), weights(hand))


def test_an_epoch_that_ends_in_mid_accumulation_ends_its_phase_after_the_step(fit):
    """Four batches, three to a step: Lightning steps at the epoch's end on one batch, and the phase changes after it."""
    net, moved = composition.Plain(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            moved.append(not torch.equal(pl_module.backbone[0].weight, start))

    start = net.backbone[0].weight.detach().clone()
    phases = [Phase(["head.*"], epochs=1), Phase(["*"])]
    trainer = fit(net, FreezeSchedule(phases), Watch(), epochs=2, accumulate_grad_batches=3)
    assert trainer.global_step == 4
    assert moved == [False] * 4 + [False, False, True, True]


def head_sum(module, batch):
    total = module.head.weight.sum().detach().reshape(1)
    return total, torch.zeros(1)


@pytest.mark.parametrize("first", [True, False])
def test_forgetting_is_that_of_the_averaged_weights_while_they_are_swapped_in(fit, first):
    """Every value is of the exponential mean of the weights so far, computed here by hand; training goes on without."""
    trail, seen = [], []

    class Trail(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trail.append(pl_module.head.weight.detach().clone())
            seen.append(trainer.callback_metrics["retained/sum"].item())

    net = composition.Plain()
    plain = copy.deepcopy(net)
    measure = ForgettingEvaluation({"sum": OldTask(rows(4), MeanSquaredError(), head_sum)}, every_n_steps=1)
    ours, average = [measure], [EMAWeightAveraging(decay=0.5)]
    fit(net, *(ours + average if first else average + ours), Trail(), epochs=2)
    fit(plain, EMAWeightAveraging(decay=0.5), epochs=2)
    assert same(weights(net), weights(plain))
    mean = trail[0]
    for now, value in zip(trail, seen, strict=True):
        mean = 0.5 * (mean + now)
        assert value == pytest.approx(mean.sum().item() ** 2, rel=1e-4)
    assert measure.after["sum"] == pytest.approx(mean.sum().item() ** 2, rel=1e-4)
    assert torch.allclose(net.head.weight, mean, atol=1e-6)


class Dropping(Toy):
    """A backbone with dropout and running statistics, which a probe must not move."""

    def __init__(self) -> None:
        super().__init__(lr=0.03)
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))

    def train_dataloader(self):
        return DataLoader(rows(24), 6)


class Probing(LinearProbeMixin, Dropping): ...


def test_a_probe_under_a_schedule_that_thaws_keeps_its_network_in_eval_and_resumes_exactly(fit, tmp_path):
    def run(**options):
        net = Probing()
        schedule = FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"], thaw_base=True)])
        save = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(net, ZeroInitHead(), schedule, save, epochs=3, **options)
        return net

    whole, start = run(), Dropping()
    assert not torch.equal(whole.backbone[0].weight, start.backbone[0].weight)
    assert torch.equal(whole.backbone[1].running_mean, torch.zeros(8))
    assert not whole.backbone.training
    assert same(weights(run(ckpt_path=tmp_path / "epoch=0.ckpt")), weights(whole))

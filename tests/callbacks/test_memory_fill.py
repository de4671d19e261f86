"""A buffer gets every row of the task once, replayed rows never, and training does not notice."""

import copy
import pickle
import threading
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_peft import ReplayMixin
from lightning_peft.callbacks import ExactResume, ReplayMixing, memory_fill
from lightning_peft.callbacks.memory_fill import MemoryFill
from lightning_peft.data.class_balanced_buffer import ClassBalancedBuffer
from lightning_peft.data.herding_buffer import HerdingBuffer, herding_order
from lightning_peft.data.reservoir_buffer import ReservoirBuffer
from lightning_peft.randomness import random_state
from tests.toy import Batches, Toy, rows, same, weights


def features(module, batch):
    return module.backbone(batch[0])


def logits(module, batch):
    return module(batch[0])


def filled(buffer, given):
    """The buffer after rows were offered by hand."""
    for row in given:
        buffer.add(row, label=row[1])
    buffer.end_task()
    return buffer


def plain(value):
    """A state in which tensors are lists, so that two can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(found) for name, found in value.items()}
    return [plain(found) for found in value] if isinstance(value, list | tuple) else value


def held(buffer):
    return plain(buffer.state_dict())


class Recorder(pl.Callback):
    """The rows of every batch, in order, by epoch."""

    def __init__(self) -> None:
        self.epochs = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.epochs.setdefault(trainer.current_epoch, []).extend(zip(*batch, strict=True))


KINDS = [lambda: ReservoirBuffer(7, 3), lambda: ClassBalancedBuffer(7, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_end_every_row_of_the_dataset_is_offered_once_in_its_order(net, fit, kind):
    buffer = kind()
    fit(net, MemoryFill(buffer, label=1), epochs=3)
    assert buffer.seen == 24
    assert held(buffer) == held(filled(kind(), rows(24)))


@pytest.mark.parametrize("kind", KINDS)
def test_during_batches_the_rows_of_the_first_epoch_are_offered_as_they_came(net, fit, kind):
    buffer, recorder = kind(), Recorder()
    fit(net, MemoryFill(buffer, during="batches", label=lambda row: row[1]), recorder, epochs=3)
    assert buffer.seen == 24
    assert held(buffer) == held(filled(kind(), recorder.epochs[0]))


def test_a_longer_later_epoch_gives_no_rows(fit):
    class Grows(Toy):
        def train_dataloader(self):
            return DataLoader(rows(12 * (self.trainer.current_epoch + 1)), 6)

    buffer = ReservoirBuffer(50)
    fit(Grows(), MemoryFill(buffer, during="batches"), epochs=2, reload_dataloaders_every_n_epochs=1)
    assert buffer.seen == 12


def test_looks_are_taken_without_gradient_in_eval_mode_and_in_the_trainer_s_precision(fit):
    def look(module, batch):
        seen.append((torch.is_grad_enabled(), any(m.training for m in module.modules()), module(batch[0]).dtype))
        return module(batch[0])

    for during in ("end", "batches"):
        seen, buffer = [], ReservoirBuffer(4)
        fit(Toy(dropout=0.1), MemoryFill(buffer, during=during, feature=look), precision="bf16-mixed")
        assert set(seen) == {(False, False, torch.bfloat16)}
        assert buffer.stored[0].feature.dtype == torch.bfloat16


def test_rows_may_be_others_than_the_training_loader_s(net, fit):
    for given in (rows(10, seed=4), DataLoader(rows(10, seed=4), 3, shuffle=True)):
        buffer = ReservoirBuffer(7)
        fit(net, MemoryFill(buffer, given, label=1))
        assert held(buffer) == held(filled(ReservoirBuffer(7), rows(10, seed=4)))


def test_herding_uses_the_features_of_the_trained_network(net, fit):
    buffer = HerdingBuffer(6)
    fit(net, MemoryFill(buffer, label=1, feature=features), epochs=2)
    x, y = rows(24).tensors
    with torch.no_grad():
        seen = net.backbone(x)
    for label in (0, 1):
        order = herding_order(seen[y == label], 3)
        chosen = [row[0] for row in buffer if row[1] == label]
        assert torch.equal(torch.stack(chosen), x[y == label][order])


def test_logits_are_those_of_the_weights_after_the_step_that_they_carry(fit):
    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept[trainer.global_step] = copy.deepcopy(pl_module.state_dict())

    kept, buffer, net = {}, ReservoirBuffer(24), Toy(dropout=0.5)
    fit(net, MemoryFill(buffer, during="batches", logits=logits), Weights())
    assert [stored.step for stored in buffer.stored] == [step for step in (1, 2, 3, 4) for _ in range(6)]
    for stored in buffer.stored:
        net.load_state_dict(kept[stored.step])
        net.eval()
        with torch.no_grad():
            torch.testing.assert_close(stored.logits, net(stored.row[0]))


class Noisy(Dataset):
    """Rows that draw a random number each time they are read."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index):
        x, y = rows(24)[index]
        return x + torch.randn(4), y


class Statistics(Toy):
    """With dropout, batch normalisation, and gradients that are accumulated."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.backbone.append(torch.nn.BatchNorm1d(8))
        self.backbone[0].eval()

    def train_dataloader(self):
        return DataLoader(Noisy(), 6, shuffle=True)


@pytest.mark.parametrize("during", ["end", "batches"])
def test_training_is_bit_identical_with_and_without_it(fit, during):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([m.training for m in pl_module.modules()])
            seen.append([None if p.grad is None else p.grad.tolist() for p in pl_module.parameters()])

    ends = []
    for watched in (False, True):
        pl.seed_everything(2, verbose=False)
        net, seen = Statistics(), []
        fill = MemoryFill(HerdingBuffer(6), during=during, label=1, feature=features, logits=logits)
        fit(net, *([fill] if watched else []), Look(), epochs=2, accumulate_grad_batches=3)
        ends.append((weights(net), seen, plain(random_state())))
    assert len(fill.buffer) == 6
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def memory(kind):
    return kind(5) if kind is HerdingBuffer else kind(5, 1)


def saves(folder):
    return pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("kind", [ReservoirBuffer, HerdingBuffer])
@pytest.mark.parametrize("during", ["end", "batches"])
def test_a_run_that_was_killed_after_any_step_and_resumed_ends_with_the_same_buffer(fit, tmp_path, during, kind):
    def fill():
        return MemoryFill(memory(kind), during=during, label=1, feature=features, logits=logits)

    whole = fill()
    fit(Toy(dropout=0.2), whole, ExactResume(), saves(tmp_path), epochs=2)
    assert whole.buffer.seen == 24
    for step in (1, 2, 4, 6, 8):
        again = fill()
        pl.seed_everything(100 + step, verbose=False)
        path = tmp_path / f"step={step}.ckpt"
        assert torch.load(path, weights_only=True)["callbacks"][again.state_key]["done"] is False
        fit(Toy(dropout=0.2), again, ExactResume(), saves(tmp_path), epochs=2, ckpt_path=path)
        assert held(again.buffer) == held(whole.buffer), step


def test_a_second_fit_of_a_trainer_that_was_killed_goes_on_in_its_own_first_epoch(trainer, fit, tmp_path):
    whole = MemoryFill(ReservoirBuffer(5), during="batches")
    made, net = trainer(whole, ExactResume(), saves(tmp_path), epochs=1), Toy()
    made.fit(net)
    made.fit_loop.max_epochs = 2
    made.fit(net)
    assert whole.buffer.seen == 48
    again = MemoryFill(ReservoirBuffer(5), during="batches")
    fit(Toy(), again, ExactResume(), saves(tmp_path), epochs=2, ckpt_path=tmp_path / "step=6.ckpt")
    assert again.buffer.seen == 48
    assert held(again.buffer) == held(whole.buffer)


@pytest.mark.parametrize("during", ["end", "batches"])
def test_a_checkpoint_of_the_end_goes_on_without_a_row_counted_twice(net, fit, tmp_path, during):
    fill = MemoryFill(ReservoirBuffer(5), during=during)
    fit(net, fill).save_checkpoint(tmp_path / "end.ckpt")
    again = MemoryFill(ReservoirBuffer(5), during=during)
    fit(Toy(), again, epochs=3, ckpt_path=tmp_path / "end.ckpt")
    assert again.buffer.seen == 24
    assert held(again.buffer) == held(fill.buffer)


def test_a_run_that_was_killed_after_its_last_epoch_still_gets_the_rows_of_the_end(fit, tmp_path):
    class Killed(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            raise KeyError("killed")

    def save():
        return pl.callbacks.ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)

    fill, ends = MemoryFill(HerdingBuffer(5), label=1, feature=features), []
    with pytest.raises(KeyError, match="killed"):
        fit(Toy(), Killed(), fill, save())
    assert fill.buffer.seen == 0
    for _ in range(2):
        again = MemoryFill(HerdingBuffer(5), label=1, feature=features)
        fit(Toy(), again, save(), ckpt_path=tmp_path / "last.ckpt")
        ends.append(held(again.buffer))
    assert len(again.buffer) == 5
    assert ends[0] == ends[1]


def test_a_batch_that_was_taken_is_not_taken_again(net, fit):
    class Twice(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            fill.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    fill = MemoryFill(ReservoirBuffer(5), during="batches")
    fit(net, fill, Twice())
    assert fill.buffer.seen == 24


class Task(Toy):
    """The toy on rows of a task of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self):
        return DataLoader(rows(24, seed=self.seed), 6, shuffle=True)


def test_over_a_sequence_of_tasks_replay_runs_and_no_replayed_row_is_put_back(fit):
    buffer = ReservoirBuffer(20, 1)
    net, fill = Task(), MemoryFill(buffer, label=1)
    fit(net, fill)
    for seed in (1, 2):
        net.seed, recorder, first = seed, Recorder(), held(buffer)
        old = {tuple(row[0].tolist()) for row in buffer}
        fit(net, ReplayMixing(buffer, ratio=0.25), fill, recorder)
        came = [row for row in recorder.epochs[0] if tuple(row[0].tolist()) in old]
        assert len(came) == 8  # a quarter of 32
        assert held(buffer) != first
    offered = [row for seed in (0, 1, 2) for row in rows(24, seed=seed)]
    assert buffer.seen == 72
    assert held(buffer) == held(filled(ReservoirBuffer(20, 1), offered))


class Distils(ReplayMixin, Task):
    """Dark experience replay: the squared distance to the stored logits."""

    def replay_step(self, batch):
        (x, _), stored, steps = batch
        self.steps.update(steps.tolist())
        return F.mse_loss(self(x), stored)


def test_stored_logits_are_replayed_beside_the_batches(fit):
    buffer, net = ReservoirBuffer(12), Task()
    fit(net, MemoryFill(buffer, logits=logits))
    student = Distils(seed=1)
    student.load_state_dict(net.state_dict())
    student.steps = set()
    other = ReservoirBuffer(12)
    mixing = ReplayMixing(DataLoader(buffer.with_logits(), 6), ratio=0.5)
    fit(student, mixing, MemoryFill(other, during="batches"), epochs=4)
    assert student.steps == {4}
    # Beside the batches nothing old is in them: every row is the new task's.
    new = {tuple(x.tolist()) for x in rows(24, seed=1).tensors[0]}
    assert {tuple(row[0].tolist()) for row in other} <= new
    # It stays closer to what the old network said than it does without.
    alone = Task(seed=1)
    alone.load_state_dict(net.state_dict())
    fit(alone, epochs=4)
    x, before = torch.stack([row[0] for row in buffer]), torch.stack([stored.logits for stored in buffer.stored])
    assert F.mse_loss(student(x), before) < F.mse_loss(alone(x), before) / 4


def test_batches_in_which_old_rows_are_mixed_are_refused(net, fit):
    old = rows(8, seed=5)
    with pytest.raises(ValueError, match="MemoryFill: old rows are mixed into the training batches"):
        fit(net, ReplayMixing(old, ratio=0.25), MemoryFill(ReservoirBuffer(5), during="batches"))


@pytest.mark.parametrize("of", [lambda buffer: buffer, lambda buffer: DataLoader(buffer.with_logits(), 2)])
def test_the_buffer_that_is_replayed_is_not_changed_under_the_replay(fit, of):
    buffer = ReservoirBuffer(5)
    for row in rows(5):
        buffer.add(row, logits=torch.ones(2), step=0)
    with pytest.raises(ValueError, match="MemoryFill: ReplayMixing replays from the buffer"):
        fit(Distils(), ReplayMixing(of(buffer), ratio=0.25), MemoryFill(buffer, during="batches"))


# --- ranks: the callback's own reduction, with two threads in place of two processes


def on_ranks(monkeypatch, world, work):
    """Run ``work(rank)`` in a thread for each rank, with gathering as processes do it; return what each gave."""
    local, barrier, slots = threading.local(), threading.Barrier(world), [None] * world
    results = [None] * world

    def gather(value):
        slots[local.rank] = pickle.dumps(value)
        barrier.wait(timeout=20)
        values = [pickle.loads(slot) for slot in slots]
        barrier.wait(timeout=20)
        return values

    def run(rank):
        local.rank = rank
        results[rank] = work(rank)

    monkeypatch.setattr(memory_fill, "gather_objects", gather)
    monkeypatch.setattr(memory_fill, "rank", lambda: local.rank)
    monkeypatch.setattr(memory_fill, "world_size", lambda: world)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def stub(data, **more):
    loader = DataLoader(data, 4)
    return SimpleNamespace(train_dataloader=loader, precision_plugin=None, current_epoch=0, global_step=0, **more)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_ends_with_the_buffer_of_one_process(monkeypatch, world):
    data = rows(22)  # six chunks, the last one smaller; with three ranks two turns, with two three

    def work(rank):
        fill = MemoryFill(ClassBalancedBuffer(7, 2), label=1)
        fill.on_train_end(stub(data), None)
        return held(fill.buffer)

    assert on_ranks(monkeypatch, world, work) == [held(filled(ClassBalancedBuffer(7, 2), data))] * world


def test_a_rank_without_a_chunk_of_its_own_looks_too_and_gives_nothing(monkeypatch):
    data, reads = TensorDataset(torch.arange(20.0)), [[], []]

    def work(rank):
        class Reads(Dataset):
            def __len__(self):
                return len(data)

            def __getitem__(self, index):
                reads[rank].append(index)
                return data[index]

        fill = MemoryFill(ReservoirBuffer(30))
        fill.on_train_end(stub(Reads()), None)
        return plain(list(fill.buffer))

    assert on_ranks(monkeypatch, 2, work) == [[[float(n)] for n in range(20)]] * 2
    assert [len(found) for found in reads] == [12, 12]


def test_the_rows_of_a_step_come_in_the_order_of_the_ranks(monkeypatch):
    def work(rank):
        fill = MemoryFill(ReservoirBuffer(30), during="batches")
        for step in range(3):
            fill.on_train_batch_end(stub([]), None, None, torch.arange(2) + 10 * rank + 100 * step, step)
        return plain(list(fill.buffer))

    wanted = [100 * step + 10 * rank + row for step in range(3) for rank in (0, 1) for row in (0, 1)]
    assert on_ranks(monkeypatch, 2, work) == [wanted, wanted]


# --- copies and errors


def test_it_survives_copies(net, fit):
    fill = MemoryFill(ClassBalancedBuffer(5), label=1, feature=features)
    fit(net, fill)
    for other in (copy.deepcopy(fill), pickle.loads(pickle.dumps(fill))):
        assert plain(other.state_dict()) == plain(fill.state_dict())
        other.buffer.add(rows(1)[0], label=0)
        assert fill.buffer.seen == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffer": [1]}, r"buffer=\[1\] must be a buffer"),
        ({"during": "start"}, "during='start' must be 'end' or 'batches'"),
        ({"during": "batches", "rows": rows(3)}, "rows= are not read during='batches'"),
        ({"label": 1.0}, "label=1.0 must be an index or key"),
        ({"feature": "head"}, "feature='head' must be a function"),
        ({"logits": 3}, "logits=3 must be a function"),
        ({"buffer": ClassBalancedBuffer(3)}, "ClassBalancedBuffer needs the label of each row. Pass label="),
        ({"buffer": HerdingBuffer(3), "label": 1}, "HerdingBuffer needs the feature"),
        ({"rows": TensorDataset(torch.ones(0, 2))}, "rows: the TensorDataset is empty"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"MemoryFill: {message}"):
        MemoryFill(**{"buffer": ReservoirBuffer(3), **arguments})


class Odd(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return rows(4)[index], {index}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": 5}, "MemoryFill: label=5 is no part of the row"),
        ({"label": "class"}, "MemoryFill: label='class' is no part of the row"),
        ({"label": 0}, "ReservoirBuffer: label=tensor"),
        ({"feature": lambda module, batch: None}, "MemoryFill: feature returned NoneType for a batch of 1 rows"),
        ({"logits": lambda module, batch: batch[0].sum()}, r"MemoryFill: logits returned \(\) for a batch of 1 rows"),
        ({"rows": Odd()}, "ReservoirBuffer: a row holds .0., a set"),
    ],
)
def test_rows_that_cannot_be_taken_stop_the_run_before_its_first_step(net, fit, arguments, message):
    start = weights(net)
    with pytest.raises(ValueError, match=message):
        fit(net, MemoryFill(ReservoirBuffer(3), **arguments))
    assert same(start, weights(net))


def test_a_loader_whose_rows_are_not_known_is_refused_unless_rows_are_given(net, fit):
    class Wrapped(Toy):
        def train_dataloader(self):
            return Batches()

    with pytest.raises(ValueError, match="MemoryFill: train_dataloader returned a Batches, whose rows are not known"):
        fit(Wrapped(), MemoryFill(ReservoirBuffer(3)))
    buffer = ReservoirBuffer(30)
    fit(Wrapped(), MemoryFill(buffer, rows(24), logits=logits))
    assert len(buffer) == 24


def test_a_batch_that_cannot_be_taken_apart_stops_the_run(fit):
    class Counted(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

        def train_dataloader(self):
            return DataLoader(rows(24), 6, collate_fn=lambda given: (default_collate(given), "a text"))

    with pytest.raises(ValueError, match=r"MemoryFill: batch\[1\] is 'a text', a str, which cannot be taken apart"):
        fit(Counted(), MemoryFill(ReservoirBuffer(3), during="batches"))

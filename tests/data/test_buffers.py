"""What a buffer keeps is what its rule says, at every step and after every save."""

import io
from collections import Counter, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft.data.batch_rows import batch_rows
from lightning_peft.data.class_balanced_buffer import ClassBalancedBuffer
from lightning_peft.data.herding_buffer import HerdingBuffer, class_quotas, herding_order
from lightning_peft.data.reservoir_buffer import ReservoirBuffer

CHI_SQUARE_999 = {39: 72.05, 19: 43.82, 9: 27.88, 5: 20.52}
"""0.999 quantiles by degrees of freedom."""


def feature(number: int) -> torch.Tensor:
    return torch.randn(3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def offer(buffer, number: int, label: int = 0) -> None:
    buffer.add(number, label=label, feature=feature(number))


def saved(buffer) -> dict:
    """The state after a way through a file, as a checkpoint takes it."""
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def chi_square(counts: np.ndarray, expected: float, probability: float) -> float:
    """Over cells in which a row is or is not kept: the sum of squared standard scores."""
    return float((((counts - expected) ** 2) / (expected * (1 - probability))).sum())


# --- reservoir


@pytest.mark.parametrize(("capacity", "rows"), [(10, 40), (1, 20)])
def test_every_position_is_kept_equally_often(capacity, rows):
    streams, counts = 2000, np.zeros(rows)
    for seed in range(streams):
        buffer = ReservoirBuffer(capacity, seed)
        for number in range(rows):
            buffer.add(number)
        counts[list(buffer)] += 1
    assert counts.sum() == streams * capacity
    # The cells are tied by their sum, so the statistic, scaled by (n - 1) / n, has n - 1 degrees of freedom.
    value = chi_square(counts, streams * capacity / rows, capacity / rows) * (rows - 1) / rows
    assert value < CHI_SQUARE_999[rows - 1]


def test_a_new_row_takes_every_slot_equally_often():
    slots: Counter[int] = Counter()
    for seed in range(4000):
        buffer = ReservoirBuffer(10, seed)
        for number in range(11):
            buffer.add(number)
        slots.update(slot for slot, row in enumerate(buffer) if row == 10)
    taken = np.array([slots[slot] for slot in range(10)])
    expected = taken.sum() / 10
    assert taken.sum() == pytest.approx(4000 * 10 / 11, abs=4 * (4000 * 10 / 121) ** 0.5)
    assert ((taken - expected) ** 2 / expected).sum() < CHI_SQUARE_999[9]


@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer])
def test_the_size_is_exact_at_every_step(kind):
    buffer = kind(7)
    for number in range(60):
        offer(buffer, number, label=number % 5 if number > 20 else 0)
        assert len(buffer) == min(7, number + 1)
        assert buffer.seen == number + 1
        assert len(set(buffer)) == len(buffer)


# --- class-balanced


@pytest.mark.parametrize("seed", range(60))
def test_classes_differ_by_at_most_one_row_where_there_are_enough(seed):
    random = np.random.default_rng(seed)
    classes = int(random.integers(1, 7))
    capacity = int(random.integers(classes, 25))
    shares = random.dirichlet(np.full(classes, 0.4))
    buffer, came = ClassBalancedBuffer(capacity, seed), Counter()
    for number in range(150):
        label = int(random.choice(classes, p=shares))
        offer(buffer, number, label)
        came[label] += 1
        counts = buffer.counts
        assert sum(counts.values()) == min(capacity, number + 1)
        if number + 1 > capacity:
            short = {label for label in came if counts[label] == came[label]}  # all that came of it is there
            level = max(counts.values())
            assert all(level - counts[label] <= 1 for label in came if label not in short)


@pytest.mark.parametrize(("capacity", "apart"), [(8, True), (9, False)])
def test_of_each_class_the_rows_are_a_uniform_sample_also_after_it_has_shrunk(capacity, apart):
    streams, rows, counts = 2000, 20, np.zeros((2, 20))
    first = rows if apart else 10  # the first class fills the buffer, then shrinks
    order = [(0, n) for n in range(first)]
    order += [(1, n) for n in range(rows)] if apart else [row for n in range(10) for row in ((1, n), (0, 10 + n))]
    came = Counter(label for label, _ in order)
    for seed in range(streams):
        buffer = ClassBalancedBuffer(capacity, seed)
        for label, number in order:
            buffer.add(number, label=label)
        for stored in buffer.stored:
            counts[stored.label, stored.row] += 1
        assert buffer.counts == {0: capacity - capacity // 2, 1: capacity // 2}
    for label, found in enumerate(counts):
        n, kept = came[label], found.sum() / streams
        value = chi_square(found[:n], streams * kept / n, kept / n) * (n - 1) / n
        assert value < CHI_SQUARE_999[n - 1], label


def test_loading_does_not_change_the_order_in_which_slots_are_drawn():
    once, loaded = ClassBalancedBuffer(12, 1), ClassBalancedBuffer(12, 1)
    for number in range(20):
        once.add(number, label=0)
    for number in range(20):  # the slots that the others leave come in any order
        once.add(number, label=1 + number % 2)
    loaded.load_state_dict(saved(once))
    for number in range(20, 60):
        for buffer in (once, loaded):
            buffer.add(number, label=1 + number % 2)
        assert list(loaded) == list(once)


def test_a_class_beyond_the_capacity_is_refused_not_forgotten():
    buffer = ClassBalancedBuffer(2)
    for number in range(6):
        offer(buffer, number, label=number % 2)
    with pytest.raises(ValueError, match="ClassBalancedBuffer: there is no place for class 7 beside 2 others"):
        offer(buffer, 9, label=7)
    assert buffer.seen == 6
    assert set(buffer.counts) == {0, 1}


# --- herding


def brute_force(features: np.ndarray, count: int) -> list[int]:
    """The definition: every row that is left is tried, every mean taken anew."""
    mean, chosen = features.mean(0), []
    for _ in range(count):
        left = [row for row in range(len(features)) if row not in chosen]
        chosen.append(min(left, key=lambda row: np.linalg.norm(mean - features[[*chosen, row]].mean(0))))
    return chosen


@pytest.mark.parametrize("seed", range(10))
def test_herding_is_the_greedy_choice(seed):
    features = np.random.default_rng(seed).normal(size=(30, 4))
    assert herding_order(torch.from_numpy(features), 12) == brute_force(features, 12)


def test_the_mean_of_the_first_rows_is_closer_to_the_class_mean_than_that_of_random_rows():
    random = np.random.default_rng(0)
    closer = {}
    for count in (1, 5, 10):
        herded, drawn = [], []
        for _ in range(30):
            features = random.normal(size=(60, 5))
            order = herding_order(torch.from_numpy(features), count)
            some = random.choice(60, count, replace=False)
            herded.append(np.linalg.norm(features[order].mean(0) - features.mean(0)))
            drawn.append(np.linalg.norm(features[some].mean(0) - features.mean(0)))
        closer[count] = np.mean(herded) / np.mean(drawn)
    assert closer[1] < 0.6
    assert closer[5] < 0.4
    assert closer[10] < 0.3


def test_of_equal_rows_the_first_is_taken_and_none_twice():
    assert herding_order(torch.ones(4, 2), 4) == [0, 1, 2, 3]
    assert herding_order(torch.ones(4, 2), 0) == []


def test_a_buffer_herds_each_class_at_the_end_of_a_task_and_then_cuts_the_tail():
    buffer = HerdingBuffer(10)
    for number in range(40):
        offer(buffer, number, label=number % 2)
    assert len(buffer) == 0
    buffer.end_task()
    assert buffer.candidates == []
    for label in (0, 1):
        numbers = [number for number in range(40) if number % 2 == label]
        order = brute_force(np.stack([feature(number).numpy() for number in numbers]), 5)
        assert [stored.row for stored in buffer.stored if stored.label == label] == [numbers[row] for row in order]
    before = [[stored.row for stored in buffer.stored if stored.label == label] for label in (0, 1)]
    for number in range(100, 120):
        offer(buffer, number, label=2)
    assert len(buffer) == 10
    buffer.end_task()
    assert buffer.counts == {0: 3, 1: 3, 2: 4}
    assert [[stored.row for stored in buffer.stored if stored.label == label] for label in (0, 1)] == [
        rows[:3] for rows in before
    ]


def test_a_class_that_comes_back_is_chosen_towards_the_mean_of_all_that_came_of_it():
    buffer = HerdingBuffer(2)
    for value in (*[0.0] * 18, 9.0):
        buffer.add(value, label="a", feature=torch.tensor([value]))
    buffer.end_task()
    assert list(buffer) == [0.0, 0.0]
    for value in (3.0, 5.0):  # mean 17 / 21 of all; 2 of those that are there, which would begin with the 3
        buffer.add(value, label="a", feature=torch.tensor([value]))
    buffer.end_task()
    assert list(buffer) == [0.0, 3.0]


@pytest.mark.parametrize("seed", range(30))
def test_quotas_use_every_place_and_are_equal_where_there_are_enough_rows(seed):
    random = np.random.default_rng(seed)
    available = {label: int(rows) for label, rows in enumerate(random.integers(1, 12, size=6))}
    capacity = int(random.integers(6, 60))
    quotas = class_quotas(available, capacity)
    assert sum(quotas.values()) == min(capacity, sum(available.values()))
    assert all(quotas[label] <= rows for label, rows in available.items())
    assert all(max(quotas.values()) - quotas[label] <= 1 for label in available if quotas[label] < available[label])


# --- all of them


def make(kind, capacity=6, seed=3):
    return kind(capacity) if kind is HerdingBuffer else kind(capacity, seed)


@pytest.mark.parametrize("stop", [3, 6, 17, 31])
@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer, HerdingBuffer])
def test_a_buffer_that_was_saved_and_loaded_decides_on_as_if_it_had_not_been(kind, stop):
    def go(buffer, numbers):
        for number in numbers:
            offer(buffer, number, label=number * number % 7 % 3)
            if number % 12 == 11:
                buffer.end_task()
        return buffer

    once, first, second = make(kind), make(kind), make(kind)
    go(once, range(60))
    state = saved(go(first, range(stop)))
    second.load_state_dict(state)
    assert list(second) == list(first)
    go(second, range(stop, 60))
    assert [(stored.row, stored.label) for stored in second.stored] == [
        (stored.row, stored.label) for stored in once.stored
    ]
    assert all(torch.equal(stored.feature, feature(stored.row)) for stored in second.stored)
    # What was saved is not changed by going on.
    go(first, range(stop, 60))
    third = make(kind)
    third.load_state_dict(state)
    assert list(go(third, range(stop, 60))) == list(once)


@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer])
def test_decisions_depend_on_the_seed_and_draw_from_no_generator(kind):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    kept = {}
    for seed in (0, 0, 1):
        buffer = kind(5, seed)
        for number in range(50):
            offer(buffer, number)
        kept.setdefault(seed, []).append(list(buffer))
    assert kept[0][0] == kept[0][1] != kept[1][0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(("workers"), [0, 1])
def test_a_buffer_is_a_dataset(workers):
    buffer = ReservoirBuffer(4)
    for number in range(4):
        buffer.add({"x": torch.full((2,), float(number)), "text": f"row {number}"})
    (batch,) = list(DataLoader(buffer, 4, num_workers=workers))
    assert batch["text"] == [f"row {number}" for number in range(4)]
    assert torch.equal(batch["x"][:, 0], torch.arange(4.0))
    with pytest.raises(IndexError):
        buffer[4]


def test_a_row_is_a_copy_that_does_not_keep_its_batch():
    batch = torch.zeros(1000, 2, requires_grad=True)
    buffer = ReservoirBuffer(2)
    buffer.add((batch[0], [batch[1].expand(3, 2)]), logits=batch[2], step=4)
    with torch.no_grad():
        batch += 1
    (stored,) = buffer.stored
    tensors = [stored.row[0], stored.row[1][0], stored.logits]
    assert all(not value.requires_grad and not value.any() for value in tensors)
    assert [value.untyped_storage().nbytes() for value in tensors] == [8, 24, 8]


def test_stored_logits_come_with_their_step():
    buffer = ReservoirBuffer(3)
    rows = buffer.with_logits()
    for number in range(3):
        buffer.add(number, logits=torch.full((2,), float(number)), step=10 * number)
    numbers, logits, steps = next(iter(DataLoader(rows, 3)))
    assert len(rows) == 3
    assert steps.tolist() == [0, 10, 20]
    assert logits.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert numbers.tolist() == [0, 1, 2]
    plain = ReservoirBuffer(3)
    plain.add(0)
    with pytest.raises(ValueError, match="LogitRows: row 0 was stored without logits"):
        plain.with_logits()[0]


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("row", "named"), [(np.zeros(2), "ndarray"), (np.float64(1), "float64"), (Pair(1, 2), "Pair"), ({"a": {1}}, "set")]
)
def test_what_a_checkpoint_could_not_hold_is_refused(row, named):
    with pytest.raises(ValueError, match=f"ReservoirBuffer: a row holds .*{named}.*could not hold"):
        ReservoirBuffer(3).add(row)


def test_all_that_is_not_refused_is_held_by_a_checkpoint():
    row = {"a": (1, 2.5, True, None, "text", b"bytes"), 2: [torch.arange(3), torch.ones((), dtype=torch.bfloat16)]}
    buffer, loaded = ReservoirBuffer(3), ReservoirBuffer(3)
    buffer.add(row, label=torch.tensor(2))
    loaded.load_state_dict(saved(buffer))
    assert loaded[0]["a"] == row["a"]
    assert torch.equal(loaded[0][2][0], row[2][0])
    assert loaded[0][2][1].dtype == torch.bfloat16
    assert loaded.counts == {2: 1}


@pytest.mark.parametrize("capacity", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer, HerdingBuffer])
def test_a_capacity_must_be_a_positive_whole_number(kind, capacity):
    with pytest.raises(ValueError, match=f"{kind.__name__}: capacity={capacity!r} must be"):
        kind(capacity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a row came without its label"),
        ({"label": 1.5, "feature": torch.ones(3)}, "label=1.5 must be a whole number"),
        ({"label": True, "feature": torch.ones(3)}, "label=True must be"),
        ({"label": torch.tensor([1, 2]), "feature": torch.ones(3)}, "must be a whole number"),
        ({"label": 1}, "a row came without its feature"),
        ({"label": 1, "feature": [1.0]}, "must be a tensor of finite numbers"),
        ({"label": 1, "feature": torch.tensor([torch.nan])}, "must be a tensor of finite numbers"),
        ({"label": 1, "feature": torch.ones(2)}, "has length 2, earlier ones 3"),
        ({"label": 1, "feature": torch.ones(3), "step": 1}, "only step= came"),
        ({"label": 1, "feature": torch.ones(3), "logits": torch.ones(3)}, "only logits= came"),
        ({"label": 1, "feature": torch.ones(3), "logits": torch.ones(3), "step": -1}, "step=-1 must be"),
        ({"label": 8, "feature": torch.ones(3)}, "there is no place for class 8 beside 2 others"),
    ],
)
def test_what_add_is_told_wrongly_is_refused_and_leaves_the_buffer_as_it_was(arguments, message):
    buffer = HerdingBuffer(2)
    offer(buffer, 0, label=1)
    offer(buffer, 1, label=2)
    with pytest.raises(ValueError, match=f"HerdingBuffer: .*{message}"):
        buffer.add(0, **arguments)
    assert (buffer.seen, len(buffer.candidates)) == (2, 2)


def test_a_seed_must_be_whole_and_a_state_of_the_same_kind_capacity_and_seed():
    with pytest.raises(ValueError, match="ReservoirBuffer: seed=0.5 must be"):
        ReservoirBuffer(3, 0.5)
    state = ReservoirBuffer(3).state_dict()
    for other, named in ((ReservoirBuffer(4), "capacity=3"), (ReservoirBuffer(3, 1), "seed=0")):
        with pytest.raises(ValueError, match=f"ReservoirBuffer: the saved buffer has {named}"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="the saved buffer has kind='ReservoirBuffer'"):
        ClassBalancedBuffer(3).load_state_dict(state)


@pytest.mark.parametrize(
    ("features", "count", "message"),
    [(torch.ones(3), 1, "must be \\(rows, features\\)"), (torch.ones(3, 1), 4, "count=4 must lie from 0 to")],
)
def test_herding_needs_a_matrix_and_enough_rows(features, count, message):
    with pytest.raises(ValueError, match=f"herding_order: .*{message}"):
        herding_order(features, count)


# --- batches taken apart


@pytest.mark.parametrize(
    "rows",
    [
        [torch.arange(2) + n for n in range(3)],
        [(torch.ones(2) * n, torch.tensor(n)) for n in range(3)],
        [{"text": f"{n}", "more": (torch.tensor(n), {"deep": torch.ones(1, 2) * n})} for n in range(3)],
        ["a", "b", "c"],
        [(torch.tensor(n), f"{n}") for n in range(2)],
    ],
)
def test_a_batch_is_taken_apart_into_the_rows_that_made_it(rows):
    batch = torch.utils.data.default_collate(rows)
    apart = batch_rows(batch)
    assert len(apart) == len(rows)
    assert repr(apart) == repr(rows)
    assert repr(torch.utils.data.default_collate(apart)) == repr(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.tensor(1), "batch is tensor"),
        ((torch.ones(2), 3), r"batch\[1\] is 3, a int, which cannot be taken apart"),
        ({"x": torch.ones(2), "y": {"z": object()}}, r"batch\['y'\]\['z'\] is <object"),
        (Pair(torch.ones(2), torch.ones(2)), "batch is Pair"),
        ([], r"batch is \[\], a list"),
        (None, "batch is None"),
        ((torch.ones(2), torch.ones(3)), r"different numbers of rows \(batch\[0\]: 2, batch\[1\]: 3\)"),
    ],
)
def test_what_cannot_be_taken_apart_is_named(batch, message):
    with pytest.raises(ValueError, match=f"batch_rows: .*{message}"):
        batch_rows(batch)

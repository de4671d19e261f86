"""Features are computed once per network, data and transform; a killed run goes on; nothing stale is ever returned."""

import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_peft.data import FeatureCache
from lightning_peft.data.cached_rows import CachedRows
from lightning_peft.data.content_digest import content_digest

X = torch.arange(30.0).view(10, 3)
Y = torch.arange(10) % 2


def loader(x=X, y=Y, **options):
    return DataLoader(TensorDataset(x, y), **{"batch_size": 4, **options})


class Stream(IterableDataset):
    def __iter__(self):
        yield from X


class Doubling:
    """Doubles rows, and counts them."""

    def __init__(self, stop_at=None):
        self.rows, self.stop_at = 0, stop_at

    def __call__(self, batch):
        if self.stop_at is not None and self.rows >= self.stop_at:
            raise KeyboardInterrupt
        self.rows += len(batch[0])
        return 2 * batch[0], [batch[1]]


def test_features_are_computed_once_and_are_the_function_s_own(tmp_path):
    first, second = Doubling(), Doubling()
    for double in (first, second):
        rows = FeatureCache(tmp_path, batch_size=3).rows(loader(shuffle=True), double, key="double")
        assert torch.equal(rows.all(), 2 * X)
        assert torch.equal(torch.stack([rest[0] for rest in rows.rest]), Y)
        assert rows[7][0].tolist() == [42.0, 44.0, 46.0]
        assert len(rows) == 10
    assert (first.rows, second.rows) == (10, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"key": "another network"},
        {"loader": loader(X.index_put((torch.tensor([9]), torch.tensor([2])), torch.tensor(-1.0)))},
        {"loader": loader(y=1 - Y)},
        {"loader": loader(X[:9], Y[:9])},
        {
            "loader": loader(
                collate_fn=lambda rows: [torch.stack([x for x, _ in rows]) + 1, torch.stack([y for _, y in rows])]
            )
        },
    ],
    ids=["network", "one value", "labels", "fewer rows", "transform"],
)
def test_whatever_changes_is_computed_anew(tmp_path, other):
    cache = FeatureCache(tmp_path)
    cache.rows(loader(), Doubling(), key="double")
    again = Doubling()
    cache.rows(other.get("loader", loader()), again, key=other.get("key", "double"))
    assert again.rows > 0


def test_a_name_for_the_data_spares_reading_it(tmp_path):
    class Counting(TensorDataset):
        read = 0

        def __getitem__(self, index):
            Counting.read += 1
            return super().__getitem__(index)

    data = DataLoader(Counting(torch.arange(200.0).view(100, 2), torch.zeros(100)))
    cache = FeatureCache(tmp_path, data_key="rows of May")
    cache.rows(data, Doubling(), key="double")
    Counting.read = 0
    cache.rows(data, Doubling(), key="double")
    assert Counting.read <= 32  # two looks at 16 rows, for randomness
    held = Doubling()
    cache.rows(data, held, key="double", name="validation")  # the same name, other rows
    assert held.rows == 100


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random], ids=["torch", "python"])
def test_rows_that_are_random_are_refused(tmp_path, draw):
    class Noisy(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return X[index] + (draw() < 0.5), Y[index]

    with pytest.raises(
        ValueError, match="row . of train is another one each time it is read .* Take the random transform out"
    ):
        FeatureCache(tmp_path).rows(DataLoader(Noisy()), Doubling(), key="double", name="train")
    assert not list(tmp_path.iterdir())


def test_generators_are_as_before(tmp_path):
    before = torch.get_rng_state(), random.getstate()

    def noisy(batch):
        torch.rand(3)
        random.random()
        return batch[0], None

    FeatureCache(tmp_path).rows(loader(), noisy, key="noisy")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_run_that_is_stopped_keeps_what_it_had(tmp_path):
    cut, rest = Doubling(stop_at=6), Doubling()
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, batch_size=2).rows(loader(), cut, key="double")
    assert torch.equal(FeatureCache(tmp_path, batch_size=2).rows(loader(), rest, key="double").all(), 2 * X)
    assert (cut.rows, rest.rows) == (6, 4)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", ".lock"]


def slow(folder, said):
    def extract(batch):
        said.put((os.getpid(), len(batch[0])))
        time.sleep(0.1)
        return 2 * batch[0], [batch[1]]

    rows = FeatureCache(folder, batch_size=1).rows(loader(), extract, key="double")
    said.put((os.getpid(), rows.all().tolist()))


def start(folder, count):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.test_feature_cache"])
    said = context.Queue()
    made = [context.Process(target=slow, args=(folder, said)) for _ in range(count)]
    for process in made:
        process.start()
    return made, said


@pytest.mark.slow
def test_of_two_processes_one_computes_and_a_killed_one_hinders_nobody(tmp_path):
    (killed,), said = start(tmp_path, 1)
    done = [said.get(timeout=60) for _ in range(3)]
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    both, said = start(tmp_path, 2)
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    told = []
    while not said.empty():
        told.append(said.get())
    computed = [(process, what) for process, what in told if isinstance(what, int)]
    results = [what for _, what in told if not isinstance(what, int)]
    assert results == [(2 * X).tolist()] * 2
    assert len({process for process, _ in computed}) == 1
    # What the killed one had written is kept; the one row that it was at may be lost.
    assert 10 - len(done) <= len(computed) <= 10 - len(done) + 1


def test_rows_of_several_vectors_keep_their_lengths(tmp_path):
    lengths = torch.tensor([2, 5, 1, 3, 4, 2])
    states = [torch.randn(int(length), 3) for length in lengths]

    def tokens(batch):
        part = [states[int(row)] for row in batch[0]]
        padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=9.0)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in part])[:, None]
        return (padded, mask), None

    rows = FeatureCache(tmp_path, batch_size=4).rows(DataLoader(TensorDataset(torch.arange(6))), tokens, key="tokens")
    assert all(torch.equal(rows[number][0], states[number]) for number in range(6))
    (padded, mask), rest = rows.__getitems__([1, 2])
    assert rest is None
    assert padded.shape == (2, 5, 3)
    assert mask.tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert padded[1, 1:].abs().max() == 0
    assert rows.array.shape == (17, 3)  # no padding on disk
    with pytest.raises(ValueError, match="a solver needs one vector a row"):
        rows.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_every_precision_comes_back_bit_for_bit(tmp_path, dtype):
    values = (torch.randn(10, 3) * 100).to(dtype)
    rows = FeatureCache(tmp_path).rows(loader(), lambda batch: (values, None), key="values")
    assert torch.equal(rows.all(), values)
    assert rows.all().dtype == dtype
    assert torch.equal(rows.__getitems__([3, 1])[0], values[[3, 1]])


def test_the_file_is_mapped_and_rows_go_through_workers_and_pickles(tmp_path):
    rows = FeatureCache(tmp_path).rows(loader(), Doubling(), key="double")
    assert type(rows.array).__name__ == "memmap"
    copy = pickle.loads(pickle.dumps(rows))
    batches = DataLoader(copy, 5, collate_fn=CachedRows.collate, num_workers=1, multiprocessing_context="forkserver")
    assert torch.equal(torch.cat([features for features, _ in batches]), 2 * X)


def test_a_temporary_folder_lives_as_long_as_its_rows():
    rows = FeatureCache().rows(loader(), Doubling(), key="double")
    folder = Path(rows.folder)
    assert folder.is_dir()
    assert torch.equal(rows.all(), 2 * X)
    del rows
    assert not folder.exists()


@pytest.mark.parametrize(
    ("data", "extract", "message"),
    [
        (TensorDataset(X[:0]), Doubling(), "rows: the TensorDataset is empty|is empty"),
        (Stream(), Doubling(), "has no length"),
        (
            TensorDataset(X),
            lambda batch: (batch[0][:1], None),
            r"features of 10 rows are \(1, 3\); they must be \(10, ...\)",
        ),
        (TensorDataset(X), lambda batch: ([1], None), "features of 10 rows are list"),
    ],
)
def test_what_has_no_features_is_refused(tmp_path, data, extract, message):
    with pytest.raises(ValueError, match=message):
        FeatureCache(tmp_path).rows(DataLoader(data), extract, key="double")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        FeatureCache(tmp_path, batch_size=0)


def test_content_is_hashed_by_what_it_is():
    values = [
        torch.ones(2), torch.ones(2, 1), torch.ones(2).int(), torch.zeros(2), {"a": 1}, {"b": 1}, {"a": "1"}, [1, 2], [[1], 2],
        ["ab", "c"], ["a", "bc"], None, 1.0, 1, True, b"a", "a",
    ]  # fmt: skip
    assert len({content_digest(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="me: a batch holds a object, whose content cannot be hashed"):
        content_digest([object()], "me")

"""Features of a frozen network, computed once and kept on disk: from then on an epoch trains the head alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_peft.data.batch_rows import batch_rows
from lightning_peft.data.cached_rows import CachedRows, write_rows
from lightning_peft.data.content_digest import content_digest, key_of
from lightning_peft.data.mix_loader import carried_options, row_count
from lightning_peft.distributed import gather_objects, rank, together, world_size
from lightning_peft.files import write_atomic

_OWNER = "FeatureCache"
Extract = Callable[[Any], tuple[Any, Any]]
"""Gets a batch and returns the features of its rows and what else of it the head's step needs."""


class FeatureCache:
    """A folder of features, a subfolder for each network, data set and transform.

    A set of rows is run through the network once, by all processes together, in chunks that do not depend on their number.
    Chunks that are finished stay when a run is killed; the whole is put in place in one step. Of two processes that want the same
    features one computes them and the other waits. Files are memory-mapped, so they may be larger than memory. Processes on several
    machines need a folder that all of them see.

    **The trap:** what the network sees must be the same in every epoch. Rows that are drawn anew each time (augmentation) are
    refused: one draw of them, kept for ever, would be another job.

    Args:
        folder: Where; unset, a temporary folder that goes when this object does.
        data_key: A name for rows and transform together, given by whoever knows that they have not changed. Unset, every batch
            is read and hashed, which takes what one epoch of loading takes.
        batch_size: Rows that go through the network at once.

    Raises:
        ValueError: For a batch size below 1, and by :meth:`rows` for data that is random, iterable only, empty or of a kind that
            cannot be hashed.

    >>> from torch.utils.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0])), batch_size=2)
    >>> rows = FeatureCache().rows(loader, lambda batch: (batch[0] * 2, [batch[1]]), key="doubled")
    >>> rows[1]
    (tensor([4., 6.]), (tensor(1),))
    """

    def __init__(self, folder: str | Path | None = None, *, data_key: str | None = None, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"{_OWNER}: batch_size={batch_size!r} must be at least 1.")
        self.folder = None if folder is None else Path(folder)
        self.data_key, self.batch_size = data_key, batch_size
        self._temporary: str | None = None

    def rows(
        self,
        loader: DataLoader[Any],
        extract: Extract,
        *,
        key: str,
        name: str = "rows",
        context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> CachedRows:
        """Return the features of a loader's rows, from disk or computed now.

        Args:
            loader: Its dataset and collate function are used; its order, batches and workers' randomness are not.
            extract: What is computed of a batch. It runs without gradient.
            key: Says which network and function ``extract`` is: two of one key must give the same.
            name: For the progress bar and errors.
            context: In which ``extract`` runs, and nothing else.
        """
        count = row_count(loader.dataset, f"{_OWNER}: {name}")
        chunks = [list(range(at, min(at + self.batch_size, count))) for at in range(0, count, self.batch_size)]
        job = _Job(loader, extract, chunks, name, context)
        together(_OWNER, lambda: job.refuse_random(count))
        data = self.data_key or job.data_digest()
        folder = self._place() / key_of(key, data, count, name if self.data_key else "", self.batch_size)[:32]
        with self._alone(folder):
            if not gather_objects(folder.is_dir())[0]:
                job.compute(folder)
            if not all(gather_objects(folder.is_dir())):
                raise ValueError(
                    f"{_OWNER}: a process does not see {str(folder)!r}, which another one has written. Give a folder on a file "
                    "system that all of them share."
                )
        return CachedRows(folder, keep=self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_temporary": None}  # a copy makes one of its own

    def _place(self) -> Path:
        """Return the folder; a temporary one is the first process's, for all."""
        if self.folder is None:
            if self._temporary is None and rank() == 0:
                self._temporary = tempfile.mkdtemp(prefix="feature-cache-")
                weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
            return Path(gather_objects(self._temporary)[0])
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    @contextlib.contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Let no other run work on a folder; of this run the first process holds the lock for all."""
        lock = FileLock(folder.with_suffix(".lock")) if rank() == 0 else contextlib.nullcontext()
        with lock:
            gather_objects(None)  # the others begin once it is held
            yield
            gather_objects(None)


@dataclass(frozen=True)
class _Job:
    """Rows to run through a network, in chunks of row numbers."""

    loader: DataLoader[Any]
    extract: Extract
    chunks: list[list[int]]
    name: str
    context: Callable[[], AbstractContextManager[Any]]

    def refuse_random(self, count: int) -> None:
        """Look twice at some rows.

        Raises:
            ValueError: If they differ.
        """
        some = sorted({round(number * (count - 1) / 15) for number in range(16)})
        with isolate_rng():
            looks = []
            for number in range(2):
                torch.manual_seed(number)
                looks.append(
                    [content_digest(_collate(self.loader, [index]), f"{_OWNER}: {self.name}") for index in some]
                )
        if changed := [index for index, first, second in zip(some, *looks, strict=True) if first != second]:
            raise ValueError(
                f"{_OWNER}: row {changed[0]} of {self.name} is another one each time it is read ({len(changed)} of {len(some)} "
                "looked at), so its features cannot be kept. Take the random transform out of the dataset or collate function, or "
                "train without a feature cache."
            )

    def data_digest(self) -> str:
        """Return a hash of all batches, the same for every number of processes."""
        batches = _batches(self.loader, self.chunks, f"{self.name}: reading")
        own = together(
            _OWNER, lambda: {number: content_digest(batch, f"{_OWNER}: {self.name}") for number, batch in batches}
        )
        everybody = {number: digest for found in gather_objects(own) for number, digest in found.items()}
        return key_of([everybody[number] for number in range(len(self.chunks))])

    def compute(self, folder: Path) -> None:
        """Let all processes compute their chunks, and the first one put the whole in place."""
        draft, start = folder.with_suffix(".draft"), time.perf_counter()
        left = [number for number in range(len(self.chunks)) if not (draft / f"{number}.pt").is_file()]
        left = gather_objects(left)[0]
        together(_OWNER, lambda: self._write_chunks(draft, left))
        seconds = max(gather_objects(time.perf_counter() - start))
        together(_OWNER, lambda: self._put_in_place(folder, draft, seconds) if rank() == 0 else None)

    def _write_chunks(self, draft: Path, left: list[int]) -> None:
        """Compute this process's share of the chunks that are left."""
        draft.mkdir(exist_ok=True)
        batches = _batches(self.loader, [self.chunks[number] for number in left], f"{self.name}: features")
        with self.context(), torch.no_grad():
            for number, batch in batches:
                features, rest = self.extract(batch)
                _check(features, len(self.chunks[left[number]]), self.name)
                plain = {"features": features, "rest": batch_rows(rest, _OWNER) if _holds(rest) else None}
                write_atomic(draft / f"{left[number]}.pt", lambda path, plain=plain: torch.save(plain, path))  # type: ignore[misc]

    def _put_in_place(self, folder: Path, draft: Path, seconds: float) -> None:
        about = {"rows": sum(map(len, self.chunks)), "seconds": seconds, "name": self.name}
        whole = folder.with_suffix(".whole")
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        write_rows(whole, [draft / f"{number}.pt" for number in range(len(self.chunks))])
        (whole / "about.json").write_text(json.dumps(about), encoding="utf-8")
        whole.rename(folder)
        shutil.rmtree(draft)


def _holds(rest: Any) -> bool:
    return bool(rest) if isinstance(rest, Mapping | list | tuple) else rest is not None


def _check(features: Any, rows: int, name: str) -> None:
    parts = features if isinstance(features, tuple) else (features,)
    for part in parts:
        if not isinstance(part, Tensor) or part.dim() < 1 or len(part) != rows:
            found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{_OWNER}: features of {rows} {name} are {found}; they must be ({rows}, ...).")


def _collate(loader: DataLoader[Any], indices: list[int]) -> Any:
    return loader.collate_fn([loader.dataset[index] for index in indices])


def _batches(loader: DataLoader[Any], chunks: list[list[int]], name: str) -> Iterator[tuple[int, Any]]:
    """Yield this process's share of some chunks, each with its number; generators are as before."""
    numbers = list(range(rank(), len(chunks), world_size()))
    options = {**carried_options(loader), "persistent_workers": False}
    own: Any = [chunks[number] for number in numbers]
    batches: DataLoader[Any] = DataLoader(loader.dataset, batch_sampler=own, generator=torch.Generator(), **options)
    with isolate_rng():
        yield from zip(numbers, tqdm(batches, desc=name, delay=2, leave=False, disable=rank() > 0), strict=True)

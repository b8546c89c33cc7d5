"""One measurement of `loaders.py`, in a process of its own: reads a task, prints a result."""

import importlib
import json
import os
import pickle
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread per process everywhere

import numpy as np
import psutil
import torch

from benchmarks.loaders_base import SEED, Epoch, Loader, Place
from benchmarks.loaders_batch import BATCH_ROWS, LoadedBatch
from benchmarks.loaders_inputs import Corpus, corpora
from benchmarks.loaders_raw import plain_read
from benchmarks.process_watch import memory_of

LOADERS = {
    "carvecache": ("loaders_ours", "Carvecache"),
    "litdata": ("loaders_peers", "LitData"),
    "datasets, Arrow": ("loaders_arrow", "ArrowTable"),
    "datasets, Parquet stream": ("loaders_arrow", "ParquetStream"),
    "webdataset": ("loaders_peers", "WebDataset"),
    "lance": ("loaders_arrow", "Lance"),
    "plain file": ("loaders_raw", "PlainFile"),
}
"""Module and class by name: a process, and each worker it spawns, imports its own loader alone."""
PLAIN_READ = "read()"
_STEADY = (0.2, 0.8)  # of an epoch
_SAVED_AT = 0.6
_THREADS = 2  # of `read()` at once, where one is not the limit
_CONSUMER_S = 0.02  # a batch, where memory is watched: a training step takes longer


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure.

    Attributes:
        corpus: its name.
        num_rows: of the corpus.
        loader: its name, or `PLAIN_READ`.
        measure: a function of this module.
        num_workers: of the DataLoader; 0 for none.
        url: of the loader's data.
        cache_dir: an empty folder.
        limit_s: stop measuring after so long.
        state_file: between `save` and `resume`.
        progress_file: holds the rows so far, for who watches.
    """

    corpus: str
    num_rows: int
    loader: str
    measure: str
    num_workers: int
    url: str
    cache_dir: str
    limit_s: float
    state_file: str
    progress_file: str

    @property
    def place(self) -> Place:
        """Where the data lies."""
        return Place(url=self.url, cache_dir=Path(self.cache_dir))

    def open(self) -> Loader:
        """Return the loader, its library imported."""
        kind = loader_kind(self.loader)
        kind.load_library()
        return kind(corpora(self.num_rows)[self.corpus], self.place)


def loader_kind(name: str) -> type[Loader]:
    """Return the class of a loader."""
    module, kind = LOADERS[name]
    found: type[Loader] = getattr(importlib.import_module(f"benchmarks.{module}"), kind)
    return found


@dataclass(kw_only=True)
class Clock:
    """Counts what a loader gives from the moment it is asked to open its data."""

    limit_s: float
    started: float = field(default_factory=time.perf_counter)
    moments: list[tuple[float, int]] = field(default_factory=list)  # after a batch: s, rows
    rows: int = 0
    num_bytes: int = 0
    keys: set[str] = field(default_factory=set)

    def watch(self, batches: Iterable[LoadedBatch]) -> Iterator[LoadedBatch]:
        """Pass batches on until they or the time end."""
        for batch in batches:
            batch.touch()
            self.rows += len(batch.keys)
            self.num_bytes += batch.codes.nbytes + 12 * len(batch.codes)
            self.keys.update(batch.keys)
            self.moments.append((time.perf_counter() - self.started, self.rows))
            yield batch
            if self.is_over:
                return

    @property
    def is_over(self) -> bool:
        """Whether the time for measuring is."""
        return self.moments[-1][0] - self.moments[0][0] > self.limit_s

    def result(self, num_rows: int) -> dict[str, Any]:
        """Return time to the first batch, and rows per second in the midst of the epoch.

        Loaders read ahead: the first rows are slow to come and the last ones lie ready. So the
        steady rate leaves out the first fifth of the rows, and the last one of an epoch.
        """
        assert self.moments, "no batch came"
        until = _STEADY[1] * num_rows if self.rows >= num_rows else self.rows
        rows_at_start = _STEADY[0] * min(self.rows, num_rows)
        start = next(m for m in self.moments if m[1] >= rows_at_start)
        end = next(m for m in self.moments if m[1] >= until)
        return {
            "rows": self.rows,
            "first_batch_s": self.moments[0][0],
            "rows_s": (end[1] - start[1]) / (end[0] - start[0]) if end > start else None,
            "whole_rows_s": self.rows / self.moments[-1][0],
            "bytes_per_row": self.num_bytes / self.rows,
        }


def sequential(task: Task) -> dict[str, Any]:
    """Read an epoch in the order of storage."""
    return _read_epoch(task, shuffle=False)


def shuffled(task: Task) -> dict[str, Any]:
    """Read an epoch in random order."""
    return _read_epoch(task, shuffle=True)


def _read_epoch(task: Task, *, shuffle: bool) -> dict[str, Any]:
    loader = task.open()
    epoch = Epoch(shuffle=shuffle, num_workers=task.num_workers)
    clock = Clock(limit_s=task.limit_s)
    batches = loader.batches(epoch)
    for _ in clock.watch(batches):
        pass
    found = clock.result(task.num_rows)
    if clock.rows >= task.num_rows:
        _check_complete(clock, task)
        if loader.copies_locally and loader.place.is_remote:
            again = Clock(limit_s=task.limit_s)
            for _ in again.watch(batches):
                pass
            found["second"] = again.result(task.num_rows)
    return found


def _check_complete(clock: Clock, task: Task) -> None:
    if (clock.rows, len(clock.keys)) != (task.num_rows, task.num_rows):
        raise SystemExit(f"{clock.rows} rows, {len(clock.keys)} keys instead of {task.num_rows}")


def by_key(task: Task) -> dict[str, Any]:
    """Ask for random keys, a batch at a time, each key once at most."""
    loader = task.open()
    keys = np.random.default_rng(SEED).permutation(loader.corpus.keys()).tolist()
    asked = [keys[i : i + BATCH_ROWS] for i in range(0, len(keys), BATCH_ROWS)]
    clock = Clock(limit_s=task.limit_s)
    for _ in clock.watch(map(loader.by_key, asked)):
        pass
    return clock.result(task.num_rows)


def memory(task: Task) -> dict[str, Any]:
    """Read an epoch in random order at a consumer's pace; somebody else watches."""
    loader = task.open()
    progress = np.memmap(task.progress_file, np.int64, mode="r+", shape=1)
    before = memory_of(psutil.Process())
    epoch = Epoch(shuffle=True, num_workers=task.num_workers)
    clock = Clock(limit_s=task.limit_s)
    for _ in clock.watch(loader.batches(epoch)):
        progress[0] = clock.rows
        time.sleep(_CONSUMER_S)
    return {**clock.result(task.num_rows), "before": before}


def save(task: Task) -> dict[str, Any]:
    """Read most of a shuffled epoch and keep the loader's state."""
    loader = task.open()
    epoch = Epoch(shuffle=True, num_workers=task.num_workers, is_resumable=True)
    clock = Clock(limit_s=10 * task.limit_s)
    for _ in clock.watch(loader.batches(epoch)):
        if clock.rows >= _SAVED_AT * task.num_rows:
            break
    state = loader.state()
    torch.save((state, clock.keys, clock.rows), task.state_file)
    return {**clock.result(task.num_rows), "state_bytes": len(pickle.dumps(state))}


def resume(task: Task) -> dict[str, Any]:
    """Go on from that state; count what comes twice and what never came."""
    loader = task.open()
    state, seen, rows = torch.load(task.state_file, weights_only=False)
    epoch = Epoch(shuffle=True, num_workers=task.num_workers, is_resumable=True, state=state)
    clock = Clock(limit_s=task.limit_s)
    for _ in clock.watch(loader.batches(epoch)):
        pass
    known = seen | clock.keys
    is_whole = not clock.moments or not clock.is_over
    return {
        "first_batch_s": clock.moments[0][0] if clock.moments else None,
        "saved_rows": rows,
        "rows": clock.rows,
        "twice": rows + clock.rows - len(known),
        "missing": task.num_rows - len(known) if is_whole else None,
    }


def check(task: Task) -> dict[str, Any]:
    """Compare what a loader gives with the rows as they are made."""
    loader = task.open()
    for shuffle in (False, True):
        epoch = Epoch(shuffle=shuffle, num_workers=task.num_workers)
        _check_batch(next(iter(loader.batches(epoch))), loader.corpus)
    if "by_key" not in loader.lacks:
        keys = loader.corpus.keys()[:: loader.corpus.num_rows // 7]
        found = loader.by_key(keys)
        if found.keys != keys:
            raise SystemExit(f"asked for {keys}, got {found.keys}")
        _check_batch(found, loader.corpus)
    return {}


def _check_batch(batch: LoadedBatch, corpus: Corpus) -> None:
    start = 0
    for key, count in zip(batch.keys, batch.num_tokens, strict=True):
        row = corpus.row(corpus.number_of(key))
        part = slice(start, start + count)
        start += count
        for name in ("codes", "scales", "positions", "sizes"):
            wanted, given = getattr(row, name), getattr(batch, name)[part].numpy()
            if given.tobytes() != wanted.tobytes():
                raise SystemExit(f"{name} of {key} are not those that were written")
    if corpus.is_rectangular:
        assert batch.rectangle.shape[:2] == (len(batch.keys), corpus.most_tokens)


def read(task: Task) -> dict[str, Any]:
    """Read the same bytes with no loader at all."""
    found = {"bytes_s": _bytes_s(task, plain_read(task.place))}
    if not task.place.is_remote:
        halves = [plain_read(task.place, part=part, parts=_THREADS) for part in range(_THREADS)]
        with ThreadPoolExecutor(_THREADS) as pool:
            found["threads_bytes_s"] = sum(pool.map(lambda half: _bytes_s(task, half), halves))
    return found


def _bytes_s(task: Task, pieces: Iterator[int]) -> float:
    if not task.place.is_remote:
        next(pieces)  # it pays for new memory
    started = time.perf_counter()
    total = 0
    for count in pieces:
        total += count
        if time.perf_counter() - started > task.limit_s:
            break
    return total / (time.perf_counter() - started)


def write(task: Task) -> dict[str, Any]:
    """Write a loader's data into its folder."""
    started = time.perf_counter()
    task.open().write(Path(task.url))
    files = [path for path in Path(task.url).rglob("*") if path.is_file()]
    return {
        "seconds": time.perf_counter() - started,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }


_MEASURES = {
    f.__name__: f for f in (sequential, shuffled, by_key, memory, save, resume, check, read, write)
}


def main() -> None:
    """Carry the task out that is the argument, and print its result as the last line."""
    task = Task(**json.loads(sys.argv[1]))
    result = _MEASURES[task.measure](task)
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # what is measured is over; pyarrow's threads now and then end in a hang or abort


def as_argument(task: Task) -> str:
    """Return a task as `main` takes it."""
    return json.dumps(asdict(task))


if __name__ == "__main__":
    main()

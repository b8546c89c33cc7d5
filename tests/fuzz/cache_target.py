"""A small cache in memory, of which one file is changed, read in every way there is."""

import itertools
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from pipeline import CarvedDataset, open_cache
from pipeline.cache import layout
from pipeline.cache.commit import claim_identity
from pipeline.cache.record import dump_record, parse_record
from pipeline.cache.snapshot import build_snapshot
from pipeline.cache.snapshot_record import record_path
from pipeline.cache.verify import find_damage
from pipeline.carved_cache import CarvedCache
from pipeline.errors import KeyNotFoundError, PipelineError
from pipeline.run_report import FailedShard, RunReport
from pipeline.status import read_status, status_lines
from pipeline.storage import Store, open_store
from pipeline.types import RejectedSample
from tests.cache.rows import (
    IDENTITY,
    SETTINGS,
    commit_rows,
    make_commit,
    make_row,
    make_writer,
)
from tests.fuzz.target import BrokenPromiseError, Target

_numbers = itertools.count()
KEYS = [f"k{number}" for number in range(7)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One file of the cache with other content."""

    path: str
    content: bytes
    without_snapshot: bool = False


class CacheTarget(Target):
    """A small cache in memory, the same bytes in every process."""

    def __init__(self) -> None:
        self.store = open_store(f"memory://fuzz-{self.name}-{next(_numbers)}")
        with _clock_and_names_fixed():
            _fill(self.store)
        self.whole = {entry.path: self.store.read(entry.path) for entry in self.store.list()}
        self.snapshots = [path for path in self.whole if path.startswith(layout.SNAPSHOTS)]
        cache = open_cache(self.store.url)
        self.images = {key: cache[key] for key in KEYS}
        self.rows = [r for batch in cache.scan() for r in batch.to_pylist()]
        self.of_key = {r["key"]: r for r in reversed(self.rows)}  # the first of equal keys
        self.check(Change(path=layout.IDENTITY_PATH, content=self.whole[layout.IDENTITY_PATH]))

    def paths(self, *ends: str) -> list[str]:
        return [path for path in sorted(self.whole) if path.endswith(ends)]

    def check(self, made: Change) -> str:
        self.store.put(made.path, made.content)
        if made.without_snapshot:
            self.store.delete_tree(layout.SNAPSHOTS)
        try:
            opened: list[CarvedCache] = []
            outcomes = [_outcome(lambda: opened.append(open_cache(self.store.url)))]
            if opened:
                outcomes = [_outcome(lambda way=way: way(opened[0])) for way in self._ways()]
        finally:
            for path, content in self.whole.items():
                if path == made.path or made.without_snapshot:
                    self.store.put(path, content)
        refused = [outcome for outcome in outcomes if outcome != "right"]
        return refused[0] if refused else "right"

    def _ways(self) -> list[Callable[[CarvedCache], None]]:
        return [self._read_by_key, self._scan, self._iterate, self._verify, self._look]

    def _read_by_key(self, cache: CarvedCache) -> None:
        found = list(cache.keys())
        expect(found == KEYS, f"keys {found}")
        for key in KEYS:
            _compare(cache, key, self.images[key])
        for key in KEYS[::3]:
            values = cache.columns(key, ["txt", "width", "grid_w"])
            expected = {name: self.of_key[key][name] for name in values}
            expect(values == expected, f"columns {values}")
        _compare_prefix(cache.keeping(3), KEYS[0], self.images[KEYS[0]])

    def _scan(self, cache: CarvedCache) -> None:
        found = [r for batch in cache.scan() for r in batch.to_pylist()]
        expect(found == self.rows, "scanned rows")

    def _iterate(self, cache: CarvedCache) -> None:
        dataset = CarvedDataset(cache, columns=["txt"])
        rows = list(dataset)
        expect(sorted(r.key for r in rows) == KEYS, "rows of the dataset")
        for image, packed in zip(dataset.collate(rows).images(), rows, strict=True):
            expect(torch.equal(image.features, self.images[image.key].features), "features")
            expect(packed.columns["txt"] == self.of_key[image.key]["txt"], "text")

    def _verify(self, cache: CarvedCache) -> None:
        for line in find_damage(cache.reader):
            expect("\n" not in line, line)

    def _look(self, _: CarvedCache) -> None:
        """What `carve status` does; any answer will do."""
        expect(all("\n" not in line for line in status_lines(read_status(self.store), "u")), "line")


def expect(is_so: bool, what: str) -> None:
    if not is_so:
        raise BrokenPromiseError(f"wrong {what}")


def _outcome(way: Callable[[], None]) -> str:
    try:
        way()
    except KeyNotFoundError as err:
        raise BrokenPromiseError(f"a key is said not to be there: {err}") from err
    except PipelineError as err:
        expect("\n" not in str(err), f"message of several lines: {err}")
        return type(err).__name__
    return "right"


def _compare(cache: CarvedCache, key: str, expected: Any) -> None:
    image = cache[key]
    for name in ("features", "positions", "sizes", "ranks"):
        expect(torch.equal(getattr(image, name), getattr(expected, name)), f"{name} of {key}")
    for name in ("key", "grid", "width", "height"):
        expect(getattr(image, name) == getattr(expected, name), f"{name} of {key}")


def _compare_prefix(cache: CarvedCache, key: str, expected: Any) -> None:
    best = expected.ranks.argsort()[: cache.keep_tokens].sort().values
    expect(torch.equal(cache[key].features, expected.features[best]), f"prefix of {key}")


@contextmanager
def _clock_and_names_fixed() -> Iterator[None]:
    """Let the same bytes be written every time."""
    with (
        mock.patch("uuid.uuid4", side_effect=(uuid.UUID(int=n << 64) for n in itertools.count(1))),
        mock.patch("time.time", return_value=1_700_000_000.0),
        # Of a store in memory it is the time of writing; some records hold it.
        mock.patch("pipeline.storage._backend.Backend.etag", return_value="e"),
    ):
        yield


def _fill(store: Store) -> None:
    settings = {**SETTINGS, "codec": {"name": "int8", "options": {"seed": 3}}}
    claim_identity(store, {**IDENTITY, "settings": settings})
    made = [make_row(k, seed=i, num_tokens=17 + i, text=f"t{i}") for i, k in enumerate(KEYS)]
    commit_rows(store, "a", made[:4], row_group_bytes=2000, part_bytes=4000)
    writer = make_writer(store, "b")
    with writer:
        for one in (*made[4:], make_row("k0", seed=99)):  # one is hidden by an earlier key
            writer.write(one)
        writer.finish([RejectedSample(key="x", stage="decode", reason="corrupt", message="m")])
    store.put(layout.commit_path("b", "f" * 16), make_commit(writer).to_json())
    path = record_path(build_snapshot(store).number)
    snapshot = parse_record(store.read(path), where=path)
    store.put(path, dump_record({**snapshot, "created_at": 1_700_000_000.0}))
    report = RunReport(run_id="r1", started_at=1_700_000_000.0)
    report.failed.append(FailedShard(shard="c", reason="truncated", message="m", attempts=1))
    report.save(store)

"""Small caches in many parts and row groups, and stores that tell what is read of them."""

import threading
from collections.abc import Sequence
from typing import BinaryIO, TypeVar

from pipeline import open_cache
from pipeline.cache import commit, snapshot
from pipeline.cache.commit import claim_identity
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.row_place import RowPlace
from pipeline.cache.snapshot import build_snapshot
from pipeline.cache.writer import RowToWrite
from pipeline.carved_cache import CarvedCache
from pipeline.storage import Store, open_store
from pipeline.storage._range_reader import RangeReader
from tests.cache.rows import IDENTITY, commit_rows, make_row

S = TypeVar("S", bound=Store)


def key_of(number: int) -> str:
    return f"k{number:04d}"


def keys_of(num_rows: int) -> list[str]:
    return [key_of(number) for number in range(num_rows)]


def make_rows(num_rows: int, *, most_tokens: int = 24) -> list[RowToWrite]:
    """Return rows of 1 to `most_tokens` tokens, and a caption each."""
    return [
        make_row(key_of(n), seed=n, num_tokens=1 + n * 7 % most_tokens, text=f"text {n}")
        for n in range(num_rows)
    ]


def write_rows(
    url: str,
    rows: Sequence[RowToWrite],
    *,
    row_group_bytes: int = 4_000,
    part_bytes: int = 12_000,
) -> None:
    """Commit rows as two shards, with a snapshot."""
    store = open_store(url)
    claim_identity(store, IDENTITY)
    half = len(rows) * 3 // 5
    for shard, some in (("a", rows[:half]), ("b", rows[half:])):
        commit_rows(store, shard, some, row_group_bytes=row_group_bytes, part_bytes=part_bytes)
    build_snapshot(store)


def make_cache(url: str, num_rows: int) -> CarvedCache:
    write_rows(url, make_rows(num_rows))
    return open_cache(url)


class WatchedStore(Store):
    """Remembers which bytes were read: (path, offset, length)."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.spans: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def read(self, path: str, *, most: int | None = None) -> bytes:
        content = super().read(path, most=most)
        self._note(path, 0, len(content))
        return content

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self._note(path, offset, length)
        return super().read_range(path, offset, length)

    def read_spans(self, path: str, spans: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
        for offset, views in spans:
            self._note(path, offset, sum(map(len, views)))
        super().read_spans(path, spans)

    def _note(self, path: str, offset: int, length: int) -> None:
        with self._lock:
            self.spans.append((path, offset, length))

    def has_read(self, place: RowPlace) -> bool:
        """Tell whether a byte of a row's tokens was read."""
        end = place.tokens_offset + place.tokens_length
        return any(
            path == place.path and start < end and start + length > place.tokens_offset
            for path, start, length in self.spans
        )


class DistantStore(WatchedStore):
    """Takes a local folder for a remote store: every read is a request for a range."""

    def local_path(self, path: str) -> None:
        return None

    def open_read(self, path: str, *, size: int | None = None) -> BinaryIO:
        return RangeReader(self, path, size)  # type: ignore[return-value]


def watched(url: str) -> tuple[CarvedCache, WatchedStore]:
    """Open a cache's latest snapshot on a store that remembers."""
    return _opened(WatchedStore(url))


def distant(url: str) -> tuple[CarvedCache, DistantStore]:
    """Open a cache in a local folder as if it were far away."""
    return _opened(DistantStore(url))


def _opened(store: S) -> tuple[CarvedCache, S]:
    latest = snapshot.latest_snapshot(store)
    assert latest is not None
    reader = SnapshotReader(store=store, snapshot=latest)
    return CarvedCache(reader=reader, identity=commit.read_identity(store)), store

"""Read rows of a snapshot by key or by scan; bytes only, no torch and no codec."""

import bisect
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import row
from pipeline.cache.open_parts import OpenParts
from pipeline.cache.row import StoredTokens
from pipeline.cache.snapshot import Snapshot
from pipeline.errors import KeyNotFoundError
from pipeline.storage import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlace:
    """Where one row lies."""

    key: str
    path: str  # of its part
    row_group: int
    row: int  # within the row group
    num_tokens: int
    grid_t: int
    grid_h: int
    grid_w: int
    width: int  # of the image, in pixels
    height: int
    tokens_offset: int  # bytes from the start of the part
    tokens_length: int
    aux_offset: int
    aux_length: int


@dataclass(kw_only=True)
class SnapshotReader:
    """Rows of one snapshot; stays as it is while jobs add to the cache."""

    store: Store
    snapshot: Snapshot
    tables: tuple[pa.Table, pa.Table] | None = field(default=None, repr=False)
    """Files and index of a snapshot that is not stored; else they are read when first needed."""
    _parts: OpenParts = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._parts = OpenParts(self.store)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without open files and what can be read again."""
        kept = {"store": self.store, "snapshot": self.snapshot, "tables": self.tables}
        return {**kept, "_parts": self._parts}

    def file_records(self) -> list[dict[str, Any]]:
        """Return path, size, sha256, rows and shard of every part, by file number."""
        table = self.tables[0] if self.tables else self._table(self.snapshot.files)
        return list(table.to_pylist())

    @cached_property
    def files(self) -> list[str]:
        """Paths of the parts, by file number."""
        return [record["path"] for record in self.file_records()]

    @cached_property
    def index(self) -> pa.Table:
        """The sorted index, in memory."""
        table = self.tables[1] if self.tables else self._table(self.snapshot.index)
        return table.combine_chunks()

    @cached_property
    def _keys(self) -> pa.Array:
        column = self.index["key"]
        return column.combine_chunks() if column.num_chunks else pa.array([], pa.string())

    def __len__(self) -> int:
        return self.snapshot.num_rows

    def keys(self) -> Iterator[str]:
        """Yield all keys in order."""
        for chunk in self.index["key"].chunks:
            yield from chunk.to_pylist()

    def contains(self, key: str) -> bool:
        """Return whether there is such a key."""
        return self._search(key) is not None

    def find(self, key: str) -> RowPlace:
        """Return the place of a key's row.

        Raises:
            KeyNotFoundError: no such key.
        """
        number = self._search(key)
        if number is None:
            raise KeyNotFoundError(
                f"no image {key!r} in {self.store.url} (snapshot {self.snapshot.number}, "
                f"{len(self)} images)"
            )
        return self.place(number)

    def place(self, number: int) -> RowPlace:
        """Return the place of the row that is `number`th by key."""
        values = {
            name: self.index[name][number].as_py()
            for name in self.index.column_names
            if name not in ("content_hash", "part", "file")
        }
        return RowPlace(path=self.files[self.index["file"][number].as_py()], **values)

    def read_tokens(self, place: RowPlace, keep_tokens: int | None = None) -> StoredTokens:
        """Fetch the first `keep_tokens` tokens of one row by two ranged reads.

        Raises:
            CacheFormatError: the bytes are damaged.
            StorageError: the store cannot be read.
        """
        length = row.prefix_bytes(
            place.tokens_length, num_tokens=place.num_tokens, keep_tokens=keep_tokens
        )
        return row.unpack_row(
            self.store.read_range(place.path, place.tokens_offset, length),
            self.store.read_range(place.path, place.aux_offset, place.aux_length),
            tokens_length=place.tokens_length,
            keep_tokens=keep_tokens,
            where=f"{self.store.url}/{place.path} key {place.key!r}",
        )

    def read_many(
        self, places: Sequence[RowPlace], keep_tokens: int | None = None
    ) -> list[StoredTokens]:
        """Fetch several rows at once; in parallel where the store is remote."""
        if len(places) < 2 or self.store.local_path(places[0].path) is not None:
            return [self.read_tokens(place, keep_tokens) for place in places]
        with ThreadPoolExecutor(min(16, len(places))) as pool:
            return list(pool.map(lambda place: self.read_tokens(place, keep_tokens), places))

    def read_columns(self, place: RowPlace, columns: Sequence[str]) -> dict[str, Any]:
        """Return other columns of one row."""
        with self.part(place.path) as part:
            table = part.read_row_group(place.row_group, columns=list(columns))
        return dict(table.slice(place.row, 1).to_pylist()[0])

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield every row group as a record batch, part by part; nothing is unpacked.

        Rows hidden by a duplicate key are among them: a scan reads parts, not the index.
        """
        for path in self.files:
            yield from self.scan_part(path, columns)

    def scan_part(
        self, path: str, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the row groups of one part."""
        with self.part(path) as part:
            for group in range(part.num_row_groups):
                yield from part.read_row_group(group, columns=columns).to_batches()

    def part(self, path: str) -> AbstractContextManager[pq.ParquetFile]:
        """Give an open part for a block; the 16 used last stay open, their footers read once."""
        return self._parts.use(path)

    def _search(self, key: str) -> int | None:
        keys = self._keys
        number = bisect.bisect_left(range(len(keys)), key, key=lambda i: keys[i].as_py())
        return number if number < len(keys) and keys[number].as_py() == key else None

    def _table(self, path: str) -> pa.Table:
        return pq.read_table(io.BytesIO(self.store.read(path)))

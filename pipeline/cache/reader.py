"""Read rows of a snapshot by key or by scan; bytes only, no torch and no codec."""

import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import layout, parquet, row
from pipeline.cache.open_parts import OpenParts, PartRecord
from pipeline.cache.part_check import PartCheck
from pipeline.cache.row import StoredTokens
from pipeline.cache.snapshot import Snapshot
from pipeline.errors import CacheFormatError, KeyNotFoundError
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
    aux_crc32c: int | None = None  # tells this row from any other; None in older caches


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
        return [*self._records.values()]

    @cached_property
    def _records(self) -> dict[str, dict[str, Any]]:
        """The record of each part, by path."""
        found = self.snapshot
        table = self.tables[0] if self.tables else None
        if table is None:
            table = self._table(found.files, layout.FILES_SCHEMA, found.files_sha256)
        records = {record["path"]: record for record in table.to_pylist()}
        if len(records) != table.num_rows:
            raise CacheFormatError(f"{self.store.url}/{found.files} names a part twice")
        return records

    @cached_property
    def files(self) -> list[str]:
        """Paths of the parts, by file number."""
        return [*self._records]

    @cached_property
    def index(self) -> pa.Table:
        """The sorted index, in memory."""
        if self.tables:
            return self.tables[1].combine_chunks()
        found = self.snapshot
        table = self._table(found.index, layout.SNAPSHOT_INDEX_SCHEMA, found.index_sha256)
        if table.num_rows != found.num_rows:
            raise CacheFormatError(
                f"{self.store.url}/{found.index} has {table.num_rows} rows, not {found.num_rows}"
            )
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
        """Return the place of the row that is `number`th by key.

        Raises:
            CacheFormatError: the index says what cannot be.
        """
        values = {
            name: self.index[name][number].as_py()
            for name in self.index.column_names
            if name not in ("content_hash", "part", "file")
        }
        file = self.index["file"][number].as_py()
        if not 0 <= file < len(self.files):
            raise CacheFormatError(
                f"{self.store.url}: the index has key {values['key']!r} in file {file} of "
                f"{len(self.files)}; it is damaged"
            )
        place = RowPlace(path=self.files[file], **values)
        _check_place(place, self._records[place.path]["size"], f"{self.store.url}/{place.path}")
        return place

    def read_tokens(self, place: RowPlace, keep_tokens: int | None = None) -> StoredTokens:
        """Fetch the first `keep_tokens` tokens of one row by two ranged reads.

        Raises:
            CacheFormatError: the bytes are damaged.
            StorageError: the store cannot be read.
        """
        length = row.prefix_bytes(
            place.tokens_length, num_tokens=place.num_tokens, keep_tokens=keep_tokens
        )
        return self.checked(
            place,
            self.store.read_range(place.path, place.tokens_offset, length),
            self.store.read_range(place.path, place.aux_offset, place.aux_length),
            keep_tokens,
        )

    def checked(
        self,
        place: RowPlace,
        tokens: bytes | memoryview,
        aux: bytes | memoryview,
        keep_tokens: int | None = None,
    ) -> StoredTokens:
        """Check that bytes are the row that the index means, and cut them.

        Args:
            place: of the row.
            tokens: its first tokens, enough for `keep_tokens`.
            aux: all of its aux.
            keep_tokens: how many tokens are wanted; None for all.

        Raises:
            CacheFormatError: they are damaged, or another row.
        """
        where = f"{self.store.url}/{place.path} key {place.key!r}"
        stored = row.unpack_row(
            tokens, aux, tokens_length=place.tokens_length, keep_tokens=keep_tokens, where=where
        )
        row.check_is_indexed(
            aux, num_tokens=place.num_tokens, aux_crc32c=place.aux_crc32c, where=where
        )
        return stored

    def read_many(
        self, places: Sequence[RowPlace], keep_tokens: int | None = None
    ) -> list[StoredTokens]:
        """Fetch several rows at once; in parallel where the store is remote."""
        if len(places) < 2 or self.store.local_path(places[0].path) is not None:
            return [self.read_tokens(place, keep_tokens) for place in places]
        with ThreadPoolExecutor(min(16, len(places))) as pool:
            return list(pool.map(lambda place: self.read_tokens(place, keep_tokens), places))

    def read_columns(self, place: RowPlace, columns: Sequence[str]) -> dict[str, Any]:
        """Return other columns of one row.

        Raises:
            ValueError: there is no such column.
            CacheFormatError: the part is damaged, or another one than was committed.
        """
        table = self.read_row_group(place, columns)
        self.check_key(table, place)
        return dict(table.select(list(columns)).slice(place.row, 1).to_pylist()[0])

    def row_group_bytes(self, place: RowPlace) -> int:
        """Return the bytes of the row group that a row lies in.

        Raises:
            CacheFormatError: the part is damaged, or another one than was committed.
        """
        with self.part(place.path) as part:
            _check_row_group(part, place, self.store.url)
            return int(part.metadata.row_group(place.row_group).total_byte_size)

    def read_row_group(self, place: RowPlace, columns: Sequence[str]) -> pa.Table:
        """Return some columns of the row group that a row lies in, and `key`.

        Raises:
            ValueError: there is no such column.
            CacheFormatError: the part is damaged, or another one than was committed.
        """
        with self.part(place.path) as part:
            _check_row_group(part, place, self.store.url)
            names = [*dict.fromkeys(["key", *_known(part, columns)])]
            return _read_group(part, place.row_group, names, f"{self.store.url}/{place.path}")

    def check_key(self, table: pa.Table, place: RowPlace) -> None:
        """Check that a row group holds a row where the index says.

        Raises:
            CacheFormatError: it holds another.
        """
        if place.row >= len(table) or table["key"][place.row].as_py() != place.key:
            raise CacheFormatError(
                f"{self.store.url}/{place.path}: row {place.row} of row group {place.row_group} is "
                f"not key {place.key!r}"
            )

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield every row group as a record batch, part by part; nothing is unpacked.

        Rows hidden by a duplicate key are among them: a scan reads parts, not the index. Each
        batch has been compared with the index of its attempt, and tokens with their checksums.

        Raises:
            ValueError: there is no such column.
            CacheFormatError: a part is damaged, or another one than was committed.
        """
        for path in self.files:
            yield from self.scan_part(path, columns)

    def scan_part(
        self, path: str, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the row groups of one part."""
        where = f"{self.store.url}/{path}"
        check = PartCheck.read(self.store, path)
        with self.part(path) as part:
            wanted = part.schema_arrow.names if columns is None else _known(part, columns)
            names = check.columns_for(wanted)
            check.check_size(part.metadata, self._records[path]["rows"])
            for group in range(part.num_row_groups):
                table = _read_group(part, group, names, where)
                check.check_group(group, table)
                yield from table.select(wanted).to_batches()

    def part(self, path: str) -> AbstractContextManager[pq.ParquetFile]:
        """Give an open part for a block; the 16 used last stay open, their footers read once."""
        record = self._records[path]
        expected = PartRecord(size=record["size"], footer_crc32c=record.get("footer_crc32c"))
        return self._parts.use(path, expected)

    def _search(self, key: str) -> int | None:
        keys = self._keys
        number = bisect.bisect_left(range(len(keys)), key, key=lambda i: keys[i].as_py())
        return number if number < len(keys) and keys[number].as_py() == key else None

    def _table(self, path: str, schema: pa.Schema, sha256: str) -> pa.Table:
        content, where = self.store.read(path), f"{self.store.url}/{path}"
        if sha256:  # older snapshots do not say
            parquet.check_content(content, size=len(content), sha256=sha256, where=where)
        return parquet.read_table(content, schema, where=where)


def _check_row_group(part: pq.ParquetFile, place: RowPlace, url: str) -> None:
    if place.row_group >= part.num_row_groups:
        raise CacheFormatError(f"{url}/{place.path}: there is no row group {place.row_group}")


def _known(part: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    there = part.schema_arrow.names
    for name in columns:
        if name not in there:
            raise ValueError(f"no column {name!r}; there are {', '.join(there)}")
    return list(columns)


def _read_group(part: pq.ParquetFile, group: int, names: Sequence[str], where: str) -> pa.Table:
    with parquet.parsing(where):
        table = part.read_row_group(group, columns=list(names))
        table.validate(full=True)
    expected = part.metadata.row_group(group).num_rows
    if len(table) != expected:
        raise CacheFormatError(f"{where}: row group {group} holds {len(table)} of {expected} rows")
    return table


def _check_place(place: RowPlace, size: int, where: str) -> None:
    """Refuse a place that is not inside its part, before as much is fetched as it says."""
    spans = (
        (place.tokens_offset, place.tokens_length),
        (place.aux_offset, place.aux_length),
    )
    is_inside = all(start >= 0 and 0 < length <= size - start for start, length in spans)
    least_zero, least_one = (place.row_group, place.row), (place.grid_t, place.grid_h, place.grid_w)
    can_be = min(least_zero) >= 0 and min(*least_one, place.width, place.height) > 0
    if not is_inside or not can_be or not 0 < place.num_tokens <= place.tokens_length:
        raise CacheFormatError(
            f"{where}: the index says of key {place.key!r} what cannot be; it is damaged"
        )

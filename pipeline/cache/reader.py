"""Read rows of a snapshot by key or by scan; bytes only, no torch and no codec."""

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache import layout, parquet, row
from pipeline.cache.fetch import in_order
from pipeline.cache.open_parts import PartRecord
from pipeline.cache.part_check import PartCheck
from pipeline.cache.row import StoredTokens
from pipeline.cache.row_groups import RowGroups
from pipeline.cache.row_place import RowPlace, check_place
from pipeline.cache.segment_reader import SegmentReader, join_files
from pipeline.cache.snapshot_record import Snapshot, StoredTable
from pipeline.cache.sorted_rows import ORDER, merge_sorted, repeated, whole_keys
from pipeline.errors import CacheFormatError, KeyNotFoundError, NotFoundError
from pipeline.storage import Store

__all__ = ["RowPlace", "SnapshotReader"]

_PLACE = [f.name for f in fields(RowPlace) if f.name != "path"]


@dataclass(kw_only=True)
class SnapshotReader:
    """Rows of one snapshot; stays as it is while jobs add to the cache.

    Opening reads nothing. A key is looked for in the row groups whose first and last key it lies
    between; `RowGroups` says what stays in memory.
    """

    store: Store
    snapshot: Snapshot
    tables: Mapping[str, pa.Table] | None = field(default=None, repr=False)
    """By path, tables that are not stored."""
    _groups: RowGroups = field(init=False, repr=False)
    _segments: list[SegmentReader] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._groups = RowGroups(self.store, self.tables)
        self._segments = [SegmentReader(self._groups, s) for s in self.snapshot.segments]

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process without open files and what can be read again."""
        return _reopen, (self.store, self.snapshot, self.tables)

    def file_records(self) -> list[dict[str, Any]]:
        """Return what the files table says of every part, by file number."""
        return list(self._numbered[0].to_pylist())

    @property
    def files(self) -> list[str]:
        """Paths of the parts, by file number: in the order of shard and path."""
        return list(self._numbered[0]["path"].to_pylist())

    @cached_property
    def index(self) -> pa.Table:
        """All rows sorted by key, with file numbers; some 100 bytes a row in memory."""
        tables = list(self.rows())
        return pa.concat_tables([layout.SEGMENT_SCHEMA.empty_table(), *tables]).combine_chunks()

    def rows(self) -> Iterator[pa.Table]:
        """Yield the index in pieces, sorted by key; hidden rows are not in it."""
        numbers = self._numbered[1]
        streams = [s.stream(n) for s, n in zip(self._segments, numbers, strict=True)]
        if not self.snapshot.num_duplicates:
            yield from merge_sorted(streams)
            return
        for table in whole_keys(merge_sorted(streams)):
            rows = table.sort_by(ORDER)
            yield rows.filter(pc.invert(repeated(rows["key"])))

    def __len__(self) -> int:
        return self.snapshot.num_rows

    def keys(self) -> Iterator[str]:
        """Yield all keys in order."""
        for table in self.rows():
            yield from table["key"].to_pylist()

    def contains(self, key: str) -> bool:
        """Return whether there is such a key."""
        return any(segment.find(key) for segment in self._segments)

    def find(self, key: str) -> RowPlace:
        """Return the place of a key's row.

        Raises:
            KeyNotFoundError: no such key.
            CacheFormatError: the index is damaged.
            StorageError: the store cannot be read.
        """
        found = [(s, *row) for s in self._segments for row in s.find(key)]
        if not found:
            raise KeyNotFoundError(
                f"no image {key!r} in {self.store.url} (snapshot {self.snapshot.number}, "
                f"{len(self)} images)"
            )
        # Of rows with one key the one of the earliest shard counts.
        files = [(s.file_of(table["file"][n].as_py()), table, n) for s, table, n in found]
        file, table, number = min(files, key=lambda row: (row[0]["shard"], row[0]["path"]))
        values = {name: table[name][number].as_py() for name in _PLACE}
        return self._place(file["path"], file["size"], values)

    def find_many(self, keys: Sequence[str]) -> list[RowPlace]:
        """Return the places of several keys' rows; in parallel where the store is remote.

        Raises:
            KeyNotFoundError: one of them is not there.
            CacheFormatError: the index is damaged.
            StorageError: the store cannot be read.
        """
        if len(keys) < 2 or self.store.local_path("") is not None:
            return [self.find(key) for key in keys]
        return list(in_order(self.find, keys))

    def row_groups(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Return file number, row group and number of rows of all row groups, as stored.

        Hidden rows are not counted. Some 16 bytes a row group stay in memory, and what
        `file_records` tells of each part.
        """
        files: list[int] = []
        groups: list[int] = []
        rows: list[int] = []
        table = self._numbered[0]
        known = zip(table["path"].to_pylist(), table["row_groups"].to_pylist(), strict=True)
        for number, (path, sizes) in enumerate(known):
            if sizes is None:  # of the first layout
                sizes = np.bincount(self._rows_of_part(path)["row_group"].to_numpy()).tolist()
            hidden = [len(self._hidden.get((path, g), ())) for g in range(len(sizes))]
            files += [number] * len(sizes)
            groups += range(len(sizes))
            rows += [size - count for size, count in zip(sizes, hidden, strict=True)]
        return np.array(files, np.int32), np.array(groups, np.int32), np.array(rows, np.int64)

    def places_in(self, path: str, row_group: int) -> list[RowPlace]:
        """Return the places of the rows of a row group, as stored; hidden ones are not among them.

        They are read from the index of the attempt, which stays in memory for a while.
        """
        rows = self._rows_of_part(path)
        rows = rows.filter(pc.equal(rows["row_group"], row_group)).sort_by("row")
        hidden = self._hidden.get((path, row_group), set())
        size = self._record_of(path)["size"]
        values = [v for v in rows.select(_PLACE).to_pylist() if v["row"] not in hidden]
        return [self._place(path, size, v) for v in values]

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
            check.check_size(part.metadata, self._record_of(path)["rows"])
            for group in range(part.num_row_groups):
                table = _read_group(part, group, names, where)
                check.check_group(group, table)
                yield from table.select(wanted).to_batches()

    def part(self, path: str) -> AbstractContextManager[pq.ParquetFile]:
        """Give an open part for a block; of parts and tables the 16 used last stay open."""
        record = self._record_of(path)
        expected = PartRecord(size=record["size"], footer_crc32c=record.get("footer_crc32c"))
        return self._groups.open_files.use(path, expected)

    def _rows_of_part(self, path: str) -> pa.Table:
        parsed = layout.parse_part_path(path)
        if parsed is None:
            raise CacheFormatError(f"{self.store.url}/{path} is not the path of a part")
        shard_id, attempt, part = parsed
        index = StoredTable(path=layout.index_path(shard_id, attempt))
        groups = range(len(self._groups.starts(index, layout.INDEX_SCHEMA)) - 1)
        pieces = [self._groups.group(index, group, layout.INDEX_SCHEMA) for group in groups]
        rows = pa.concat_tables([layout.INDEX_SCHEMA.empty_table(), *pieces])
        return rows.filter(pc.equal(rows["part"], part))

    def _record_of(self, path: str) -> dict[str, Any]:
        """Return what the files table says of a part.

        Raises:
            NotFoundError: the snapshot has no such part.
        """
        parsed, files = layout.parse_part_path(path), self._numbered[0]
        wanted = (parsed[0] if parsed else "", path)
        shards, paths = files["shard"], files["path"]
        number = bisect.bisect_left(
            range(len(files)), wanted, key=lambda n: (shards[n].as_py(), paths[n].as_py())
        )
        if number == len(files) or paths[number].as_py() != path:
            raise NotFoundError(f"{self.store.url}: no part {path} in the snapshot")
        return dict(files.slice(number, 1).to_pylist()[0])

    def _place(self, path: str, size: int, values: Mapping[str, Any]) -> RowPlace:
        place = RowPlace(path=path, **values)
        check_place(place, size, f"{self.store.url}/{path}")
        return place

    @cached_property
    def _hidden(self) -> Mapping[tuple[str, int], set[int]]:
        """Rows that an equal key hides, by part and row group."""
        hidden: dict[tuple[str, int], set[int]] = defaultdict(set)
        if self.snapshot.hidden is not None:
            table = self._groups.whole(self.snapshot.hidden, layout.HIDDEN_SCHEMA)
            for row in table.select(["path", "row_group", "row"]).to_pylist():
                hidden[row["path"], row["row_group"]].add(row["row"])
        elif self.snapshot.num_duplicates:  # the first layout only leaves them out
            paths = self.files
            for path in paths:
                for row in self._rows_of_part(path).select(["row_group", "row"]).to_pylist():
                    hidden[path, row["row_group"]].add(row["row"])
            for table in self.rows():
                for row in table.select(["file", "row_group", "row"]).to_pylist():
                    hidden[paths[row["file"]], row["row_group"]].discard(row["row"])
        return hidden

    @cached_property
    def _numbered(self) -> tuple[pa.Table, list[NDArray[np.int32]]]:
        """The files that count, numbered, and the new numbers of those of each segment."""
        return join_files([segment.files for segment in self._segments])


def _reopen(
    store: Store, snapshot: Snapshot, tables: Mapping[str, pa.Table] | None
) -> SnapshotReader:
    return SnapshotReader(store=store, snapshot=snapshot, tables=tables)


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

"""Read rows of a snapshot by key or by scan; bytes only, no torch and no codec."""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache import layout, part_rows
from pipeline.cache.buffers import BufferPool
from pipeline.cache.fetch import THREADS
from pipeline.cache.fetched_rows import DamagedRow, unpack_rows
from pipeline.cache.found_rows import FoundRows
from pipeline.cache.open_parts import PartRecord
from pipeline.cache.part_check import PartCheck
from pipeline.cache.part_places import PartPlaces, PartRows
from pipeline.cache.places import Places
from pipeline.cache.row import StoredTokens
from pipeline.cache.row_batch import RowBatch, joined, of_stored
from pipeline.cache.row_fetch import Allocate, fetch_rows
from pipeline.cache.row_groups import RowGroups
from pipeline.cache.row_place import RowPlace
from pipeline.cache.segment_reader import SegmentReader, join_files
from pipeline.cache.snapshot_record import Snapshot
from pipeline.cache.sorted_rows import ORDER, merge_sorted, repeated, whole_keys
from pipeline.errors import CacheFormatError, KeyNotFoundError, NotFoundError
from pipeline.storage import Store

__all__ = ["RowPlace", "SnapshotReader"]


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
    _buffers: BufferPool = field(init=False, repr=False, default_factory=BufferPool)
    _parts: PartPlaces = field(init=False, repr=False)
    _segments: list[SegmentReader] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._groups = RowGroups(self.store, self.tables)
        self._parts = PartPlaces(
            self._groups, lambda: self._hidden, lambda path: int(self._record_of(path)["size"])
        )
        self._segments = [SegmentReader(self._groups, s) for s in self.snapshot.segments]

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process without open files and what can be read again."""
        return _reopen, (self.store, self.snapshot, self.tables)

    def file_records(self) -> list[dict[str, Any]]:
        """Return what the files table says of every part, by file number."""
        return list(self._numbered[0].to_pylist())

    @cached_property
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
        return any(len(segment.find([key])[0]) for segment in self._segments)

    def find(self, key: str) -> RowPlace:
        """Return the place of a key's row; errors as in `find_many`."""
        return self.find_many([key]).place(0)

    def find_many(self, keys: Sequence[str]) -> Places:
        """Return the places of several keys' rows, in their order.

        Raises:
            KeyNotFoundError: one of them is not there.
            CacheFormatError: the index is damaged.
            StorageError: the store cannot be read.
        """
        found = FoundRows([(s, *s.find(keys)) for s in self._segments])
        if missing := found.missing(len(keys)):
            raise KeyNotFoundError(
                f"no image {keys[missing[0]]!r} in {self.store.url} (snapshot "
                f"{self.snapshot.number}, {len(self)} images)"
            )
        places, sizes = found.places(keys)
        places.check(sizes, self.store.url)
        return places

    def row_groups(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Return file number, row group and number of rows of all row groups, as stored.

        Hidden rows are not counted. Some 16 bytes a row group stay in memory, and what
        `file_records` tells of each part.
        """
        return self._row_groups

    @cached_property
    def _row_groups(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        files: list[int] = []
        groups: list[int] = []
        rows: list[int] = []
        table = self._numbered[0]
        known = zip(table["path"].to_pylist(), table["row_groups"].to_pylist(), strict=True)
        for number, (path, sizes) in enumerate(known):
            if sizes is None:  # of the first layout
                sizes = np.bincount(self._parts.index_rows(path)["row_group"].to_numpy()).tolist()
            hidden = [len(self._hidden.get((path, g), ())) for g in range(len(sizes))]
            files += [number] * len(sizes)
            groups += range(len(sizes))
            rows += [size - count for size, count in zip(sizes, hidden, strict=True)]
        return np.array(files, np.int32), np.array(groups, np.int32), np.array(rows, np.int64)

    def part_rows(self, path: str) -> PartRows:
        """Return the rows of a part, as stored; hidden ones are not among them.

        They are read from the index of the attempt, which stays in memory for a while.
        """
        return self._parts.part(path)

    def read_part_rows(self, paths: Iterable[str]) -> None:
        """Read what `part_rows` gives of several parts, at once where the store is remote."""
        self._parts.read_ahead(paths)

    def visible_index(self, path: str) -> pa.Table:
        """Return what the index says of a part, as stored; hidden rows are not among them."""
        return self._parts.visible_index(path)

    def read_batch(
        self,
        places: Places,
        keep_tokens: int | None = None,
        *,
        allocate: Allocate | None = None,
        pool: Executor | None = None,
        damaged: list[DamagedRow] | None = None,
    ) -> RowBatch:
        """Fetch and check several rows at once.

        Args:
            places: of the rows.
            keep_tokens: how many tokens are wanted of each; None for all.
            allocate: returns so many bytes to read into; None for those of this reader.
            pool: reads what lies apart in parallel; None for one after the other.
            damaged: takes the rows that are damaged; None to raise an error about the first.

        Raises:
            CacheFormatError: the bytes of a row are damaged; names key, part and offset.
            NotFoundError: a part is missing.
            StorageError: the store cannot be read.
        """
        try:
            fetched = fetch_rows(
                self.store,
                places,
                keep_tokens=keep_tokens,
                allocate=allocate or self._buffers.take,
                pool=pool,
            )
        except CacheFormatError as err:  # a part is too short, for some of the rows
            return self._read_each(places, keep_tokens, damaged, err)
        return unpack_rows(fetched, keep_tokens=keep_tokens, url=self.store.url, damaged=damaged)

    def read_many(self, places: Places, keep_tokens: int | None = None) -> list[StoredTokens]:
        """Fetch several rows at once, one by one in memory; in parallel where the store is remote.

        Raises:
            CacheFormatError: the bytes of a row are damaged; names key, part and offset.
            StorageError: the store cannot be read.
        """
        batch = self.read_in_parallel(places, keep_tokens)
        return [batch.stored(number) for number in range(len(batch))]

    def read_in_parallel(self, places: Places, keep_tokens: int | None = None) -> RowBatch:
        """Fetch and check several rows, by parallel requests where the store is remote."""
        if len(places) < 2 or self.store.local_path("") is not None:
            return self.read_batch(places, keep_tokens)
        with ThreadPoolExecutor(min(THREADS, len(places))) as pool:
            return self.read_batch(places, keep_tokens, pool=pool)

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
            return part_rows.read_group(
                part, place.row_group, names, f"{self.store.url}/{place.path}"
            )

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

    def check_keys(self, table: pa.Table, places: Places) -> None:
        """Check that a row group holds rows where the index says.

        Args:
            table: the row group.
            places: of rows in it.

        Raises:
            CacheFormatError: one of them is another.
        """
        rows = places.column("row")
        is_inside = len(rows) and int(rows.max()) < len(table)
        if is_inside and table["key"].take(pa.array(rows)).to_pylist() == places.keys.tolist():
            return
        for place in places:
            self.check_key(table, place)

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
            wanted = part_rows.column_names(part) if columns is None else _known(part, columns)
            names = check.columns_for(wanted)
            check.check_size(part.metadata, self._record_of(path)["rows"])
            for group in range(part.num_row_groups):
                table = part_rows.read_group(part, group, names, where)
                check.check_group(group, table)
                yield from table.select(wanted).to_batches()

    def part(self, path: str) -> AbstractContextManager[pq.ParquetFile]:
        """Give an open part for a block; of parts and tables the 16 used last stay open."""
        record = self._record_of(path)
        expected = PartRecord(size=record["size"], footer_crc32c=record.get("footer_crc32c"))
        return self._groups.open_files.use(path, expected)

    def _read_each(
        self,
        places: Places,
        keep_tokens: int | None,
        damaged: list[DamagedRow] | None,
        error: CacheFormatError,
    ) -> RowBatch:
        """Read rows one by one, after an error about one of them that does not say which."""
        good = []
        for number in range(len(places)):
            one = places.slice(number, number + 1)
            try:
                fetched = fetch_rows(
                    self.store, one, keep_tokens=keep_tokens, allocate=self._buffers.take
                )
                good.append(unpack_rows(fetched, keep_tokens=keep_tokens, url=self.store.url))
            except CacheFormatError as err:
                where = places.where(number, self.store.url)
                if damaged is None:
                    raise CacheFormatError(f"{where}: {err}") from error
                damaged.append(DamagedRow.of(places.place(number), str(err)))
        return joined(good) if good else of_stored(places.slice(0, 0), [])

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
                for row in self._parts.index_rows(path).select(["row_group", "row"]).to_pylist():
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
    there = part_rows.column_names(part)
    for name in columns:
        if name not in there:
            raise ValueError(f"no column {name!r}; there are {', '.join(there)}")
    return list(columns)

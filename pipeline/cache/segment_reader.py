"""Read one segment: its rows of a key, of many keys, or all in order."""

import bisect
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.cache import layout
from pipeline.cache.fetch import in_order
from pipeline.cache.index_group import IndexGroup
from pipeline.cache.places import NUMBERS
from pipeline.cache.row_groups import RowGroups
from pipeline.cache.snapshot_record import IndexFile, Segment
from pipeline.errors import CacheFormatError

_FOR_HIDDEN = pa.schema(
    [layout.SEGMENT_SCHEMA.field(n) for n in ("key", "file", "row_group", "row", "num_tokens")]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedFile:
    """What a files table says of one part, as far as a reader by key needs it."""

    path: str
    size: int  # bytes
    shard: str


class SegmentReader:
    """Gives the rows of a segment that count. Safe to use from many threads.

    Args:
        groups: reads its tables.
        segment: what is read.
    """

    def __init__(self, groups: RowGroups, segment: Segment) -> None:
        self.groups = groups
        self.segment = segment
        self._dropped = {number for files in segment.dropped.values() for number in files}

    def find(self, keys: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look for keys; what is not in memory is read in parallel.

        Args:
            keys: in any order.

        Returns:
            (F,) which key each row found is of, and (F, C) its numbers as in `Places`, with the
            number of its file for the path. A key may have several rows.
        """
        wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, key in enumerate(keys):
            for candidate in self._candidates(key):
                wanted[candidate].append(number)
        asked: list[int] = []
        rows = [np.empty((0, len(NUMBERS) + 1), np.int64)]
        self._load(wanted)
        for place, numbers in wanted.items():
            group = self._group(place)
            found = [(number, row) for number in numbers for row in group.rows_of(keys[number])]
            asked += [number for number, _ in found]
            rows.append(group.numbers[[row for _, row in found]])
        at, numbers_found = np.array(asked, np.int64), np.concatenate(rows)
        if not self._dropped:
            return at, numbers_found
        seen = ~np.isin(numbers_found[:, 0], sorted(self._dropped))
        return at[seen], numbers_found[seen]

    def rows_of(self, keys: Sequence[str]) -> pa.Table:
        """Return the rows of many keys as `layout.HIDDEN_SCHEMA`, by key.

        Args:
            keys: sorted. Only row groups that may hold one of them are read.
        """
        files = [f for f in self.segment.index if _within(keys, f.first, f.last)]
        found = [t for tables in in_order(lambda f: self._rows_in(f, keys), files) for t in tables]
        if not found:
            return layout.HIDDEN_SCHEMA.empty_table()
        return place_rows(pa.concat_tables(found), self._all_files)

    def stream(
        self, numbers: NDArray[np.int32] | None = None, *, rows: int = 1 << 16
    ) -> Iterator[pa.Table]:
        """Yield all rows sorted by key, in pieces of about so many.

        Args:
            numbers: what each file is called now, in place of its number here.
            rows: of a piece.
        """
        for file in self.segment.index:
            for piece in self.groups.stream(file.table, layout.SEGMENT_SCHEMA, rows=rows):
                table = self._counted(piece)
                yield table if numbers is None else with_files(table, numbers)

    @cached_property
    def files(self) -> pa.Table:
        """Its files that count, in memory, with their numbers."""
        dropped = pa.array(sorted(self._dropped), pa.int32())
        files = self._all_files
        return files.filter(pc.invert(pc.is_in(files["file"], value_set=dropped)))

    @cached_property
    def _all_files(self) -> pa.Table:
        """Its files table; the number of a file is its place in it."""
        return self.groups.whole(self.segment.files, layout.FILES_SCHEMA)

    def file_of(self, number: int) -> IndexedFile:
        """Return what the files table says of a file; reads one row group of it at most."""
        table = self.segment.files
        starts = self.groups.starts(table, layout.FILES_SCHEMA)
        if not 0 <= number < starts[-1]:
            raise self._no_such_file(number, starts[-1])
        group = bisect.bisect_right(starts, number) - 1
        files = self.groups.group(table, group, layout.FILES_SCHEMA, _parse_files)
        return files[number - starts[group]]

    def _no_such_file(self, number: int, count: int) -> CacheFormatError:
        return CacheFormatError(
            f"{self.groups.store.url}: an index names file {number} of the {count} in "
            f"{self.segment.files.path}; it is damaged"
        )

    def _rows_in(self, file: IndexFile, keys: Sequence[str]) -> list[pa.Table]:
        found = []
        for group, (first, last) in enumerate(self.groups.bounds(file.table)):
            if span := _within(keys, first, last):
                table = self.groups.some(file.table, [group], _FOR_HIDDEN)
                among = pa.array(keys[slice(*span)], pa.string())
                rows = self._counted(table.filter(pc.is_in(table["key"], value_set=among)))
                found += [rows] if rows.num_rows else []
        return found

    def _candidates(self, key: str) -> Iterator[tuple[int, int]]:
        """Yield the index files and row groups that may hold a key."""
        start = bisect.bisect_left(self._last_keys, key)
        for number in range(start, len(self.segment.index)):
            file = self.segment.index[number]
            if file.first is not None and file.first > key:
                return
            bounds = self.groups.bounds(file.table)
            # Where the last key of one is not known, all are looked into.
            known = bounds[-1:] and bounds[0][1] is not None
            first = bisect.bisect_left(bounds, key, key=_last_of) if known else 0
            for group in range(first, len(bounds)):
                lowest, highest = bounds[group]
                if lowest is not None and lowest > key:
                    break
                if highest is None or highest >= key:
                    yield number, group

    def _load(self, places: Collection[tuple[int, int]]) -> None:
        """Read row groups that are not in memory, at once where the store is remote."""
        if self.groups.store.local_path("") is not None:
            return
        tables = [(self.segment.index[file].table, group) for file, group in places]
        missing = [p for p, t in zip(places, tables, strict=True) if not self.groups.is_kept(*t)]
        if len(missing) > 1:
            for _ in in_order(self._group, missing):
                pass

    def _group(self, place: tuple[int, int]) -> IndexGroup:
        file, group = place
        table = self.segment.index[file].table
        return self.groups.group(table, group, layout.SEGMENT_SCHEMA, IndexGroup.parse)

    @cached_property
    def _last_keys(self) -> list[str]:
        """The last key of each file; none where they are not known."""
        known = [file.last for file in self.segment.index if file.last is not None]
        return known if len(known) == len(self.segment.index) else []

    def _counted(self, table: pa.Table) -> pa.Table:
        if table.num_rows:
            count = self.groups.starts(self.segment.files, layout.FILES_SCHEMA)[-1]
            found = pc.min_max(table["file"]).as_py()
            if not 0 <= found["min"] <= found["max"] < count:
                raise self._no_such_file(found["max"], count)
        if not self._dropped:
            return table
        dropped = pc.is_in(table["file"], value_set=pa.array(sorted(self._dropped), pa.int32()))
        return table.filter(pc.invert(dropped))


def _parse_files(files: pa.Table) -> list[IndexedFile]:
    columns = (files[name].to_pylist() for name in ("path", "size", "shard"))
    return [IndexedFile(path=p, size=n, shard=s) for p, n, s in zip(*columns, strict=True)]


def _last_of(bounds: tuple[str | None, str | None]) -> str:
    return bounds[1] or ""


def place_rows(rows: pa.Table, files: pa.Table) -> pa.Table:
    """Return index rows as `layout.HIDDEN_SCHEMA`: with shard and path for their file.

    Args:
        rows: of an index.
        files: the whole files table that they refer to.
    """
    named = {name: pc.take(files[name], rows["file"]) for name in ("shard", "path")}
    columns = [named[f.name] if f.name in named else rows[f.name] for f in layout.HIDDEN_SCHEMA]
    return pa.table(columns, schema=layout.HIDDEN_SCHEMA)


def join_files(tables: Sequence[pa.Table]) -> tuple[pa.Table, list[NDArray[np.int32]]]:
    """Return files in the order of shard and path, numbered, and of each table its new numbers."""
    origin = pa.array(np.repeat(np.arange(len(tables)), [t.num_rows for t in tables]), pa.int32())
    joined = pa.concat_tables([layout.FILES_SCHEMA.empty_table(), *tables])
    joined = joined.append_column("origin", origin)
    joined = joined.sort_by([("shard", "ascending"), ("path", "ascending")])
    origins, before = joined["origin"].to_numpy(), joined["file"].to_numpy()
    numbers = []
    for table in range(len(tables)):
        places = np.flatnonzero(origins == table).astype(np.int32)
        known = before[places]
        renamed = np.full(int(known.max()) + 1 if len(known) else 0, -1, np.int32)
        renamed[known] = places
        numbers.append(renamed)
    files = joined.drop_columns(["origin"]).set_column(
        0, layout.FILES_SCHEMA.field("file"), pa.array(np.arange(joined.num_rows), pa.int32())
    )
    return files, numbers


def with_files(table: pa.Table, numbers: NDArray[np.int32]) -> pa.Table:
    """Return index rows with other file numbers: `numbers[old]` each."""
    place = table.column_names.index("file")
    renamed = pc.take(pa.array(numbers, pa.int32()), table["file"])
    return table.set_column(place, layout.SEGMENT_SCHEMA.field("file"), renamed)


def _within(keys: Sequence[str], first: str | None, last: str | None) -> tuple[int, int] | None:
    """Return where those of sorted keys begin and end that lie between two, or None for none."""
    start = 0 if first is None else bisect.bisect_left(keys, first)
    stop = len(keys) if last is None else bisect.bisect_right(keys, last)
    return (start, stop) if start < stop else None

"""Tables of a cache read a row group at a time, the ones used last kept in memory."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import layout, parquet
from pipeline.cache.open_parts import OpenParts, PartRecord
from pipeline.cache.snapshot_record import StoredTable
from pipeline.fork_lock import ForkLock
from pipeline.storage import Store

T = TypeVar("T")
Bounds = Sequence[tuple[str | None, str | None]]

_MAX_ROWS = 1 << 19  # kept; about 200 bytes each


class RowGroups:
    """Reads tables of a cache by row group. Safe to use from many threads.

    Of an index that was read from, the first and last key of its row groups stay in memory: some
    200 bytes for each 4,096 rows. Of the rows themselves at most 2^19 do, of all tables together.

    All methods raise `CacheFormatError` where a table is damaged or not of the schema asked for,
    `NotFoundError` where it is missing, and `StorageError` where the store cannot be read.

    Args:
        store: the cache.
        tables: by path, those that are in memory and not in the store.
    """

    def __init__(self, store: Store, tables: Mapping[str, pa.Table] | None = None) -> None:
        self.store = store
        self.tables = tables or {}
        self.open_files = OpenParts(store)
        self._bounds: dict[str, Bounds] = {}
        self._starts: dict[str, Sequence[int]] = {}
        self._kept: OrderedDict[tuple[str, int], tuple[Any, int]] = OrderedDict()
        self._num_kept = 0
        self._lock = ForkLock()

    def starts(self, table: StoredTable, schema: pa.Schema) -> Sequence[int]:
        """Return the number of the first row of each row group, and the number of rows."""
        if table.path in self.tables:
            return [0, self.tables[table.path].num_rows]
        if table.path not in self._starts:
            with self._open(table, schema) as file:
                groups = range(file.metadata.num_row_groups)
                sizes = [file.metadata.row_group(group).num_rows for group in groups]
            self._starts[table.path] = [0, *itertools.accumulate(sizes)]
        return self._starts[table.path]

    def bounds(self, index: StoredTable) -> Bounds:
        """Return the first and last key of each row group; None of all if any is not known."""
        if index.path in self.tables:
            return [(None, None)]
        if index.path not in self._bounds:
            with self._open(index, layout.SEGMENT_SCHEMA) as file:
                column = file.schema_arrow.get_field_index("key")
                groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
                bounds = [_bounds_of(group.column(column)) for group in groups]
            is_known = all(first is not None and last is not None for first, last in bounds)
            self._bounds[index.path] = bounds if is_known else [(None, None)] * len(bounds)
        return self._bounds[index.path]

    def group(
        self, table: StoredTable, number: int, schema: pa.Schema, parse: Callable[[pa.Table], T]
    ) -> T:
        """Return what is made of a row group, and keep it.

        Args:
            table: that it is of.
            number: of the row group.
            schema: of the table.
            parse: makes it; the same function for all row groups of one table.
        """
        place = (table.path, number)
        with self._lock:
            kept = self._kept.get(place)
            if kept is not None:
                self._kept.move_to_end(place)
                return cast("T", kept[0])
        rows = self.some(table, [number], schema).combine_chunks()
        parsed = parse(rows)
        with self._lock:
            if place not in self._kept:
                self._kept[place] = (parsed, rows.num_rows)
                self._num_kept += rows.num_rows
            while self._num_kept > _MAX_ROWS and len(self._kept) > 1:
                self._num_kept -= self._kept.popitem(last=False)[1][1]
        return parsed

    def is_kept(self, table: StoredTable, number: int) -> bool:
        """Tell whether a row group is in memory."""
        with self._lock:
            return table.path in self.tables or (table.path, number) in self._kept

    def some(self, table: StoredTable, numbers: Sequence[int], schema: pa.Schema) -> pa.Table:
        """Return columns of some row groups; they are not kept."""
        if table.path in self.tables:
            return self.tables[table.path].select(schema.names)
        with self._open(table, schema) as file:
            there = file.schema_arrow.names
            names = [name for name in schema.names if name in there]
            found = file.read_row_groups(list(numbers), columns=names, use_threads=False)
        return parquet.conform(found, schema, where=self.store.url_of(table.path))

    def stream(
        self, table: StoredTable, schema: pa.Schema, *, rows: int = 1 << 16
    ) -> Iterator[pa.Table]:
        """Yield a table in pieces of about so many rows; none is kept."""
        starts = self.starts(table, schema)
        group = 0
        while group < len(starts) - 1:
            end = group + 1
            while end < len(starts) - 1 and starts[end + 1] - starts[group] <= rows:
                end += 1
            yield self.some(table, range(group, end), schema)
            group = end

    def whole(self, table: StoredTable, schema: pa.Schema) -> pa.Table:
        """Return a whole table."""
        pieces = list(self.stream(table, schema, rows=1 << 20))
        return pa.concat_tables([schema.empty_table(), *pieces]).combine_chunks()

    @contextmanager
    def _open(self, table: StoredTable, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
        where = self.store.url_of(table.path)
        record = PartRecord(
            size=table.size, footer_crc32c=table.footer_crc32c, columns=list(schema)
        )
        with self.open_files.use(table.path, record) as file, parquet.parsing(where):
            if table.footer_crc32c is None:
                size = self.store.size(table.path)
                parquet.check_claim(file.metadata.num_rows, size, where=where)
            yield file


def _bounds_of(column: pq.ColumnChunkMetaData) -> tuple[str | None, str | None]:
    known = column.statistics
    if known is None or not known.has_min_max:
        return None, None
    return known.min, known.max

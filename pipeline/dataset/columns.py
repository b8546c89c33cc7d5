"""Other columns of rows: read row group by row group, those used last kept in memory."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.places import Places
from pipeline.cache.reader import SnapshotReader
from pipeline.fork_lock import ForkLock

_MAX_ROWS = 1 << 16  # kept


def joined(pieces: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """Return the columns of several batches, which have the same, as those of one."""
    return {name: [value for piece in pieces for value in piece[name]] for name in pieces[0]}


class Columns:
    """Reads columns of a cache for the rows of batches. Safe to use from many threads.

    A row group is read once while its rows are given; columns of 2^16 rows stay in memory.

    Args:
        reader: of the cache.
        names: of the columns.
    """

    def __init__(self, reader: SnapshotReader, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._reader = reader
        self._kept: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._lock = ForkLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process without what can be read again."""
        return Columns, (self._reader, self.names)

    def check(self) -> None:
        """Look for the columns in the first part.

        Raises:
            ValueError: there is no such column.
            CacheFormatError: the part is damaged.
        """
        if self.names and (files := self._reader.files):
            with self._reader.part(files[0]) as part:
                there = part.schema_arrow.names
            for name in self.names:
                if name not in there:
                    raise ValueError(f"no column {name!r}; there are {', '.join(there)}")

    def of(self, places: Places) -> dict[str, list[Any]]:
        """Return the values of each column, in the order of the rows.

        Raises:
            ValueError: there is no such column.
            CacheFormatError: a part is damaged, or another one than was committed.
        """
        if not self.names or not len(places):
            return {name: [] for name in self.names}
        pairs = places.column("path") << 32 | places.column("row_group")
        order = np.argsort(pairs, kind="stable")
        cuts = np.flatnonzero(np.diff(pairs[order])) + 1
        tables = [self._rows(places.take(numbers)) for numbers in np.split(order, cuts)]
        back = pa.array(np.argsort(order, kind="stable"))
        found = pa.concat_tables(tables).take(back)
        return {name: found[name].to_pylist() for name in self.names}

    def _rows(self, places: Places) -> pa.Table:
        """Return the columns of some rows of one row group."""
        first = places.place(0)
        table = self._group(first.path, first.row_group, places)
        self._reader.check_keys(table, places)
        return table.select(list(self.names)).take(pa.array(places.column("row")))

    def _group(self, path: str, row_group: int, places: Places) -> pa.Table:
        with self._lock:
            kept = self._kept.get((path, row_group))
            if kept is not None:
                self._kept.move_to_end((path, row_group))
                return kept
        table = self._reader.read_row_group(places.place(0), self.names)
        with self._lock:
            self._kept[path, row_group] = table
            while sum(t.num_rows for t in self._kept.values()) > _MAX_ROWS and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return table

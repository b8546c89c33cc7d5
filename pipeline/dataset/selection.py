"""Which rows of a cache pass a filter, found before an epoch begins and without reading tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache import layout
from pipeline.cache.fetch import in_order
from pipeline.cache.reader import SnapshotReader
from pipeline.errors import CacheFormatError

Filters = Sequence[tuple[str, str, Any]] | Sequence[Sequence[tuple[str, str, Any]]]
"""Conditions (column, operator, value) that all hold, or a list of such lists one of which holds;
operators are those of `pyarrow.parquet.filters_to_expression`: = == != < > <= >= in, not in."""

_INDEXED = frozenset(layout.INDEX_SCHEMA.names) - {"part", "row_group", "row"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The visible rows of each row group that are read; 4 bytes each."""

    rows: NDArray[np.int32]  # of all row groups, one behind the other, ascending in each
    starts: NDArray[np.int64]  # where those of each row group begin, and the end of the last

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each row group."""
        return np.diff(self.starts)

    def visible(self, groups: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which visible row of its row group each selected row is."""
        return self.rows[self.starts[groups] + rows].astype(np.int64)


def select_rows(reader: SnapshotReader, filters: Filters) -> Selection:
    """Find the rows that pass a filter.

    Columns of the index (key, num_tokens, grid, width, height, content_hash) are looked up there;
    for others those columns alone are read of every part.

    Args:
        reader: of the cache.
        filters: to pass.

    Raises:
        ValueError: no such column or operator.
        CacheFormatError: a part is damaged.
    """
    expression, names = _parse(filters)
    files, groups, sizes = reader.row_groups()
    paths = reader.files
    by_file = np.split(np.arange(len(files)), np.flatnonzero(np.diff(files)) + 1)

    def of_file(numbers: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        if not len(numbers):
            return []
        path = paths[files[numbers[0]]]
        own = groups[numbers].tolist()
        if set(names) <= _INDEXED:
            tables = _index_tables(reader, path, own, names)
        else:
            tables = _part_tables(reader, path, own, names)
        return [_passing(table, expression) for table in tables]

    found = [rows for some in in_order(of_file, by_file) for rows in some]
    if [len(rows) > size for rows, size in zip(found, sizes.tolist(), strict=True)].count(True):
        raise CacheFormatError(f"{reader.store.url}: a row group has more rows than its index")
    counts = np.array([len(rows) for rows in found], np.int64)
    return Selection(
        rows=np.concatenate([np.empty(0, np.int32), *found]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
    )


def canonical(filters: Filters) -> str:
    """Return a text that is the same for filters that are the same, however they are written."""
    return repr(
        [
            [(name, "=" if op == "==" else op, _canonical(value)) for name, op, value in some]
            for some in _nested(filters)
        ]
    )


def _canonical(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return repr(value.item() if isinstance(value, np.generic) else value)
    plain = value.to_pylist() if isinstance(value, pa.Array | pa.ChunkedArray) else list(value)
    return repr(sorted(map(_canonical, plain)))


def _nested(filters: Filters) -> Sequence[Any]:
    """Return a filter as a list of lists of conditions."""
    is_flat = bool(filters) and bool(filters[0]) and isinstance(filters[0][0], str)
    nested = [filters] if is_flat else filters
    if not nested or not all(nested):
        raise ValueError(f"filters={filters!r}: give at least one condition")
    return nested


def _parse(filters: Filters) -> tuple[Any, list[str]]:
    nested = _nested(filters)
    names = [*dict.fromkeys(str(condition[0]) for some in nested for condition in some)]
    try:
        return pq.filters_to_expression(filters), names
    except (TypeError, ValueError, IndexError) as err:
        raise ValueError(f"filters={filters!r}: {err}") from err


def _index_tables(
    reader: SnapshotReader, path: str, groups: Sequence[int], names: Sequence[str]
) -> Iterator[pa.Table]:
    rows = reader.visible_index(path)
    starts = np.searchsorted(rows["row_group"].to_numpy(), np.arange(max(groups, default=0) + 2))
    for group in groups:
        yield rows.slice(starts[group], starts[group + 1] - starts[group]).select(names)


def _part_tables(
    reader: SnapshotReader, path: str, groups: Sequence[int], names: Sequence[str]
) -> Iterator[pa.Table]:
    part = reader.part_rows(path)
    for group in groups:
        places = part.group(group)
        if not len(places):
            yield pa.table({name: pa.nulls(0) for name in names})
            continue
        table = reader.read_row_group(places.place(0), names)
        rows = places.column("row")
        reader.check_keys(table, places)
        yield table.select(names).take(pa.array(rows))


def _passing(table: pa.Table, expression: Any) -> NDArray[np.int32]:  # noqa: ANN401
    """Return the numbers of the rows that pass."""
    if not table.num_rows:
        return np.empty(0, np.int32)
    numbered = table.append_column("__row", pa.array(np.arange(table.num_rows), pa.int32()))
    try:
        passed = numbered.filter(expression)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as err:
        raise ValueError(f"a filter does not fit its column: {err}") from err
    return passed["__row"].to_numpy()

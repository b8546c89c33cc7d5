"""Streams of tables sorted by key: merged, and cut between keys, with little in memory."""

import bisect
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

ORDER = [("key", "ascending"), ("file", "ascending")]


def merge_sorted(streams: Sequence[Iterable[pa.Table]]) -> Iterator[pa.Table]:
    """Yield the rows of several streams, sorted by key; holds one table of each.

    Rows of one key follow each other in any order.

    Args:
        streams: of tables with the same columns, `key` and `file` among them, each sorted by key.
    """
    heads = [(table, rest) for rest in map(_not_empty, streams) for table in _next(rest)]
    while len(heads) > 1:
        # Whatever comes later in any stream is at least the last key of its table.
        limit = min(table["key"][-1].as_py() for table, _ in heads)
        pieces, left = [], []
        for table, rest in heads:
            count = position(table["key"], limit, after=True)
            pieces += [table.slice(0, count)] if count else []
            kept = [table.slice(count)] if count < table.num_rows else _next(rest)
            left += [(table, rest) for table in kept]
        heads = left
        yield pa.concat_tables(pieces).sort_by(ORDER) if len(pieces) > 1 else pieces[0]
    for table, rest in heads:
        yield table
        yield from rest


def whole_keys(stream: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Cut a stream sorted by key anew, so that all rows of one key are in one table."""
    held: pa.Table | None = None
    for table in _not_empty(stream):
        joined = table if held is None else pa.concat_tables([held, table])
        count = position(joined["key"], joined["key"][-1].as_py(), after=False)
        if count:
            yield joined.slice(0, count)
        held = joined.slice(count)
    if held is not None:
        yield held


def even_tables(stream: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield tables of just so many rows, but for the last."""
    held: list[pa.Table] = []
    count = 0
    for table in stream:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            joined = pa.concat_tables(held)
            yield joined.slice(0, rows).combine_chunks()
            held = [joined.slice(rows)]
            count -= rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def position(keys: pa.ChunkedArray, key: str, *, after: bool) -> int:
    """Return how many of sorted keys are less than one, or (`after`) not greater."""
    search = bisect.bisect_right if after else bisect.bisect_left
    return search(range(len(keys)), key, key=lambda i: keys[i].as_py())


def repeated(keys: pa.ChunkedArray) -> pa.Array:
    """Tell of each of sorted keys whether the one before it is the same."""
    if len(keys) < 2:
        return pa.array([False] * len(keys), pa.bool_())
    only = keys.combine_chunks() if keys.num_chunks > 1 else keys.chunk(0)
    return pa.concat_arrays([pa.array([False]), pc.equal(only[1:], only[:-1])])


def _not_empty(stream: Iterable[pa.Table]) -> Iterator[pa.Table]:
    return (table for table in stream if table.num_rows)


def _next(stream: Iterator[pa.Table]) -> list[pa.Table]:
    table = next(stream, None)
    return [] if table is None else [table]

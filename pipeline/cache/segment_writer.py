"""Make a segment: of the rows of new commits, and of segments that it takes the place of."""

import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache import layout, parquet
from pipeline.cache.commit import Commit
from pipeline.cache.segment_reader import SegmentReader, join_files, with_files
from pipeline.cache.snapshot_record import IndexFile, Segment, StoredTable
from pipeline.cache.sorted_rows import ORDER, even_tables, merge_sorted
from pipeline.cache.spool import Spool, local_errors
from pipeline.storage import Store

Put = Callable[[str, pa.Table], StoredTable]
"""Stores a table under a path."""

_FILE_ROWS = 1 << 18  # of one file of an index: some 10 MB
_GROUP_ROWS = 1 << 12  # what is read to find one key: some 100 kB
_RUN_ROWS = 1 << 20  # sorted in memory at once; about 100 bytes each
_MAX_SMALL = 256  # tables
_MAX_RUNS = 64  # merged at once
_SMALL_ROWS = 1 << 15  # rewriting fewer rows than this is not worth avoiding


class NewRows:
    """The index rows of new commits, sorted in runs; all but the last lie in temporary files."""

    def __init__(self) -> None:
        self.shards: dict[str, list[Any]] = {name: [] for name in layout.SHARDS_SCHEMA.names}
        self._files: dict[str, list[Any]] = {name: [] for name in layout.FILES_SCHEMA.names}
        self._runs: list[Spool] = []
        self._small: list[pa.Table] = []  # one of each commit; a table of few rows takes 20 kB
        self._unsorted: list[pa.Table] = []
        self._last: list[pa.Table] = []  # the last run, sorted
        self._num_unsorted = 0
        self.num_rows = 0

    def add(self, commit: Commit, etag: str, index: pa.Table) -> None:
        """Add the rows of a commit. Commits come sorted by shard id.

        Args:
            commit: a record.
            etag: of the record's object.
            index: its index table; empty where it has none.
        """
        parts = [file for file in commit.files if file.kind == "part"]
        first = len(self._files["file"])
        row_groups = _row_groups(index, len(parts))
        for number, (part, sizes) in enumerate(zip(parts, row_groups, strict=True), first):
            described = (part.path, part.size, part.sha256, part.rows, commit.shard_id)
            _append(self._files, (number, *described, part.footer_crc32c, sizes))
        tokens = pc.sum(index["num_tokens"]).as_py() or 0
        values = (commit.shard_id, commit.work_fingerprint, commit.attempt, etag)
        _append(self.shards, (*values, index.num_rows, tokens))
        file = pc.add(index["part"], pa.scalar(first, pa.int32()))
        self._small.append(index.append_column(layout.SEGMENT_SCHEMA.field("file"), file))
        if len(self._small) == _MAX_SMALL:
            self._join_small()
        self._num_unsorted += index.num_rows
        self.num_rows += index.num_rows
        if self._num_unsorted >= _RUN_ROWS:
            self._runs.append(_spooled([self._sort()]))
            if len(self._runs) == _MAX_RUNS:
                merged = _spooled(merge_sorted(_streams(self._runs)))
                self.close()
                self._runs = [merged]

    def close(self) -> None:
        """Free the temporary files."""
        for run in self._runs:
            run.close()

    def files(self) -> pa.Table:
        """Return their files, numbered as in the rows."""
        return pa.table(self._files, schema=layout.FILES_SCHEMA)

    def streams(self) -> list[Iterable[pa.Table]]:
        """Return streams of rows sorted by key, once all are added; may be called again."""
        if self._num_unsorted:
            self._last = [self._sort()]
        last = [_pieces(table, _RUN_ROWS // _MAX_RUNS) for table in self._last]
        return [*_streams(self._runs), *last]

    def _join_small(self) -> None:
        if self._small:
            self._unsorted.append(pa.concat_tables(self._small).combine_chunks())
            self._small = []

    def _sort(self) -> pa.Table:
        self._join_small()
        table = pa.concat_tables(self._unsorted).sort_by(ORDER)
        self._unsorted, self._num_unsorted = [], 0
        return table


def choose_merged(segments: Sequence[Segment], num_new: int, *, something_new: bool) -> list[int]:
    """Return which segments a new one takes the place of, so that few remain.

    Each one that remains is at least twice as large as the new one, so there are at most log2 as
    many as rows, and a row is written again at most as often. One half of which does not count any
    more is written again too.
    """
    size = max(num_new, _SMALL_ROWS) if something_new else 0
    merged = []
    for number in sorted(range(len(segments)), key=lambda n: segments[n].num_rows):
        segment = segments[number]
        similar = max(segment.num_rows, _SMALL_ROWS) < 2 * size
        if similar or segment.dropped_rows > segment.num_rows:
            merged.append(number)
            size += segment.num_rows
    return merged


def write_segment(
    number: int,
    new: NewRows,
    merged: Sequence[SegmentReader],
    merged_shards: pa.Table,
    *,
    put: Put,
) -> Segment:
    """Write the tables of a segment.

    Args:
        number: of the snapshot that it is made for.
        new: rows of new commits.
        merged: segments that it takes the place of.
        merged_shards: the shards of those that count.
        put: stores a table.
    """
    token = unique_name()
    files, numbers = join_files([new.files(), *(segment.files for segment in merged)])
    rows = _RUN_ROWS // max(1, len(merged) + 1)
    streams: list[Iterable[pa.Table]] = [
        (with_files(table, numbers[0]) for table in stream) for stream in new.streams()
    ]
    streams += [s.stream(n, rows=rows) for s, n in zip(merged, numbers[1:], strict=True)]
    shards = pa.concat_tables([pa.table(new.shards, schema=layout.SHARDS_SCHEMA), merged_shards])
    stored_shards = put(
        layout.snapshot_path(number, f"shards-{token}.parquet"), shards.sort_by("shard")
    )
    stored_files = put(layout.snapshot_path(number, f"files-{token}.parquet"), files)
    index = []
    for count, table in enumerate(even_tables(merge_sorted(streams), _FILE_ROWS)):
        path = layout.snapshot_path(number, f"index-{token}-{count:05d}.parquet")
        first, last = table["key"][0].as_py(), table["key"][-1].as_py()
        index.append(IndexFile(table=put(path, table), rows=table.num_rows, first=first, last=last))
    return Segment(shards=stored_shards, files=stored_files, index=tuple(index))


def put_table(store: Store, path: str, table: pa.Table) -> StoredTable:
    """Store a table of a snapshot."""
    content = parquet_bytes(table)
    store.put(path, content)
    found = parquet.footer_of(content, where=path)
    footer = content[-found:] if isinstance(found, int) else found
    checksum = parquet.footer_checksum(footer)
    return StoredTable(path=path, size=len(content), footer_crc32c=checksum)


def unique_name() -> str:
    """Return what tells the tables of one builder from those of another."""
    return uuid.uuid4().hex[:8]


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table of a snapshot as a file."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=_GROUP_ROWS,
        write_page_checksum=True,
        write_statistics=["key"] if "key" in table.column_names else False,
    )
    return bytes(sink.getvalue().to_pybytes())


def _row_groups(index: pa.Table, num_parts: int) -> list[list[int]]:
    """Return how many rows each row group of each part has."""
    part, group = index["part"].to_numpy(), index["row_group"].to_numpy()
    return [np.bincount(group[part == number]).tolist() for number in range(num_parts)]


def _append(columns: dict[str, list[Any]], values: Sequence[Any]) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _spooled(tables: Iterable[pa.Table]) -> Spool:
    """Return a run in a temporary file."""
    with local_errors("a snapshot's rows", tempfile.gettempdir()):
        spool = Spool()
        with pq.ParquetWriter(spool.path, layout.SEGMENT_SCHEMA, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table, row_group_size=_RUN_ROWS // _MAX_RUNS)
    return spool


def _streams(runs: Sequence[Spool]) -> list[Iterable[pa.Table]]:
    return [_read_run(run) for run in runs]


def _read_run(run: Spool) -> Iterator[pa.Table]:
    with pq.ParquetFile(run.path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def _pieces(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)

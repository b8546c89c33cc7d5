"""Which commit of each shard the segments of a snapshot cover."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.cache import layout
from pipeline.cache.row_groups import RowGroups
from pipeline.cache.segment_reader import SegmentReader
from pipeline.cache.snapshot_record import Segment
from pipeline.errors import CacheFormatError


@dataclass(frozen=True, kw_only=True, slots=True)
class Covered:
    """One commit that a segment covers."""

    shard: str
    work: str
    attempt: str
    etag: str | None  # of its record; None where it is not known
    rows: int
    tokens: int
    segment: int


def read_coverage(groups: RowGroups, segments: Sequence[Segment]) -> dict[str, Covered]:
    """Return the commit of each shard that counts, from the tables of the segments."""
    covered: dict[str, Covered] = {}
    for number, segment in enumerate(segments):
        if segment.shards is None:
            found = _of_first_layout(groups, segment, number)
        else:
            found = _of_table(groups.whole(segment.shards, layout.SHARDS_SCHEMA), number)
        covered.update((c.shard, c) for c in found if c.shard not in segment.dropped)
    return covered


def coverage_table(covered: Iterable[Covered]) -> pa.Table:
    """Return commits as a segment's table of shards."""
    rows = list(covered)
    columns = [[getattr(c, name) for c in rows] for name in layout.SHARDS_SCHEMA.names]
    arrays = [pa.array(v, f.type) for v, f in zip(columns, layout.SHARDS_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=layout.SHARDS_SCHEMA)


def _of_table(table: pa.Table, segment: int) -> Iterator[Covered]:
    columns = [table[name].to_pylist() for name in layout.SHARDS_SCHEMA.names]
    for shard, work, attempt, etag, rows, tokens in zip(*columns, strict=True):
        yield Covered(
            shard=shard,
            work=work,
            attempt=attempt,
            etag=etag,
            rows=rows,
            tokens=tokens,
            segment=segment,
        )


def _of_first_layout(groups: RowGroups, segment: Segment, number: int) -> Iterator[Covered]:
    """Yield what can be told without records: the attempts that have a part, and their sizes."""
    reader = SegmentReader(groups, segment)
    rows, tokens = (np.zeros(reader.files.num_rows, np.int64) for _ in range(2))
    for table in reader.stream():
        file, num_tokens = table["file"].to_numpy(), table["num_tokens"].to_numpy()
        rows += np.bincount(file, minlength=len(rows))
        tokens += np.bincount(file, weights=num_tokens, minlength=len(rows)).astype(np.int64)
    shards, paths = reader.files["shard"].to_pylist(), reader.files["path"].to_pylist()
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for file, (shard, path) in enumerate(zip(shards, paths, strict=True)):
        parsed = layout.parse_part_path(path)
        if parsed is None:
            raise CacheFormatError(f"{segment.files.path} names {path!r}, which is no part")
        attempt = parsed[1]
        before = totals.get((shard, attempt), (0, 0))
        totals[shard, attempt] = before[0] + int(rows[file]), before[1] + int(tokens[file])
    for (shard, attempt), (num_rows, num_tokens) in totals.items():
        yield Covered(
            shard=shard,
            work="",
            attempt=attempt,
            etag=None,
            rows=num_rows,
            tokens=num_tokens,
            segment=number,
        )

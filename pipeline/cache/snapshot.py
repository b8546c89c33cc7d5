"""A snapshot: a sorted index over all commits of a moment, immutable, for readers.

snapshots/<n>/files-<id>.parquet   the committed files, numbered
snapshots/<n>/index-<id>.parquet   key -> file and place, sorted by key
snapshots/<n>/snapshot.json        names the two; put if absent, last
"""

import io
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache import layout
from pipeline.cache.commit import Commit, current_commits, read_commits
from pipeline.errors import AlreadyExistsError, CacheFormatError
from pipeline.storage import Store

_MAX_KEPT_DUPLICATES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What `snapshot.json` holds."""

    number: int
    work: str  # fingerprint of the commits it covers
    files: str  # path of the files table
    index: str  # path of the index table
    num_shards: int
    num_rows: int
    num_tokens: int
    num_duplicates: int  # rows left out because an earlier shard has the same key
    duplicates: tuple[tuple[str, str], ...]  # (key, shard left out), at most 100
    created_at: float


def build_snapshot(store: Store) -> Snapshot:
    """Make a snapshot of all commits, or return the latest if it covers just these.

    Where two shards hold one key, the shard whose id sorts first keeps it.
    """
    while True:
        # In this order: a commit that `latest` covers is then among the commits read, and
        # publishing the number after it can hide none.
        latest = latest_snapshot(store)
        commits = current_commits(list(read_commits(store)))
        if latest is not None and latest.work == _work(commits):
            return latest
        number = latest.number + 1 if latest else 0
        snapshot, files, index = collect_snapshot(store, commits, number=number)
        if _publish(store, snapshot, files, index):
            return snapshot
        # Another driver took this number meanwhile, and may cover commits that we have not read.


def collect_snapshot(
    store: Store, commits: Sequence[Commit] | None = None, *, number: int = -1
) -> tuple[Snapshot, pa.Table, pa.Table]:
    """Return a snapshot of all commits with its files and index tables, without storing it."""
    if commits is None:
        commits = current_commits(list(read_commits(store)))
    files = _files_table(commits)
    index, duplicates = _index_table(store, commits, files)
    token = uuid.uuid4().hex[:8]
    snapshot = Snapshot(
        number=number,
        work=_work(commits),
        files=layout.snapshot_path(number, f"files-{token}.parquet"),
        index=layout.snapshot_path(number, f"index-{token}.parquet"),
        num_shards=len(commits),
        num_rows=index.num_rows,
        num_tokens=pc.sum(index["num_tokens"]).as_py() or 0,
        num_duplicates=len(duplicates),
        duplicates=tuple(duplicates[:_MAX_KEPT_DUPLICATES]),
        created_at=time.time(),
    )
    return snapshot, files, index


def latest_snapshot(store: Store) -> Snapshot | None:
    """Return the newest snapshot, or None if there is none."""
    numbers = [
        entry.path.split("/")[-2]
        for entry in store.list(layout.SNAPSHOTS)
        if entry.path.endswith("/snapshot.json")
    ]
    return read_snapshot(store, int(max(numbers))) if numbers else None


def read_snapshot(store: Store, number: int) -> Snapshot:
    """Read one snapshot's record.

    Raises:
        NotFoundError: there is no such snapshot.
        CacheFormatError: the record is damaged or of another version.
    """
    path = layout.snapshot_path(number, "snapshot.json")
    try:
        values: dict[str, Any] = json.loads(store.read(path))
        version = values.pop("format_version")
        if version != layout.FORMAT_VERSION:
            raise CacheFormatError(
                f"{path}: format version {version} is not known; install a newer carvecache"
            )
        values["duplicates"] = tuple((key, shard) for key, shard in values["duplicates"])
        return Snapshot(**values)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as err:
        raise CacheFormatError(f"{store.url}/{path} is damaged: {err}") from err


def _work(commits: Sequence[Commit]) -> str:
    return layout.fingerprint([(c.shard_id, c.attempt) for c in commits])


def _publish(store: Store, snapshot: Snapshot, files: pa.Table, index: pa.Table) -> bool:
    """Store a snapshot; return False, leaving nothing, if its number is taken."""
    store.put(snapshot.files, _parquet_bytes(files))
    store.put(snapshot.index, _parquet_bytes(index))
    record = {"format_version": layout.FORMAT_VERSION, **asdict(snapshot)}
    path = layout.snapshot_path(snapshot.number, "snapshot.json")
    try:
        store.put_once(path, layout.dump_json(record))
    except AlreadyExistsError:
        store.delete(snapshot.files)
        store.delete(snapshot.index)
        return False
    return True


def _files_table(commits: Sequence[Commit]) -> pa.Table:
    rows = [
        {**_file_row(f), "shard": commit.shard_id}
        for commit in commits
        for f in commit.files
        if f.kind == "part"
    ]
    numbered = [{"file": number, **values} for number, values in enumerate(rows)]
    return pa.Table.from_pylist(numbered, schema=layout.FILES_SCHEMA)


def _file_row(file: Any) -> Mapping[str, Any]:  # noqa: ANN401  (a WrittenFile)
    return {"path": file.path, "size": file.size, "sha256": file.sha256, "rows": file.rows}


def _index_table(
    store: Store, commits: Sequence[Commit], files: pa.Table
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Return the rows of all shards sorted by key, and the (key, shard id) left out of them."""
    numbers = {path: number for number, path in enumerate(files["path"].to_pylist())}
    schema = layout.INDEX_SCHEMA.append(pa.field("file", pa.int32(), nullable=False))
    tables = [schema.empty_table()]
    for commit in commits:
        parts = [numbers[f.path] for f in commit.files if f.kind == "part"]
        for f in commit.files:
            if f.kind == "index":
                rows = pq.read_table(io.BytesIO(store.read(f.path)), schema=layout.INDEX_SCHEMA)
                file_of_row = pc.take(pa.array(parts, pa.int32()), rows["part"])
                tables.append(rows.append_column(schema.field("file"), file_of_row))
    # Within equal keys the lower file number, that is the earlier shard, comes first.
    index = pa.concat_tables(tables).sort_by([("key", "ascending"), ("file", "ascending")])
    if index.num_rows < 2:
        return index, []
    keys = index["key"].combine_chunks()
    repeats = pc.equal(keys[1:], keys[:-1])
    repeats = pa.concat_arrays([pa.array([False]), *_chunks(repeats)])
    left_out = index.filter(repeats)
    shards = pc.take(files["shard"], left_out["file"]).to_pylist()
    duplicates = list(zip(left_out["key"].to_pylist(), shards, strict=True))
    return index.filter(pc.invert(repeats)), duplicates


def _chunks(array: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return array.chunks if isinstance(array, pa.ChunkedArray) else [array]


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 16, write_page_index=True)
    return bytes(sink.getvalue().to_pybytes())

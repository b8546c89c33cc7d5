"""A snapshot: a sorted index over all commits of a moment, immutable, for readers.

snapshots/<n>/files-<id>.parquet   the committed files, numbered
snapshots/<n>/index-<id>.parquet   key -> file and place, sorted by key
snapshots/<n>/snapshot.json        names the two; put if absent, last
"""

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipeline.cache import layout, parquet
from pipeline.cache.commit import Commit, list_records, read_commits, select_current
from pipeline.cache.fetch import in_order
from pipeline.cache.record import dump_record, read_record
from pipeline.cache.writer import WrittenFile
from pipeline.errors import AlreadyExistsError, CacheFormatError
from pipeline.storage import Entry, Store

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
    records: str = ""
    """Fingerprint of the listing of commit records it was made from; "" where it is not known."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of each shard with several commits their work fingerprints, that of the one covered first."""
    files_sha256: str = ""
    """Of the files table; "" in older snapshots."""
    index_sha256: str = ""
    """Of the index table; "" in older snapshots."""


_SNAPSHOT = TypeAdapter(Snapshot)


def build_snapshot(store: Store, wanted: Mapping[str, str] | None = None) -> Snapshot:
    """Make a snapshot of all commits, or return the latest if it covers just these.

    Where two shards hold one key, the shard whose id sorts first keeps it.

    Args:
        store: the cache.
        wanted: work fingerprint by shard id, of those shards whose input is known now: where a
            shard has several commits, that one counts. Of a shard that is not named, the commit
            that the latest snapshot chose counts, or, once it has more, the newest.
    """
    while True:
        # In this order: a commit that `latest` covers is then among the records listed, and
        # publishing the number after it can hide none.
        latest = latest_snapshot(store)
        records = list_records(store)
        several = _shards_with_several(records)
        preferred = _preferred(several, latest, wanted or {})
        if latest is not None and _is_still_so(latest, records, preferred):
            return latest
        commits = select_current(read_commits(store, records), preferred)
        choices = _choices(several, commits)
        if latest is not None and (latest.work, latest.choices) == (_work(commits), choices):
            return latest
        number = latest.number + 1 if latest else 0
        made, files, index = _assemble(store, commits, number=number)
        snapshot = replace(made, records=_listing(records), choices=choices)
        published = _publish(store, snapshot, files, index)
        if published is not None:
            return published
        # Another driver took this number meanwhile, and may cover commits not listed here.


def collect_snapshot(store: Store) -> tuple[Snapshot, pa.Table, pa.Table]:
    """Return a snapshot of all commits with its files and index tables, without storing it."""
    return _assemble(store, select_current(read_commits(store)), number=-1)


def _assemble(
    store: Store, commits: Sequence[Commit], *, number: int
) -> tuple[Snapshot, pa.Table, pa.Table]:
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
    numbers = list_snapshots(store)
    return read_snapshot(store, numbers[-1]) if numbers else None


def list_snapshots(store: Store) -> list[int]:
    """Return the numbers of all snapshots, ascending; one listing, no reads."""
    return sorted(
        int(entry.path.split("/")[-2])
        for entry in store.list(layout.SNAPSHOTS)
        if entry.path.endswith("/snapshot.json")
    )


def read_snapshot(store: Store, number: int) -> Snapshot:
    """Read one snapshot's record.

    Raises:
        NotFoundError: there is no such snapshot.
        CacheFormatError: the record is damaged or of another version.
    """
    path = layout.snapshot_path(number, "snapshot.json")
    try:
        snapshot = _SNAPSHOT.validate_python(read_record(store, path))
    except ValidationError as err:
        (first, *_) = err.errors()
        place = ".".join(map(str, first["loc"]))
        raise CacheFormatError(f"{store.url}/{path} is damaged: {place}: {first['msg']}") from err
    folder = layout.snapshot_path(number, "")
    if snapshot.number != number or not all(
        table.startswith(folder) for table in (snapshot.files, snapshot.index)
    ):
        raise CacheFormatError(f"{store.url}/{path} is the record of another snapshot")
    return snapshot


def _listing(records: Sequence[Entry]) -> str:
    # With the etag: a record may have been removed and its shard carved again.
    return layout.fingerprint([(record.path, record.etag) for record in records])


def _shards_with_several(records: Sequence[Entry]) -> dict[str, list[str]]:
    """Return the sorted work fingerprints of each shard that has several commits."""
    found: dict[str, list[str]] = {}
    for shard_id, work in sorted(filter(None, (layout.parse_commit_path(r.path) for r in records))):
        found.setdefault(shard_id, []).append(work)
    return {shard_id: works for shard_id, works in found.items() if len(works) > 1}


def _preferred(
    several: Mapping[str, Sequence[str]], latest: Snapshot | None, wanted: Mapping[str, str]
) -> dict[str, str]:
    """Return which commit counts, of the shards where it is known without reading them."""
    preferred: dict[str, str] = {}
    for shard_id, works in several.items():
        before = latest.choices.get(shard_id, ()) if latest is not None else ()
        if shard_id in wanted and wanted[shard_id] in works:
            preferred[shard_id] = wanted[shard_id]
        elif sorted(before) == works:
            preferred[shard_id] = before[0]
    return preferred


def _is_still_so(latest: Snapshot, records: Sequence[Entry], preferred: Mapping[str, str]) -> bool:
    """Return whether the latest snapshot is known to cover the records without reading them."""
    chosen = {shard_id: works[0] for shard_id, works in latest.choices.items()}
    return latest.records == _listing(records) and chosen == preferred


def _choices(
    several: Mapping[str, Sequence[str]], current: Sequence[Commit]
) -> dict[str, tuple[str, ...]]:
    works = {c.shard_id: c.work_fingerprint for c in current if c.shard_id in several}
    return {
        shard_id: (works[shard_id], *(work for work in known if work != works[shard_id]))
        for shard_id, known in several.items()
    }


def _work(commits: Sequence[Commit]) -> str:
    return layout.fingerprint([(c.shard_id, c.attempt) for c in commits])


def _publish(store: Store, snapshot: Snapshot, files: pa.Table, index: pa.Table) -> Snapshot | None:
    """Store a snapshot and return its record; None, leaving nothing, if its number is taken."""
    tables = _parquet_bytes(files), _parquet_bytes(index)
    store.put(snapshot.files, tables[0])
    store.put(snapshot.index, tables[1])
    files_sha256, index_sha256 = (hashlib.sha256(content).hexdigest() for content in tables)
    snapshot = replace(snapshot, files_sha256=files_sha256, index_sha256=index_sha256)
    path = layout.snapshot_path(snapshot.number, "snapshot.json")
    try:
        store.put_once(path, dump_record(asdict(snapshot)))
    except AlreadyExistsError:
        store.delete(snapshot.files)
        store.delete(snapshot.index)
        return None
    return snapshot


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
    names = ("path", "size", "sha256", "rows", "footer_crc32c")
    return {name: getattr(file, name) for name in names}


def _index_table(
    store: Store, commits: Sequence[Commit], files: pa.Table
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Return the rows of all shards sorted by key, and the (key, shard id) left out of them."""
    numbers = {path: number for number, path in enumerate(files["path"].to_pylist())}
    schema = layout.SNAPSHOT_INDEX_SCHEMA
    tables = [schema.empty_table()]
    indexed = [(commit, f) for commit in commits for f in commit.files if f.kind == "index"]
    found = in_order(lambda file: _read_index(store, file), [file for _, file in indexed])
    for (commit, _), rows in zip(indexed, found, strict=True):
        parts = [numbers[f.path] for f in commit.files if f.kind == "part"]
        _check_parts(rows, len(parts), where=f"{store.url}: index of shard {commit.shard_id}")
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


def _read_index(store: Store, file: WrittenFile) -> pa.Table:
    content, where = store.read(file.path), store.url_of(file.path)
    parquet.check_content(content, size=file.size, sha256=file.sha256, where=where)
    return parquet.read_table(content, layout.INDEX_SCHEMA, where=where)


def _check_parts(rows: pa.Table, num_parts: int, *, where: str) -> None:
    if not rows.num_rows:
        return
    found = pc.min_max(rows["part"]).as_py()
    if not 0 <= found["min"] <= found["max"] < num_parts:
        raise CacheFormatError(f"{where}: names part {found['max']} of {num_parts}; it is damaged")


def _chunks(array: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return array.chunks if isinstance(array, pa.ChunkedArray) else [array]


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=1 << 16,
        write_page_index=True,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue().to_pybytes())

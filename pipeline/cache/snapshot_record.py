"""What `snapshot.json` holds: the segments of a snapshot, and what they come to.

snapshots/<n>/snapshot.json               names tables of this and of earlier snapshots
snapshots/<n>/shards-<id>.parquet         the commits that a segment covers
snapshots/<n>/files-<id>.parquet          their parts, numbered
snapshots/<n>/index-<id>-<m>.parquet      key -> file and place, sorted by key
snapshots/<n>/hidden-<id>.parquet         rows with the key of an earlier shard, if there are any
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.cache import layout
from pipeline.cache.record import dump_record, read_record
from pipeline.errors import CacheFormatError, NotFoundError
from pipeline.storage import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTable:
    """One table of a snapshot."""

    path: str
    size: int | None = None  # bytes; None where it is not known
    footer_crc32c: int | None = None  # its pages have checksums of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFile:
    """One file of a sorted index; the files of a segment follow each other by key."""

    table: StoredTable
    rows: int
    first: str | None = None  # its first and last key; None where they are not known
    last: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Sorted rows of some commits, written once; those of dropped shards do not count."""

    shards: StoredTable | None  # None in snapshots of the first layout
    files: StoredTable
    index: tuple[IndexFile, ...]
    dropped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shards that do not count any more, each with the numbers of its files."""
    dropped_rows: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that count."""
        return sum(file.rows for file in self.index) - self.dropped_rows

    @property
    def paths(self) -> list[str]:
        """Paths of its tables."""
        shards = [] if self.shards is None else [self.shards.path]
        return [*shards, self.files.path, *(file.table.path for file in self.index)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A view of the commits of a moment."""

    number: int
    segments: tuple[Segment, ...]
    num_shards: int
    num_rows: int
    num_tokens: int
    num_duplicates: int  # rows hidden because an earlier shard has the same key
    duplicates: tuple[tuple[str, str], ...]  # (key, shard hidden), the first 100
    created_at: float  # Unix time
    hidden: StoredTable | None = None  # all of them, if there are any
    records: str = ""
    """Fingerprint of the listing of commit records it was made from; "" where it is not known."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of each shard with several commits their work fingerprints, that of the one covered first."""

    @property
    def paths(self) -> list[str]:
        """Paths of all its tables."""
        hidden = [] if self.hidden is None else [self.hidden.path]
        return [*hidden, *(path for segment in self.segments for path in segment.paths)]

    def to_json(self) -> bytes:
        """Return the bytes of `snapshot.json`."""
        return dump_record(asdict(self))


_SNAPSHOT = TypeAdapter(Snapshot)


def record_path(number: int) -> str:
    """Return the path of a snapshot's record."""
    return layout.snapshot_path(number, "snapshot.json")


def latest_snapshot(store: Store) -> Snapshot | None:
    """Return the newest snapshot, or None if there is none."""
    for number in reversed(_numbers(store)):
        try:
            return read_snapshot(store, number)
        except NotFoundError:  # its tables are there; its record is not yet, or never will be
            continue
    return None


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
    path = record_path(number)
    values = read_record(store, path)
    try:
        if "segments" not in values and {"files", "index", "num_rows"} <= values.keys():
            values["segments"] = [_first_layout(values)]
        snapshot = _SNAPSHOT.validate_python(values)
    except ValidationError as err:
        (first, *_) = err.errors()
        place = ".".join(map(str, first["loc"]))
        raise CacheFormatError(f"{store.url}/{path} is damaged: {place}: {first['msg']}") from err
    if snapshot.number != number:
        raise CacheFormatError(f"{store.url}/{path} is the record of another snapshot")
    for table in snapshot.paths:
        folder, _, name = table.partition("/")
        if folder != layout.SNAPSHOTS or not name:
            raise CacheFormatError(f"{store.url}/{path} names {table!r}, which is no table of it")
    return snapshot


def _first_layout(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the one segment of a snapshot with one table each of files and index."""
    index = {"table": {"path": values["index"]}, "rows": values["num_rows"]}
    return {"shards": None, "files": {"path": values["files"]}, "index": [index]}


def _numbers(store: Store) -> list[int]:
    return sorted(int(name) for name in store.list_names(layout.SNAPSHOTS) if name.isdecimal())

"""Every path and column of a cache: the only module that knows them.

`docs/cache_format.md` is the promise made to other readers; a change here changes it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

FORMAT_VERSION = 2
"""Of new caches: how their rows are stored. A cache keeps the version it was made with."""

FORMAT_VERSIONS = (1, 2)
"""Those that are read, and added to."""

RECORD_VERSION = 1
"""Of commit records and `snapshot.json`, which are the same in caches of all versions."""

_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

_UNIQUE_TABLE = re.compile(r"(shards|files|index|hidden)-[0-9a-f]{8}(-[0-9]{5,9})?\.parquet")

IDENTITY_PATH = "carve.json"
COMMITS = "commits"
SNAPSHOTS = "snapshots"
RUNS = "runs"
DATA = "data"
ARTEFACTS = "artefacts"
ARTEFACT_PATH = "artefact.json"
INDEX_NAME = "index.parquet"

METADATA_KEY = b"carvecache"
"""Key of the JSON in the metadata of every Parquet file."""

PACKED = "packed"
"""Column of version 2: `aux` of a row, then its `tokens`, so that one read brings both."""

FIXED_COLUMNS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("content_hash", pa.binary(16), nullable=False),
    pa.field("num_tokens", pa.int32(), nullable=False),
    pa.field("grid_t", pa.int32(), nullable=False),
    pa.field("grid_h", pa.int32(), nullable=False),
    pa.field("grid_w", pa.int32(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("tokens", pa.large_binary(), nullable=False),
    pa.field("aux", pa.binary(), nullable=False),
    pa.field("crc32c", pa.uint32(), nullable=False),
)
"""Columns of version 1, and what a reader gives of every version."""

PACKED_COLUMNS = tuple(
    pa.field(PACKED, pa.large_binary(), nullable=False) if f.name == "tokens" else f
    for f in FIXED_COLUMNS
    if f.name != "aux"
)
"""Columns of version 2."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("content_hash", pa.binary(16), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # within its row group
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("grid_t", pa.int32(), nullable=False),
        pa.field("grid_h", pa.int32(), nullable=False),
        pa.field("grid_w", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("tokens_offset", pa.int64(), nullable=False),
        pa.field("tokens_length", pa.int64(), nullable=False),
        pa.field("aux_offset", pa.int64(), nullable=False),
        pa.field("aux_length", pa.int64(), nullable=False),
        pa.field("aux_crc32c", pa.uint32()),  # its last 4 bytes; null in older files
    ]
)

ERRORS_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("key", "stage", "reason", "message")]
)

FILES_SCHEMA = pa.schema(
    [
        pa.field("file", pa.int32(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("footer_crc32c", pa.uint32()),  # of the part's footer; null in older files
        pa.field("row_groups", pa.list_(pa.int32())),  # rows of each; null in older files
    ]
)
"""Parts of a segment, numbered in the order of shard and path."""

SEGMENT_SCHEMA = INDEX_SCHEMA.append(pa.field("file", pa.int32(), nullable=False))
"""Rows of a segment, sorted by key; `file` is a number of its files table."""

FAILURES_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("error_class", pa.string()),  # not in the first files of version 1, like host
        pa.field("host", pa.string()),
    ]
)

SHARDS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("work", pa.string(), nullable=False),
        pa.field("attempt", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),  # of the commit record
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
"""Commits that a segment covers."""

HIDDEN_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)
"""Rows that an equal key of an earlier shard hides."""


def fixed_columns(version: int) -> tuple[pa.Field, ...]:
    """Return the columns that every part of a version has."""
    return FIXED_COLUMNS if version == 1 else PACKED_COLUMNS


def part_schema(columns: Sequence[str], metadata: Mapping[str, Any], version: int) -> pa.Schema:
    """Return the schema of a part: the fixed columns, then the user's as nullable text."""
    user = [pa.field(name, pa.string()) for name in columns]
    return pa.schema([*fixed_columns(version), *user], metadata={METADATA_KEY: dump_json(metadata)})


def artefact_path(kind: str, name: str) -> str:
    """Return the folder of an artefact, which is laid out as a cache is."""
    return f"{ARTEFACTS}/{kind}/{name}"


def attempt_path(shard_id: str, attempt: str) -> str:
    """Return the folder of one attempt at one shard; written once, never renamed."""
    return f"{DATA}/{shard_id}/{attempt}"


def part_path(shard_id: str, attempt: str, part: int) -> str:
    return f"{attempt_path(shard_id, attempt)}/part-{part:05d}.parquet"


def parse_part_name(name: str) -> int | None:
    """Return the number of a part from its file name, or None for another file."""
    found = re.fullmatch(r"part-([0-9]{5,9})\.parquet", name)
    return int(found.group(1)) if found else None


def parse_part_path(path: str) -> tuple[str, str, int] | None:
    """Return shard id, attempt and number of a part's path, or None for another file."""
    folder, *names = path.split("/")
    number = parse_part_name(names[-1]) if len(names) == 3 and folder == DATA else None
    return None if number is None else (names[0], names[1], number)


def index_path(shard_id: str, attempt: str) -> str:
    return f"{attempt_path(shard_id, attempt)}/{INDEX_NAME}"


def errors_path(shard_id: str, attempt: str) -> str:
    return f"{attempt_path(shard_id, attempt)}/errors.parquet"


def commit_path(shard_id: str, work_fingerprint: str) -> str:
    return f"{COMMITS}/{shard_id}.{work_fingerprint}.json"


def parse_commit_path(path: str) -> tuple[str, str] | None:
    """Return (shard id, work fingerprint) of a commit record's path, or None for another file."""
    name = path.rsplit("/", 1)[-1]
    stem, dot, suffix = name.rpartition(".")
    shard_id, _, fingerprint = stem.rpartition(".")
    return (shard_id, fingerprint) if dot and suffix == "json" and shard_id else None


def snapshot_path(number: int, name: str) -> str:
    return f"{SNAPSHOTS}/{number:08d}/{name}"


def is_immutable(path: str) -> bool:
    """Return whether a file is written once, under a name that no other file ever gets.

    Those are the files of attempts and, since their names have an id, the tables of snapshots; of
    the cache itself and of its artefacts.
    """
    folder, *names = path.split("/")
    if folder == ARTEFACTS:
        folder, *names = names[2:] or [""]
    if folder == SNAPSHOTS:
        return len(names) == 2 and _UNIQUE_TABLE.fullmatch(names[1]) is not None
    return folder == DATA and len(names) == 3


def run_path(run_id: str, name: str) -> str:
    return f"{RUNS}/{run_id}/{name}"


def dump_json(value: Any) -> bytes:  # noqa: ANN401  (any JSON value)
    """Return canonical JSON: sorted keys, no spaces, UTF-8."""
    return _JSON.encode(value).encode()


def fingerprint(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """Return 16 hex digits that identify a JSON value."""
    return hashlib.sha256(dump_json(value)).hexdigest()[:16]


def fingerprint_of_list(values: Iterable[Any]) -> str:
    """Return the `fingerprint` of a list of JSON values, which need not be in memory at once."""
    digest = hashlib.sha256(b"[")
    for number, value in enumerate(values):
        digest.update(b"," + dump_json(value) if number else dump_json(value))
    digest.update(b"]")
    return digest.hexdigest()[:16]

"""The one truth about a shard: a commit record, put if absent.

All files of an attempt exist before its record does; a record is never replaced. Whoever finds a
record in its place reads it back: if it names another attempt, that one won and this one's files
are removed. See `docs/design.md` for what each crash leaves behind.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pipeline.cache import layout
from pipeline.cache.fetch import in_order
from pipeline.cache.record import dump_record, parse_record, read_record
from pipeline.cache.writer import WrittenFile
from pipeline.errors import AlreadyExistsError, CacheFormatError, ConfigError, NotFoundError
from pipeline.storage import Entry, Store
from pipeline.types import ShardRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What one committed attempt did."""

    shard_id: str
    shard: ShardRef
    work_fingerprint: str
    attempt: str
    files: tuple[WrittenFile, ...]
    num_read: int  # samples found in the shard
    num_written: int
    rejected: Mapping[str, int]  # samples by reason
    bytes_in: int  # encoded images
    tokens_full: int
    tokens_kept: int
    bytes_tokens: int  # packed tokens with their aux
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)  # host, device, batch size, stages
    committed_at: float = 0.0  # Unix time

    def to_json(self) -> bytes:
        """Return the record's bytes."""
        return dump_record(asdict(self))


_COMMIT = TypeAdapter(Commit)


def parse_commit(content: bytes, *, where: str) -> Commit:
    """Read a record's bytes.

    Args:
        content: the bytes.
        where: the path they were read from, which the record must belong to.

    Raises:
        CacheFormatError: not a record of a format this package knows, or another's.
    """
    values = parse_record(content, where=where, kind="commit record")
    try:
        commit = _COMMIT.validate_python(values)
    except ValidationError as err:
        (first, *_) = err.errors()
        place = ".".join(map(str, first["loc"]))
        raise CacheFormatError(f"{where}: not a commit record: {place}: {first['msg']}") from err
    if layout.commit_path(commit.shard_id, commit.work_fingerprint) != where:
        raise CacheFormatError(f"{where} is the record of shard {commit.shard_id!r}")
    folder = layout.attempt_path(commit.shard_id, commit.attempt)
    for file in commit.files:
        if file.path.rpartition("/")[0] != folder or min(file.size, file.rows) < 0:
            raise CacheFormatError(f"{where} names {file.path!r}, which is no file of its attempt")
    if not math.isfinite(commit.committed_at):
        raise CacheFormatError(f"{where}: committed at {commit.committed_at}")
    return commit


def try_commit(store: Store, commit: Commit) -> Commit:
    """Put the record, unless another attempt at the same work has.

    Returns:
        The record that stands: `commit` itself, or the winner's, in which case the files of this
        attempt have been removed.
    """
    path = layout.commit_path(commit.shard_id, commit.work_fingerprint)
    try:
        store.put_once(path, commit.to_json())
    except AlreadyExistsError:
        winner = parse_commit(store.read(path), where=path)
        if winner.attempt == commit.attempt:
            return winner
        store.delete_tree(layout.attempt_path(commit.shard_id, commit.attempt))
        return winner
    return commit


def list_records(store: Store) -> list[Entry]:
    """Return the commit records that there are, by path; one listing, no reads."""
    found = store.list(layout.COMMITS)
    return [entry for entry in found if layout.parse_commit_path(entry.path) is not None]


def list_committed(store: Store) -> set[tuple[str, str]]:
    """Return (shard id, work fingerprint) of every commit, by one listing and no reads."""
    names = store.list_names(layout.COMMITS)
    return {found for name in names if (found := layout.parse_commit_path(name)) is not None}


def read_commits(store: Store, records: Iterable[Entry] | None = None) -> Iterator[Commit]:
    """Yield commit records, many read at once.

    Args:
        store: the cache.
        records: which to read, from `list_records`; None for all, by path.
    """

    def read(record: Entry) -> Commit:
        return parse_commit(store.read(record.path), where=record.path)

    yield from in_order(read, list_records(store) if records is None else records)


def select_current(
    commits: Iterable[Commit], wanted: Mapping[str, str] | None = None
) -> list[Commit]:
    """Return the one commit of each shard that counts, by shard id.

    A shard has several when its input has changed, or has changed back to what it was.

    Args:
        commits: of all shards.
        wanted: work fingerprint by shard id, of those shards whose input is known now; one that
            no commit has says nothing. Of any other shard the commit of the latest
            (committed_at, work_fingerprint) counts.
    """
    wanted = wanted or {}

    def order(commit: Commit) -> tuple[bool, float, str]:
        is_wanted = wanted.get(commit.shard_id) == commit.work_fingerprint
        return is_wanted, commit.committed_at, commit.work_fingerprint

    current: dict[str, Commit] = {}
    for commit in commits:
        known = current.get(commit.shard_id)
        if known is None or order(commit) > order(known):
            current[commit.shard_id] = commit
    return [current[shard_id] for shard_id in sorted(current)]


def claim_identity(store: Store, identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Create `carve.json`, or check that the one in place is of the same work.

    Args:
        store: the cache.
        identity: holds `fingerprint`, `settings` (what the fingerprint is of), and anything else.

    Returns:
        The identity that stands.

    Raises:
        ConfigError: the cache was made with other settings; names those that differ.
    """
    record = {**identity, "created_at": time.time()}
    try:
        store.put_once(layout.IDENTITY_PATH, dump_record(record, layout.FORMAT_VERSION))
    except AlreadyExistsError:
        return check_identity(store, identity)
    return {**record, "format_version": layout.FORMAT_VERSION}


def check_identity(store: Store, identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `carve.json` if it is of the same work.

    Raises:
        CacheFormatError: there is none, or it is of a version this package does not know.
        ConfigError: the cache was made with other settings; names those that differ.
    """
    standing = read_identity(store)
    if standing["fingerprint"] != identity["fingerprint"]:
        found = "; ".join(differences(standing["settings"], identity["settings"]))
        raise ConfigError(
            f"{store.url} holds a cache made with other settings ({found}): choose another "
            "output, or the settings of that cache"
        )
    return standing


def read_identity(store: Store) -> Mapping[str, Any]:
    """Return `carve.json`, its format version among the rest.

    Raises:
        CacheFormatError: there is none, or it is of a version this package does not know.
    """
    try:
        identity = read_record(store, layout.IDENTITY_PATH, versions=layout.FORMAT_VERSIONS)
    except NotFoundError as err:
        raise CacheFormatError(
            f"{store.url} is not a cache: it has no {layout.IDENTITY_PATH}"
        ) from err
    try:
        _IDENTITY.validate_python(identity)
    except ValidationError as err:
        (first, *_) = err.errors()
        place = ".".join(map(str, first["loc"]))
        raise CacheFormatError(
            f"{store.url}/{layout.IDENTITY_PATH} is damaged: {place}: {first['msg']}"
        ) from err
    return identity


def rows_version(store: Store, path: str = layout.IDENTITY_PATH) -> int:
    """Return the format version of the rows that are added to a cache: that of those it has.

    Args:
        store: of the cache, or artefact.
        path: of the record that says who it is.
    """
    try:
        record = read_record(store, path, versions=layout.FORMAT_VERSIONS)
    except NotFoundError:
        return layout.FORMAT_VERSION
    return int(record["format_version"])


class _Plugin(BaseModel):
    name: str
    options: dict[str, Any]


class _Encoder(BaseModel):
    name: str


class _Settings(BaseModel):
    encoder: _Encoder
    carver: _Plugin
    codec: _Plugin
    width: Annotated[int, Field(ge=1)]


class _Identity(BaseModel):
    """What a reader needs of `carve.json`."""

    fingerprint: str
    settings: _Settings
    nested: bool


_IDENTITY = TypeAdapter(_Identity)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield in words what differs between the settings of something and those that are wanted."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} there, {b!r} here"

"""Files of a cache that nothing names: what killed runs and lost races leave behind.

An attempt belongs to the cache when a commit record names it, also one that a later commit of the
same shard has overtaken: older snapshots read it. Everything else under `data/` is garbage or an
attempt at work, and nothing in the store tells these apart but age.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.cache import layout
from pipeline.cache.commit import list_records, read_commits, read_identity
from pipeline.cache.fetch import in_order
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.snapshot import latest_snapshot, list_snapshots, read_snapshot
from pipeline.errors import StorageError
from pipeline.storage import Entry, Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """Files that go together."""

    path: str  # of their folder, or of the one file
    entries: Sequence[Entry]
    reason: str

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(entry.size for entry in self.entries)

    @property
    def modified(self) -> float:
        """Unix time of the newest.

        Raises:
            StorageError: the store does not say.
        """
        times = [entry.modified for entry in self.entries]
        if None in times:
            raise StorageError(f"{self.path}: the store does not say when it was changed")
        return max(time for time in times if time is not None)


def find_garbage(
    store: Store,
    *,
    grace_s: float,
    now: float | None = None,
    identify: Callable[[Store], object] = read_identity,
) -> Iterator[Garbage]:
    """Yield what nothing names and nobody has written to for a while.

    Args:
        store: a cache.
        grace_s: what has a file that is younger stays. It must exceed the time that a shard takes;
            0 is safe only while no run is at work.
        now: Unix time, in place of this machine's clock.
        identify: raises CacheFormatError where the store is not what it is taken for.

    Raises:
        CacheFormatError: the store holds no cache, or a record that cannot be read; then nothing
            is said to be garbage.
        StorageError: the store does not say when a file was changed.
    """
    identify(store)
    # In this order: what is committed or published meanwhile is then seen to be.
    entries = list(store.list(temporary=True))
    open_attempts = without_commit(store, group_attempts(entries), list_records(store))
    tables = _tables(entries)
    published = _published(store) if tables else set()
    oldest_kept = (time.time() if now is None else now) - grace_s

    found = [
        *open_attempts,
        *(
            Garbage(path=entry.path, entries=[entry], reason="no snapshot names this table")
            for entry in tables
            if entry.path not in published
        ),
        *(
            Garbage(path=entry.path, entries=[entry], reason="a writer was killed in its midst")
            for entry in entries
            if entry.is_temporary
        ),
    ]
    yield from (garbage for garbage in found if garbage.modified <= oldest_kept)


def remove(store: Store, garbage: Garbage) -> None:
    """Delete the files of one piece of garbage."""
    if [entry.path for entry in garbage.entries] == [garbage.path]:
        store.delete(garbage.path)
    else:
        store.delete_tree(garbage.path)


def group_attempts(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the finished files of each attempt, by its folder."""
    attempts: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.path.startswith(f"{layout.DATA}/") and not entry.is_temporary:
            attempts[_attempt_of(entry.path)].append(entry)
    return attempts


def without_commit(
    store: Store, attempts: Mapping[str, Sequence[Entry]], records: Sequence[Entry]
) -> list[Garbage]:
    """Return the attempts that no commit record names: at work, or left behind.

    Args:
        store: the cache.
        attempts: of a listing.
        records: of a later one, from `list_records`; only those that leave a doubt are read.
    """
    # The latest snapshot tells of most. Counting would not do: a record of an empty shard names
    # no folder.
    latest = latest_snapshot(store) if attempts else None
    parts = SnapshotReader(store=store, snapshot=latest).files if latest is not None else []
    named = {_attempt_of(path) for path in parts}
    shards = {r.path: p[0] for r in records if (p := layout.parse_commit_path(r.path))}
    doubted = {path.split("/")[1] for path in attempts.keys() - named}
    for commit in read_commits(store, [r for r in records if shards[r.path] in doubted]):
        named.add(layout.attempt_path(commit.shard_id, commit.attempt))
    return [
        Garbage(path=path, entries=entries, reason="no commit names this attempt")
        for path, entries in sorted(attempts.items())
        if path not in named
    ]


def _tables(entries: Iterable[Entry]) -> list[Entry]:
    """Return the finished files of snapshots other than their records."""
    return [
        entry
        for entry in entries
        if entry.path.startswith(f"{layout.SNAPSHOTS}/")
        and not entry.path.endswith("/snapshot.json")
        and not entry.is_temporary
    ]


def _attempt_of(path: str) -> str:
    return "/".join(path.split("/")[:3])


def _published(store: Store) -> set[str]:
    """Return the paths of the tables that snapshots name."""
    numbers = list_snapshots(store)
    found = in_order(lambda number: read_snapshot(store, number), numbers)
    return {path for snapshot in found for path in snapshot.paths}

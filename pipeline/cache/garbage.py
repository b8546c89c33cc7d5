"""Files of a cache that nothing names: what killed runs and lost races leave behind.

An attempt belongs to the cache when a commit record names it, also one that a later commit of the
same shard has overtaken: older snapshots read it. Everything else under `data/` is garbage or an
attempt at work, and nothing in the store tells these apart but age.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.cache import layout
from pipeline.cache.commit import list_records, read_commits, read_identity
from pipeline.cache.fetch import in_order
from pipeline.cache.snapshot import list_snapshots, read_snapshot
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


def find_garbage(store: Store, *, grace_s: float, now: float | None = None) -> Iterator[Garbage]:
    """Yield what nothing names and nobody has written to for a while.

    Args:
        store: a cache.
        grace_s: what has a file that is younger stays. It must exceed the time that a shard takes;
            0 is safe only while no run is at work.
        now: Unix time, in place of this machine's clock.

    Raises:
        CacheFormatError: the store holds no cache, or a record that cannot be read; then nothing
            is said to be garbage.
        StorageError: the store does not say when a file was changed.
    """
    read_identity(store)
    # In this order: what is committed or published meanwhile is then seen to be.
    attempts, temporary = _attempts(store)
    tables = [e for e in store.list(layout.SNAPSHOTS) if not e.path.endswith("/snapshot.json")]
    named = _named_attempts(store, attempts)
    published = _published(store)
    oldest_kept = (time.time() if now is None else now) - grace_s

    found = [
        Garbage(path=path, entries=entries, reason="no commit names this attempt")
        for path, entries in sorted(attempts.items())
        if path not in named
    ]
    found += [
        Garbage(path=entry.path, entries=[entry], reason="no snapshot names this table")
        for entry in tables
        if entry.path not in published
    ]
    found += [
        Garbage(path=entry.path, entries=[entry], reason="a writer was killed in the midst of it")
        for entry in temporary
    ]
    yield from (garbage for garbage in found if garbage.modified <= oldest_kept)


def remove(store: Store, garbage: Garbage) -> None:
    """Delete the files of one piece of garbage."""
    if [entry.path for entry in garbage.entries] == [garbage.path]:
        store.delete(garbage.path)
    else:
        store.delete_tree(garbage.path)


def _attempts(store: Store) -> tuple[dict[str, list[Entry]], list[Entry]]:
    """Return the files of each attempt by its folder, and unfinished files of the whole cache."""
    attempts: dict[str, list[Entry]] = defaultdict(list)
    temporary = []
    for entry in store.list(temporary=True):
        if entry.is_temporary:
            temporary.append(entry)
        elif entry.path.startswith(f"{layout.DATA}/"):
            attempts["/".join(entry.path.split("/")[:3])].append(entry)
    return attempts, temporary


def _named_attempts(store: Store, attempts: Mapping[str, Sequence[Entry]]) -> set[str]:
    """Return the folders that commit records name; reads no record that there is no doubt about."""
    records = list_records(store)
    works: dict[str, int] = defaultdict(int)
    for record in records:
        parsed = layout.parse_commit_path(record.path)
        works[parsed[0] if parsed else ""] += 1
    tries: dict[str, list[str]] = defaultdict(list)
    for path in attempts:
        tries[path.split("/")[1]].append(path)
    # The files of an attempt are there before its record: as many attempts as records, all named.
    sure = {shard for shard, paths in tries.items() if len(paths) == works[shard]}
    named = {path for shard in sure for path in tries[shard]}
    doubted = [r for r in records if (p := layout.parse_commit_path(r.path)) and p[0] not in sure]
    for commit in read_commits(store, doubted):
        named.add(layout.attempt_path(commit.shard_id, commit.attempt))
    return named


def _published(store: Store) -> set[str]:
    """Return the paths of the tables that snapshots name."""
    numbers = list_snapshots(store)
    found = in_order(lambda number: read_snapshot(store, number), numbers)
    return {path for snapshot in found for path in (snapshot.files, snapshot.index)}

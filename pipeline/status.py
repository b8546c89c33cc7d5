"""What a cache is and what is going on in it, from its store alone: any time, from any machine."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache import layout
from pipeline.cache.commit import list_records, read_identity
from pipeline.cache.garbage import group_attempts, without_commit
from pipeline.cache.snapshot import Snapshot, latest_snapshot
from pipeline.run_report import FAILURES_FILE, read_failures, read_summaries
from pipeline.storage import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A cache at one moment."""

    identity: Mapping[str, Any]
    num_shards: int  # with a commit
    num_commits: int  # more than shards where some were carved again
    snapshot: Snapshot | None  # the latest
    runs: Sequence[Mapping[str, Any]]  # summaries, the newest first
    failures: Mapping[str, int]  # of the newest run, shards by reason
    num_open: int  # attempts that no commit names: at work, or left behind
    newest_open: float | None  # Unix time of the last change to one


def read_status(store: Store, *, num_runs: int = 5) -> Status:
    """Look at a cache; reads a few small objects and lists the others.

    Args:
        store: the cache.
        num_runs: summaries to read, at most.

    Raises:
        CacheFormatError: there is no cache, or what it says of itself is damaged.
    """
    identity = read_identity(store)
    attempts = group_attempts(store.list(layout.DATA))
    records = list_records(store)  # later: what is committed meanwhile is not taken for open
    shards = {p[0] for r in records if (p := layout.parse_commit_path(r.path))}
    open_attempts = without_commit(store, attempts, records)
    runs = list(itertools.islice(read_summaries(store), num_runs))
    return Status(
        identity=identity,
        num_shards=len(shards),
        num_commits=len(records),
        snapshot=latest_snapshot(store),
        runs=runs,
        failures=read_failures(store, runs[0]["run_id"]) if runs else {},
        num_open=len(open_attempts),
        newest_open=max((attempt.modified for attempt in open_attempts), default=None),
    )


def status_lines(status: Status, url: str, *, now: float | None = None) -> Iterator[str]:
    """Yield a status in words.

    Args:
        status: of a cache.
        url: of it.
        now: Unix time, in place of this machine's clock.
    """
    now = time.time() if now is None else now
    settings = status.identity["settings"]
    plugins = ", ".join(settings[kind]["name"] for kind in ("encoder", "carver", "codec"))
    yield f"{url}: {plugins}; {status.num_shards} shards in {status.num_commits} commits"
    if status.snapshot is None:
        yield "no snapshot yet"
    else:
        found = status.snapshot
        yield (
            f"snapshot {found.number}, {_ago(now - found.created_at)}: {found.num_shards} shards, "
            f"{found.num_rows} images, {found.num_tokens} tokens"
        )
        if behind := status.num_shards - found.num_shards:
            yield f"{behind} shards are committed and not in it yet"
    if status.num_open and status.newest_open is not None:
        yield (
            f"{status.num_open} attempts without a commit, the last changed "
            f"{_ago(now - status.newest_open)}: at work, or left behind (carve gc)"
        )
    for run in status.runs:
        shards = run["shards"]
        yield (
            f"run {run['run_id']}: exit code {run['exit_code']}, {shards['committed']} committed, "
            f"{shards['failed']} failed, {shards['not_started']} not started; {run['images']} "
            f"images in {run['seconds']:.0f} s ({run['images_per_second']:.1f}/s)"
        )
    if status.failures:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(status.failures.items()))
        yield f"failed in the last run: {reasons} ({FAILURES_FILE} of that run names them)"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0, seconds):.0f} s ago"
    minutes = seconds / 60
    return f"{minutes:.0f} min ago" if minutes < 120 else f"{minutes / 60:.0f} h ago"

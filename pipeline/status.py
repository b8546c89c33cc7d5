"""What a cache is and what is going on in it, from its store alone: any time, from any machine."""

import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.cache import layout
from pipeline.cache.commit import list_committed, read_identity
from pipeline.cache.garbage import find_garbage
from pipeline.cache.snapshot import Snapshot, latest_snapshot
from pipeline.errors import CacheFormatError, NotFoundError
from pipeline.storage import Store

_FAILURES = "failures.parquet"


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
    committed = list_committed(store)
    attempts = [g for g in find_garbage(store, grace_s=-1e9) if g.path.startswith(layout.DATA)]
    run_ids = list(reversed(store.list_names(layout.RUNS)))[:num_runs]
    return Status(
        identity=identity,
        num_shards=len({shard for shard, _ in committed}),
        num_commits=len(committed),
        snapshot=latest_snapshot(store),
        runs=[_summary(store, run_id) for run_id in run_ids],
        failures=_failures(store, run_ids[0]) if run_ids else {},
        num_open=len(attempts),
        newest_open=max((g.modified for g in attempts), default=None),
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
        yield f"failed in the last run: {reasons} ({_FAILURES} of that run names them)"


def _summary(store: Store, run_id: str) -> Mapping[str, Any]:
    path = layout.run_path(run_id, "summary.json")
    try:
        summary: Mapping[str, Any] = json.loads(store.read(path))
        if summary["run_id"] != run_id:
            raise CacheFormatError(f"{store.url}/{path} is of run {summary['run_id']!r}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as err:
        raise CacheFormatError(f"{store.url}/{path} is damaged: {err!r}") from err
    return summary


def _failures(store: Store, run_id: str) -> Mapping[str, int]:
    try:
        content = store.read(layout.run_path(run_id, _FAILURES))
    except NotFoundError:
        return {}
    return Counter(pq.read_table(io.BytesIO(content), columns=["reason"])["reason"].to_pylist())


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0, seconds):.0f} s ago"
    minutes = seconds / 60
    return f"{minutes:.0f} min ago" if minutes < 120 else f"{minutes / 60:.0f} h ago"

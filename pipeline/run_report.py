"""What one run did: counted while it goes on, stored in the cache at its end."""

import io
import json
import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, FiniteFloat, ValidationError

from pipeline.cache import layout, parquet
from pipeline.cache.commit import Commit
from pipeline.cache.fetch import in_order
from pipeline.errors import (
    CacheFormatError,
    ExitCode,
    NotFoundError,
    PipelineError,
    without_secrets,
)
from pipeline.storage import Store

SUMMARY_FILE, FAILURES_FILE = "summary.json", "failures.parquet"
TRANSIENT = frozenset(
    {"storage", "actor_lost", "actor_hung", "actor_replaced", "actor_not_ready", "stopped"}
)
"""Reasons that a shard is not to blame for: the next run may well carve it as it is."""

_MAX_RUNS = 100  # whose failures are looked at for those that are still open


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedShard:
    """A shard that this run gave up."""

    shard: str
    reason: str
    message: str
    attempts: int
    host: str = ""  # where it was tried last

    @property
    def error_class(self) -> str:
        """`transient`: trying again may do; `permanent`: something must be repaired first."""
        return "transient" if self.reason in TRANSIENT else "permanent"

    def __post_init__(self) -> None:
        """Keep secrets out of reports: a message may be that of any library's error."""
        object.__setattr__(self, "message", without_secrets(self.message))


@dataclass(kw_only=True)
class RunReport:
    """Counts of one run."""

    num_shards: int = 0
    num_done_before: int = 0
    num_committed: int = 0
    committed: set[tuple[str, str]] = field(default_factory=set)  # (shard id, work fingerprint)
    failed: list[FailedShard] = field(default_factory=list)
    retries: Counter[str] = field(default_factory=Counter)  # by reason
    num_images: int = 0  # committed
    num_rejected: Counter[str] = field(default_factory=Counter)  # samples by reason
    bytes_in: int = 0
    tokens_full: int = 0
    tokens_kept: int = 0
    bytes_tokens: int = 0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    num_duplicates: int = 0
    num_not_started: int = 0  # shards left when the run ended early
    num_abandoned: int = 0  # shards that were begun, and neither committed nor failed
    num_left_out: int = 0  # shards to do that this run was not asked for
    num_in_flight: int = 0  # images carved in shards that are not committed yet
    num_doubled: int = 0  # late shards that were begun a second time
    num_doubled_won: int = 0  # of those, where the second attempt answered first
    actors_lost: Counter[str] = field(default_factory=Counter)  # by reason
    batch_size: int | None = None  # at the end
    stopped_by: str | None = None  # error_budget, fail_fast, config: what ended the run early
    error: str | None = None  # that ended the run before or between its shards
    crashed: bool = False  # by an error that nobody foresaw
    fingerprint: str = ""  # of the settings that change stored values
    versions: Mapping[str, str] = field(default_factory=dict)
    snapshot_error: str | None = None
    summary_error: str | None = None  # why the report is not in the cache
    interrupted: bool = False
    peak_rss_bytes: int = 0  # of the largest actor
    snapshot: int | None = None
    run_id: str = field(
        default_factory=lambda: (
            time.strftime("%Y%m%dT%H%M%S-", time.gmtime()) + uuid.uuid4().hex[:6]
        )
    )
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None

    def add(self, commit: Commit) -> None:
        """Count a committed shard."""
        self.num_committed += 1
        self.committed.add((commit.shard_id, commit.work_fingerprint))
        self.num_images += commit.num_written
        self.num_rejected.update(commit.rejected)
        self.bytes_in += commit.bytes_in
        self.tokens_full += commit.tokens_full
        self.tokens_kept += commit.tokens_kept
        self.bytes_tokens += commit.bytes_tokens
        for stage, seconds in commit.details["stage_seconds"].items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds

    @property
    def seconds(self) -> float:
        """Wall time so far, or of the whole run."""
        return (self.finished_at or time.time()) - self.started_at

    @property
    def exit_code(self) -> ExitCode:
        """How the run ended."""
        if self.error is not None:
            return ExitCode.CRASHED if self.crashed else ExitCode.CONFIG
        if self.interrupted:
            return ExitCode.INTERRUPTED
        if (self.failed or self.stopped_by) and not self.num_committed:
            return ExitCode.NOTHING_COMMITTED
        shortcomings = (
            self.failed,
            self.stopped_by,
            self.num_duplicates,
            self.snapshot_error,
            self.summary_error,
        )
        return ExitCode.PARTIAL if any(shortcomings) else ExitCode.OK

    def to_json(self) -> Mapping[str, Any]:
        """Return what `summary.json` holds."""
        failures = Counter(f.reason for f in self.failed)
        return {
            "run_id": self.run_id,
            "exit_code": int(self.exit_code),
            "error": self.error,
            "stopped_by": self.stopped_by,
            "fingerprint": self.fingerprint,
            "versions": dict(self.versions),
            "host": platform.node(),
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "seconds": round(self.seconds, 3),
            "shards": {
                "total": self.num_shards,
                "done_before": self.num_done_before,
                "committed": self.num_committed,
                "failed": len(self.failed),
                "abandoned": self.num_abandoned,
                "not_started": self.num_not_started,
                "left_out": self.num_left_out,
            },
            "failed_by_reason": dict(sorted(failures.items())),
            "retries_by_reason": dict(sorted(self.retries.items())),
            "actors_lost_by_reason": dict(sorted(self.actors_lost.items())),
            "tail_duplicates": {"begun": self.num_doubled, "first": self.num_doubled_won},
            "batch_size": self.batch_size,
            "images": self.num_images,
            "rejected_by_reason": dict(sorted(self.num_rejected.items())),
            "images_per_second": self._rate(self.num_images),
            "bytes_in_per_second": self._rate(self.bytes_in),
            "tokens_kept_per_second": self._rate(self.tokens_kept),
            "bytes_in": self.bytes_in,
            "tokens_full": self.tokens_full,
            "tokens_kept": self.tokens_kept,
            "bytes_tokens": self.bytes_tokens,
            "stage_seconds": {k: round(v, 3) for k, v in sorted(self.stage_seconds.items())},
            "duplicate_keys": self.num_duplicates,
            "peak_rss_bytes": self.peak_rss_bytes,
            "snapshot": self.snapshot,
            "snapshot_error": self.snapshot_error,
            "summary_error": self.summary_error,
        }

    def fail(self, err: Exception) -> None:
        """Note the error that ends the run."""
        self.error = " ".join(str(err).split()) or type(err).__name__
        self.crashed = not isinstance(err, PipelineError)

    def finish(self) -> None:
        """Note the time of the end."""
        self.finished_at = time.time()

    def _rate(self, count: int) -> float:
        return round(count / max(self.seconds, 1e-9), 2)

    def save(self, store: Store) -> None:
        """Write `summary.json`, and `failures.parquet` if a shard failed."""
        if self.finished_at is None:
            self.finish()
        store.put(layout.run_path(self.run_id, SUMMARY_FILE), layout.dump_json(self.to_json()))
        if self.failed:
            columns = [[getattr(f, n) for f in self.failed] for n in layout.FAILURES_SCHEMA.names]
            table = pa.Table.from_arrays(
                [pa.array(c, f.type) for c, f in zip(columns, layout.FAILURES_SCHEMA, strict=True)],
                schema=layout.FAILURES_SCHEMA,
            )
            sink = io.BytesIO()
            pq.write_table(table, sink)
            store.put(layout.run_path(self.run_id, FAILURES_FILE), sink.getvalue())


class _Shards(BaseModel):
    committed: int
    failed: int
    not_started: int


class _Summary(BaseModel):
    """What is read again of a summary; earlier versions wrote it too."""

    run_id: str
    exit_code: int
    shards: _Shards
    images: int
    bytes_in: int
    bytes_tokens: int
    seconds: FiniteFloat
    images_per_second: FiniteFloat


def _fits(summary: Mapping[str, Any]) -> bool:
    try:
        _Summary.model_validate(summary, strict=True)
    except ValidationError:
        return False
    return True


def read_summaries(store: Store) -> Iterator[Mapping[str, Any]]:
    """Yield what `RunReport.save` wrote of each run, the newest first; reads one at a time.

    A run that was killed before it wrote a summary has none.

    Raises:
        CacheFormatError: a summary is damaged.
    """
    for run_id in reversed(store.list_names(layout.RUNS)):
        path = layout.run_path(run_id, SUMMARY_FILE)
        try:
            summary = json.loads(store.read(path))
        except NotFoundError:
            continue
        except (ValueError, RecursionError) as err:  # also of bytes that are no text
            raise CacheFormatError(f"{store.url}/{path} is damaged: {err}") from err
        if not isinstance(summary, dict) or not _fits(summary):
            raise CacheFormatError(f"{store.url}/{path} is damaged: it is no summary of a run")
        if summary["run_id"] != run_id:
            raise CacheFormatError(f"{store.url}/{path} is of run {summary['run_id']!r}")
        yield summary


def read_failures(store: Store, run_id: str) -> Mapping[str, int]:
    """Return how many shards a run gave up, by reason.

    Raises:
        CacheFormatError: they cannot be read.
    """
    return Counter(_failures(store, run_id)["reason"].to_pylist())


def open_failures(store: Store) -> Mapping[str, str]:
    """Return the shards that the last 100 runs gave up, the latest reason by URL.

    A commit since is not seen.

    Raises:
        CacheFormatError: the failures of a run cannot be read.
    """
    run_ids = store.list_names(layout.RUNS)[-_MAX_RUNS:]
    tables = in_order(lambda run_id: _failures(store, run_id), run_ids)
    reasons: dict[str, str] = {}
    for table in tables:
        reasons.update(zip(table["shard"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return reasons


def _failures(store: Store, run_id: str) -> pa.Table:
    path = layout.run_path(run_id, FAILURES_FILE)
    try:
        content = store.read(path)
    except NotFoundError:  # no shard failed
        return layout.FAILURES_SCHEMA.empty_table()
    return parquet.read_table(content, layout.FAILURES_SCHEMA, where=store.url_of(path))

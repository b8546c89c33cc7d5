"""What one run did: counted while it goes on, stored in the cache at its end."""

import io
import json
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
from pipeline.errors import CacheFormatError, ExitCode, NotFoundError
from pipeline.storage import Store

SUMMARY_FILE, FAILURES_FILE = "summary.json", "failures.parquet"

_FAILURES_SCHEMA = layout.FAILURES_SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedShard:
    """A shard that this run gave up."""

    shard: str
    reason: str
    message: str
    attempts: int


@dataclass(kw_only=True)
class RunReport:
    """Counts of one run; `images` moves while shards are in flight, the rest at their end."""

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
    num_not_started: int = 0  # shards left when the run gave up
    snapshot_error: str | None = None
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
        if self.interrupted:
            return ExitCode.INTERRUPTED
        if self.failed and not self.num_committed:
            return ExitCode.NOTHING_COMMITTED
        if self.failed or self.num_duplicates or self.snapshot_error:
            return ExitCode.PARTIAL
        return ExitCode.OK

    def to_json(self) -> Mapping[str, Any]:
        """Return what `summary.json` holds."""
        failures = Counter(f.reason for f in self.failed)
        return {
            "run_id": self.run_id,
            "exit_code": int(self.exit_code),
            "started_at": self.started_at,
            "seconds": round(self.seconds, 3),
            "shards": {
                "total": self.num_shards,
                "done_before": self.num_done_before,
                "committed": self.num_committed,
                "failed": len(self.failed),
                "not_started": self.num_not_started,
            },
            "failed_by_reason": dict(sorted(failures.items())),
            "retries_by_reason": dict(sorted(self.retries.items())),
            "images": self.num_images,
            "rejected_by_reason": dict(sorted(self.num_rejected.items())),
            "images_per_second": round(self.num_images / max(self.seconds, 1e-9), 2),
            "bytes_in": self.bytes_in,
            "tokens_full": self.tokens_full,
            "tokens_kept": self.tokens_kept,
            "bytes_tokens": self.bytes_tokens,
            "stage_seconds": {k: round(v, 3) for k, v in sorted(self.stage_seconds.items())},
            "duplicate_keys": self.num_duplicates,
            "peak_rss_bytes": self.peak_rss_bytes,
            "snapshot": self.snapshot,
            "snapshot_error": self.snapshot_error,
        }

    def save(self, store: Store) -> None:
        """Write `summary.json`, and `failures.parquet` if a shard failed."""
        self.finished_at = self.finished_at or time.time()
        store.put(layout.run_path(self.run_id, SUMMARY_FILE), layout.dump_json(self.to_json()))
        if self.failed:
            columns = [[getattr(f, n) for f in self.failed] for n in _FAILURES_SCHEMA.names]
            table = pa.Table.from_arrays(
                [pa.array(c, f.type) for c, f in zip(columns, _FAILURES_SCHEMA, strict=True)],
                schema=_FAILURES_SCHEMA,
            )
            sink = io.BytesIO()
            pq.write_table(table, sink)
            store.put(layout.run_path(self.run_id, FAILURES_FILE), sink.getvalue())


class _Shards(BaseModel):
    committed: int
    failed: int
    not_started: int


class _Summary(BaseModel):
    """What is read again of a summary."""

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
    known = RunReport().to_json().keys()
    for run_id in reversed(store.list_names(layout.RUNS)):
        path = layout.run_path(run_id, SUMMARY_FILE)
        try:
            summary = json.loads(store.read(path))
        except NotFoundError:
            continue
        except (ValueError, RecursionError) as err:  # also of bytes that are no text
            raise CacheFormatError(f"{store.url}/{path} is damaged: {err}") from err
        if not isinstance(summary, dict) or not known <= summary.keys() or not _fits(summary):
            raise CacheFormatError(f"{store.url}/{path} is damaged: it is no summary of a run")
        if summary["run_id"] != run_id:
            raise CacheFormatError(f"{store.url}/{path} is of run {summary['run_id']!r}")
        yield summary


def read_failures(store: Store, run_id: str) -> Mapping[str, int]:
    """Return how many shards a run gave up, by reason."""
    try:
        content = store.read(layout.run_path(run_id, FAILURES_FILE))
    except NotFoundError:
        return {}
    where = store.url_of(layout.run_path(run_id, FAILURES_FILE))
    table = parquet.read_table(content, layout.FAILURES_SCHEMA, where=where)
    return Counter(table["reason"].to_pylist())

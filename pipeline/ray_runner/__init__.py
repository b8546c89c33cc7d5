"""Run a job on Ray: actors pinned to GPUs, each with a shard on the device and one reading ahead.

Ray never restarts an actor or repeats a call by itself (`max_restarts=0`, `max_task_retries=0`):
the driver owns attempts, so that each carries its number, its cause and its batch size, and the
commit protocol alone makes a shard count once.
"""

import importlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pipeline import run_log
from pipeline.cache.commit import claim_identity, list_committed
from pipeline.cache.snapshot import build_snapshot
from pipeline.errors import CacheFormatError, StorageError
from pipeline.job import Job
from pipeline.notify import Notifier
from pipeline.plan import Plan, make_plan
from pipeline.run_log import about
from pipeline.run_report import FailedShard, RunReport, open_failures
from pipeline.source import shard_id
from pipeline.stop_signal import StopRequestedError, StopSignals
from pipeline.storage import Store, open_store
from pipeline.types import ShardRef

if TYPE_CHECKING:
    from pipeline.ray_runner._cluster import local_cluster
    from pipeline.ray_runner._evaluation import evaluate_on_ray
    from pipeline.ray_runner._metrics import METRICS

__all__ = ["METRICS", "evaluate_on_ray", "local_cluster", "run_job"]

logger = logging.getLogger(__name__)

_HOME = {"METRICS": "_metrics", "evaluate_on_ray": "_evaluation", "local_cluster": "_cluster"}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (any public name)
    """Import what needs Ray when it is first used: a run with nothing to do does without."""
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run_job(job: Job, *, retry_failed: bool = False) -> RunReport:
    """Carve every shard of the job's input that is not committed yet.

    Connects to the Ray cluster of `RAY_ADDRESS` or of this machine, or starts a local one. At the
    end, also one that is an error, those of the config's `notify` are told.

    Args:
        job: what to do.
        retry_failed: only the shards that earlier runs gave up.

    Raises:
        ConfigError: input or output are wrong, the cluster cannot be reached, or no actor can
            start or load the encoder; nothing has been committed.
    """
    notifier = Notifier.from_config(job.config.notify)
    report = RunReport(fingerprint=job.fingerprint, versions=job.identity["versions"])
    with run_log.bound(run_id=report.run_id), StopSignals() as signals:
        try:
            _Run(job=job, report=report, signals=signals).run(retry_failed=retry_failed)
        except StopRequestedError:
            report.interrupted = True
        except Exception as err:
            report.fail(err)
            _tell(notifier, report)
            raise
        _tell(notifier, report)
    return report


def _tell(notifier: Notifier, report: RunReport) -> None:
    if report.finished_at is None:
        report.finish()
    notifier.send(report.to_json())


class _Run:
    """The steps of one run."""

    def __init__(self, *, job: Job, report: RunReport, signals: StopSignals) -> None:
        self.job, self.report, self.signals = job, report, signals

    def run(self, *, retry_failed: bool) -> None:
        report, signals = self.report, self.signals
        # All before the first actor only reads, or creates what a rerun finds.
        with signals.interrupting():
            store = open_store(self.job.config.output.url)
            plan = make_plan(self.job, store)
            todo = self._choose(store, plan, retry_failed=retry_failed)
            store.check_writable()
            claim_identity(store, self.job.identity)
        if todo:
            from pipeline.ray_runner._cluster import connected
            from pipeline.ray_runner._driver import Driver

            try:
                with connected(signals):
                    Driver(job=self.job, todo=todo, report=report, signals=signals).run()
                    # At once: after a signal there may be little time left.
                    self._save(store)
            except Exception as err:
                report.fail(err)
                self._save(store)
                raise
            signals.take()
        try:
            self._make_snapshot(store, plan, todo)
        except Exception as err:
            report.fail(err)
            raise
        finally:
            report.finish()
            if todo:
                self._save(store)

    def _save(self, store: Store) -> None:
        """Store the report; what is committed does not depend on it."""
        self.report.summary_error = None  # of an earlier try
        try:
            self.report.save(store)
        except StorageError as err:
            logger.error("the summary could not be stored: %s", err)  # noqa: TRY400  (one line)
            self.report.summary_error = str(err)

    def _choose(self, store: Store, plan: Plan, *, retry_failed: bool) -> Sequence[ShardRef]:
        todo: Sequence[ShardRef] = plan.todo
        if retry_failed:
            failed = open_failures(store)
            todo = [shard for shard in plan.todo if shard.url in failed]
        report = self.report
        report.num_shards, report.num_done_before = len(plan.shards), plan.num_done
        report.num_left_out = len(plan.todo) - len(todo)
        logger.info(
            "%d of %d shards to do (%.1f MB)",
            len(todo),
            len(plan.shards),
            sum(shard.size for shard in todo) / 1e6,
        )
        return todo

    def _check_visible(self, store: Store, plan: Plan, todo: Sequence[ShardRef]) -> None:
        """Count a shard as failed if its commit is not where this process looks for it."""
        wanted = {(shard_id(s), plan.works[shard_id(s)]): s for s in todo}
        hidden = self.report.committed - list_committed(store)
        for work in sorted(hidden):
            url = wanted[work].url
            message = (
                f"{url} was committed by an actor to {store.url}, but not where this "
                "process sees that: use an output that all nodes share"
            )
            logger.error("%s", message, extra=about(shard=url))
            self.report.failed.append(
                FailedShard(shard=url, reason="not_shared", message=message, attempts=1)
            )
        self.report.num_committed -= len(hidden)

    def _make_snapshot(self, store: Store, plan: Plan, todo: Sequence[ShardRef]) -> None:
        report = self.report
        try:
            if todo:
                self._check_visible(store, plan, todo)
            # May end anywhere: a snapshot is there once its last object is.
            with self.signals.interrupting() if not self.signals.requested else nullcontext():
                snapshot = build_snapshot(store, plan.works)
        except StopRequestedError:
            report.interrupted = True
            report.snapshot_error = "interrupted"
            return
        except (StorageError, CacheFormatError) as err:
            # What is committed stays committed; the next run, or a reader, sees it all the same.
            logger.error("no snapshot could be made: %s", err)  # noqa: TRY400  (one line, no trace)
            report.snapshot_error = str(err)
            return
        report.snapshot = snapshot.number
        report.num_duplicates = snapshot.num_duplicates
        for key, shard in snapshot.duplicates[:10]:
            logger.warning(
                "key %r of shard %s is hidden by an earlier shard with the same key: rename it "
                "there",
                key,
                shard,
                extra=about(shard=shard, key=key),
            )

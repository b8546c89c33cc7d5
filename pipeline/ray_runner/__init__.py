"""Run a job on Ray: actors pinned to GPUs, each with a shard on the device and one reading ahead.

Ray never restarts an actor or repeats a call by itself (`max_restarts=0`, `max_task_retries=0`):
the driver owns attempts, so that each carries its number, its cause and its batch size, and the
commit protocol alone makes a shard count once.
"""

import logging
import threading

from pipeline.cache.commit import claim_identity, list_committed
from pipeline.cache.snapshot import build_snapshot
from pipeline.errors import CacheFormatError, StorageError
from pipeline.job import Job
from pipeline.plan import Plan, make_plan
from pipeline.ray_runner._cluster import connected, local_cluster
from pipeline.ray_runner._driver import Driver
from pipeline.ray_runner._evaluation import evaluate_on_ray
from pipeline.run_report import FailedShard, RunReport
from pipeline.source import shard_id
from pipeline.stop_signal import stop_on_signals
from pipeline.storage import Store, open_store

__all__ = ["evaluate_on_ray", "local_cluster", "run_job"]

logger = logging.getLogger(__name__)


def run_job(job: Job) -> RunReport:
    """Carve every shard of the job's input that is not committed yet.

    Connects to the Ray cluster of `RAY_ADDRESS` or of this machine, or starts a local one.

    Raises:
        ConfigError: input or output are wrong, the cluster cannot be reached, or no actor can
            start or load the encoder; nothing has been committed.
    """
    stopping = threading.Event()
    with stop_on_signals(stopping):
        store = open_store(job.config.output.url)
        plan = make_plan(job, store)
        store.check_writable()
        claim_identity(store, job.identity)
        report = RunReport(num_shards=len(plan.shards), num_done_before=plan.num_done)
        logger.info(
            "%d of %d shards to do (%.1f MB)",
            len(plan.todo),
            len(plan.shards),
            plan.todo_bytes / 1e6,
        )
        if plan.todo:
            # Connecting, Ray takes the signals for itself: here they are taken back.
            with connected(), stop_on_signals(stopping):
                Driver(job=job, todo=plan.todo, report=report, stopping=stopping).run()
            _check_visible(store, plan, report)
            # Before the snapshot too: after a signal there may be little time left.
            report.save(store)
        _make_snapshot(store, plan, report)
        if plan.todo:
            report.save(store)
    return report


def _check_visible(store: Store, plan: Plan, report: RunReport) -> None:
    """Count a shard as failed if its commit is not where this process looks for it."""
    wanted = {(shard_id(s), plan.works[shard_id(s)]): s for s in plan.todo}
    hidden = report.committed - list_committed(store)
    for work in sorted(hidden):
        message = (
            f"{wanted[work].url} was committed by an actor to {store.url}, but not where this "
            "process sees that: use an output that all nodes share"
        )
        logger.error("%s", message)
        report.failed.append(
            FailedShard(shard=wanted[work].url, reason="not_shared", message=message, attempts=1)
        )
    report.num_committed -= len(hidden)


def _make_snapshot(store: Store, plan: Plan, report: RunReport) -> None:
    try:
        snapshot = build_snapshot(store, plan.works)
    except (StorageError, CacheFormatError) as err:
        # What is committed stays committed; the next run, or a reader, sees it all the same.
        logger.error("no snapshot could be made: %s", err)  # noqa: TRY400  (one line, no trace)
        report.snapshot_error = str(err)
        return
    report.snapshot = snapshot.number
    report.num_duplicates = snapshot.num_duplicates
    for key, shard in snapshot.duplicates[:10]:
        logger.warning(
            "key %r of shard %s is hidden by an earlier shard with the same key: rename it there",
            key,
            shard,
        )

"""Run a job on Ray: actors pinned to GPUs, each with a shard on the device and one reading ahead.

Ray never restarts an actor or repeats a call by itself (`max_restarts=0`, `max_task_retries=0`):
the driver owns attempts, so that each carries its number, its cause and its batch size, and the
commit protocol alone makes a shard count once.
"""

import logging
import math
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from pipeline.cache.commit import Commit, claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carve_shard import ShardCarver
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, ShardError, StorageError
from pipeline.heap import keep_freed_memory
from pipeline.job import Job
from pipeline.plan import make_plan
from pipeline.progress import RunProgress
from pipeline.run_report import FailedShard, RunReport
from pipeline.stop_signal import stop_on_signals
from pipeline.storage import open_store
from pipeline.types import ShardRef

logger = logging.getLogger(__name__)

_SHARDS_IN_FLIGHT = 2  # per actor: one has the device, one reads ahead
_POLL_S = 0.5
_STATUS_S = 1.0  # between two questions to an actor; without a pause they would keep a core busy


class CarveActor:
    """One process with its own device; runs in Ray."""

    def __init__(self, job: Job) -> None:
        logging.basicConfig(level=logging.WARNING)
        keep_freed_memory()
        torch.set_num_threads(max(1, job.config.runner.cpus_per_actor))
        device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        self._num_images = 0
        self._carver = ShardCarver(job, device=device, on_progress=self._count)

    def _count(self, num_images: int) -> None:
        self._num_images += num_images

    def load(self) -> None:
        """Load the weights. Apart from the constructor, so that its error arrives as itself."""
        self._carver.load()

    def carve(self, shard: ShardRef, batch_size: int) -> Commit:
        """Carve and commit one shard."""
        return self._carver.carve(shard, batch_size=batch_size)

    def status(self) -> tuple[int, int]:
        """Return (images carved since the start, peak resident bytes); answers while carving."""
        return self._num_images, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@dataclass(kw_only=True, eq=False)
class _Work:
    """One shard on its way, over all attempts."""

    shard: ShardRef
    batch_size: int
    attempts: int = 0


@dataclass(kw_only=True, eq=False)
class _Actor:
    """The driver's view of one actor."""

    handle: Any
    loading: Any  # reference to the call of `load`; None once it has answered
    calls: dict[Any, _Work] = field(default_factory=dict)  # reference -> shard in flight
    status: Any = None  # reference to the call of `status` under way
    asked_at: float = 0.0
    num_images: int = 0
    images_committed: int = 0
    moved_at: float = field(default_factory=time.monotonic)

    @property
    def room(self) -> int:
        """Shards it can take; a shard tried before goes alone, so that it kills no other."""
        if self.loading is not None or any(work.attempts > 1 for work in self.calls.values()):
            return 0
        return _SHARDS_IN_FLIGHT - len(self.calls)


def run_job(job: Job) -> RunReport:
    """Carve every shard of the job's input that is not committed yet.

    Connects to the Ray cluster of `RAY_ADDRESS` or of this machine, or starts a local one.

    Raises:
        ConfigError: input or output are wrong; nothing has been started.
    """
    store = open_store(job.config.output.url)
    plan = make_plan(job, store)
    store.check_writable()
    claim_identity(store, job.identity)
    report = RunReport(num_shards=len(plan.shards), num_done_before=plan.num_done)
    logger.info(
        "%d of %d shards to do (%.1f MB)", len(plan.todo), len(plan.shards), plan.todo_bytes / 1e6
    )
    if plan.todo:
        with _connected():
            _Driver(job=job, todo=plan.todo, report=report).run()
    snapshot = build_snapshot(store)
    report.snapshot = snapshot.number
    report.num_duplicates = snapshot.num_duplicates
    for key, shard in snapshot.duplicates[:10]:
        logger.warning(
            "key %r of shard %s is hidden by an earlier shard with the same key: rename it there",
            key,
            shard,
        )
    if plan.todo:
        report.save(store)
    return report


@contextmanager
def local_cluster(*, num_cpus: int) -> Iterator[None]:
    """Run a Ray cluster of this machine alone for the block; it reports no usage to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _connected() -> Iterator[None]:
    """Connect to a cluster unless the caller is connected; leave things as they were."""
    if ray.is_initialized():
        yield
        return
    ray.init(
        log_to_driver=False,
        include_dashboard=False if not os.environ.get("RAY_ADDRESS") else None,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


class _Driver:
    """Hands out shards, settles what comes back, replaces lost actors."""

    def __init__(self, *, job: Job, todo: Sequence[ShardRef], report: RunReport) -> None:
        self.runner = job.config.runner
        self.report = report
        self.todo = deque(_Work(shard=s, batch_size=self.runner.batch_size) for s in todo)
        self.progress = RunProgress(interval_s=self.runner.progress_s)
        self.stopping = threading.Event()
        gpus, cpus, count = _actor_shape(self.runner, len(todo))
        self.num_actors = count
        self.actor_class = ray.remote(
            num_gpus=gpus,
            num_cpus=cpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"carve": _SHARDS_IN_FLIGHT, "control": 1},
            scheduling_strategy="SPREAD",
        )(CarveActor)
        # One copy of the job in the object store, not one per actor.
        self.job_ref = ray.put(job)
        self.actors: list[_Actor] = []
        self.num_lost_loading = 0

    def run(self) -> None:
        """Work until all shards are settled, a signal comes, or the first shards all fail."""
        with stop_on_signals(self.stopping):
            try:
                while (self.todo or self._in_flight()) and not self.stopping.is_set():
                    self._replace_actors()
                    self._hand_out()
                    self._settle_ready()
                    self._watch()
                    self._break_circuit()
                self.report.interrupted = self.stopping.is_set()
            finally:
                self.progress.close()
                # What is in flight commits nothing; its files are removed by `carve gc`.
                for actor in self.actors:
                    ray.kill(actor.handle)

    def _in_flight(self) -> int:
        return sum(len(actor.calls) for actor in self.actors)

    def _replace_actors(self) -> None:
        wanted = min(self.num_actors, len(self.todo) + self._in_flight())
        while len(self.actors) < wanted:
            handle = self.actor_class.remote(self.job_ref)
            loading = handle.load.options(concurrency_group="carve").remote()
            self.actors.append(_Actor(handle=handle, loading=loading))

    def _hand_out(self) -> None:
        for depth in range(_SHARDS_IN_FLIGHT):
            for actor in self.actors:
                if self.todo and len(actor.calls) <= depth and actor.room > 0:
                    if self.todo[0].attempts and actor.calls:
                        continue
                    self._start(actor, self.todo.popleft())

    def _start(self, actor: _Actor, work: _Work) -> None:
        work.attempts += 1
        carve = actor.handle.carve.options(concurrency_group="carve")
        actor.calls[carve.remote(work.shard, work.batch_size)] = work
        if len(actor.calls) == 1:
            actor.moved_at = time.monotonic()

    def _settle_ready(self) -> None:
        waiting: dict[Any, _Actor] = {}
        for actor in self.actors:
            waiting.update(dict.fromkeys(actor.calls, actor))
            for call in (actor.loading, actor.status):
                if call is not None:
                    waiting[call] = actor
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
        for call in ready:
            if waiting[call] in self.actors:
                self._settle(waiting[call], call)

    def _settle(self, actor: _Actor, call: Any) -> None:  # noqa: ANN401  (an ObjectRef)
        """Take the answer of one call: a load, a status or a shard."""
        try:
            answer = ray.get(call)
        except RayTaskError as err:
            self._settle_error(actor, call, err.cause if err.cause is not None else err)
            return
        except RayError as err:
            self._lose(actor, "actor_lost", err)
            return
        if call is actor.loading:
            actor.loading = None
            actor.moved_at = time.monotonic()
        elif call is actor.status:
            actor.status = None
            self._take_status(actor, *answer)
        else:
            work = actor.calls.pop(call)
            actor.images_committed += answer.num_written
            actor.moved_at = time.monotonic()
            self.report.add(answer)
            logger.debug("shard %s committed", work.shard.url)

    def _settle_error(self, actor: _Actor, call: Any, cause: Exception) -> None:  # noqa: ANN401
        if call is actor.loading:
            raise ConfigError(f"the encoder cannot be loaded: {_line(cause)}") from cause
        work = actor.calls.pop(call)
        if isinstance(cause, ConfigError):
            raise cause
        if isinstance(cause, ShardError):
            self._give_up(work, cause.reason, cause)
        elif isinstance(cause, StorageError):
            self._retry(work, "storage", cause)
        elif isinstance(cause, torch.OutOfMemoryError):
            work.batch_size = max(1, work.batch_size // 2)
            self._retry(work, "out_of_memory", cause)
        else:
            # Unknown: the process may be spoiled (a CUDA fault, say), so it is replaced.
            self._retry(work, type(cause).__name__, cause)
            self._lose(actor, "actor_replaced", cause)

    def _lose(self, actor: _Actor, reason: str, cause: Exception) -> None:
        """Forget an actor and try its shards elsewhere."""
        logger.warning("%s: %s", reason, _line(cause))
        self.actors.remove(actor)
        ray.kill(actor.handle)
        if actor.loading is not None:
            self.num_lost_loading += 1
            if self.num_lost_loading >= self.runner.max_attempts * self.num_actors:
                raise ConfigError(
                    f"{self.num_lost_loading} actors died before they could work, the last of: "
                    f"{_line(cause)}"
                ) from cause
        for work in actor.calls.values():
            self._retry(work, reason, cause)

    def _retry(self, work: _Work, reason: str, cause: Exception) -> None:
        if work.attempts >= self.runner.max_attempts:
            self._give_up(work, reason, cause)
            return
        self.report.retries[reason] += 1
        logger.warning(
            "shard %s: attempt %d of %d failed (%s): %s",
            work.shard.url,
            work.attempts,
            self.runner.max_attempts,
            reason,
            _line(cause),
        )
        self.todo.append(work)

    def _give_up(self, work: _Work, reason: str, cause: Exception) -> None:
        message = _line(cause)
        logger.error("shard %s failed (%s): %s", work.shard.url, reason, message)
        self.report.failed.append(
            FailedShard(
                shard=work.shard.url, reason=reason, message=message, attempts=work.attempts
            )
        )

    def _take_status(self, actor: _Actor, num_images: int, peak_rss: int) -> None:
        if num_images != actor.num_images:
            actor.num_images, actor.moved_at = num_images, time.monotonic()
        self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, peak_rss)

    def _watch(self) -> None:
        """Ask the actors how they are, show it, and kill those that do not move."""
        now = time.monotonic()
        for actor in list(self.actors):
            idle = actor.status is None and now - actor.asked_at >= _STATUS_S
            if idle and actor.loading is None:
                actor.asked_at = now
                status = actor.handle.status.options(concurrency_group="control")
                actor.status = status.remote()
            if actor.calls and now - actor.moved_at > self.runner.heartbeat_s:
                still = TimeoutError(f"no image in {self.runner.heartbeat_s:.0f} s")
                self._lose(actor, "actor_hung", still)
        in_flight = sum(max(0, a.num_images - a.images_committed) for a in self.actors)
        at_work = sum(a.loading is None for a in self.actors)
        self.progress.update(
            self.report,
            images_in_flight=in_flight,
            actors=f"{at_work} of {self.num_actors} actors",
        )

    def _break_circuit(self) -> None:
        failed = len(self.report.failed)
        if failed >= self.runner.fail_fast_after and not self.report.num_committed:
            logger.error("the first %d shards all failed: stopping", failed)
            self.todo.clear()
            for actor in self.actors:
                actor.calls.clear()


def _actor_shape(runner: RunnerConfig, num_shards: int) -> tuple[float, float, int]:
    """Return (GPUs per actor, CPUs per actor, actors)."""
    cluster = ray.cluster_resources()
    gpus = runner.gpus_per_actor
    if gpus == "auto":
        gpus = 1.0 if cluster.get("GPU", 0) >= 1 else 0.0
    count = runner.num_actors
    if count == "auto":
        if gpus:
            count = math.floor(cluster.get("GPU", 0) / gpus)
        else:
            count = math.floor(cluster.get("CPU", 1) / max(1, runner.cpus_per_actor))
    return gpus, runner.cpus_per_actor, max(1, min(count, num_shards))


def _line(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= 500 else text[:497] + "..."

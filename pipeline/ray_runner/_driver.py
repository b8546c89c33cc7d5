"""The driver's loop: hand out shards, settle what comes back, replace lost actors."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from pipeline.errors import ConfigError, ShardError, StorageError
from pipeline.heap import ENVIRONMENT
from pipeline.job import Job
from pipeline.progress import RunProgress
from pipeline.ray_runner._actor import CarveActor
from pipeline.ray_runner._cluster import actor_shape
from pipeline.run_report import FailedShard, RunReport
from pipeline.types import ShardRef

logger = logging.getLogger(__name__)

_SHARDS_IN_FLIGHT = 2  # per actor: one has the device, one reads ahead
_POLL_S = 0.5
_STATUS_S = 1.0  # between two questions to an actor; without a pause they would keep a core busy


@dataclass(kw_only=True, eq=False)
class _Work:
    """One shard on its way, over all attempts."""

    shard: ShardRef
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
    images_settled: int = 0
    moved_at: float = field(default_factory=time.monotonic)

    @property
    def room(self) -> int:
        """Shards it can take; a shard tried before goes alone, so that it kills no other."""
        if self.loading is not None or any(work.attempts > 1 for work in self.calls.values()):
            return 0
        return _SHARDS_IN_FLIGHT - len(self.calls)


class Driver:
    """Works off the shards of one run.

    Args:
        job: what to do.
        todo: the shards, in the order to start them.
        report: counts what happens.
        stopping: set to end the run early.
    """

    def __init__(
        self, *, job: Job, todo: Sequence[ShardRef], report: RunReport, stopping: threading.Event
    ) -> None:
        self.runner = job.config.runner
        self.report = report
        self.stopping = stopping
        self.todo = deque(_Work(shard=shard) for shard in todo)
        self.left: list[_Work] = []  # what the limits of this run do not allow
        self.num_begun, self.started_at = 0, time.monotonic()
        self.batch_size = self.runner.batch_size  # lowered for good where memory does not do
        self.progress = RunProgress(interval_s=self.runner.progress_s)
        gpus, cpus, self.num_actors = actor_shape(self.runner, len(todo))
        self.actor_class = ray.remote(
            num_gpus=gpus,
            num_cpus=cpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"carve": _SHARDS_IN_FLIGHT, "control": 1},
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": ENVIRONMENT},
        )(CarveActor)
        # One copy of the job in the object store, not one per actor.
        self.job_ref = ray.put(job)
        self.actors: list[_Actor] = []
        self.has_loaded = False
        self.num_lost_loading = 0  # since the last actor that could load
        self.stumbled: set[str] = set()  # shards that have failed at least once

    def run(self) -> None:
        """Work until all shards are settled, the event is set, or the first shards all fail.

        Raises:
            ConfigError: no actor can start or load the encoder, and nothing is committed.
        """
        try:
            while (self.todo or self._in_flight()) and not self.stopping.is_set():
                self._keep_limits()
                self._replace_actors()
                self._hand_out()
                self._settle_ready()
                self._watch()
                if self._is_hopeless() and not self._in_flight():
                    self._give_up_all(
                        "the first shards all failed: repair them, or raise runner.fail_fast_after"
                    )
        except ConfigError as err:
            if not self.report.num_committed:
                raise
            self._give_up_all(str(err))
        finally:
            self.report.interrupted = self.stopping.is_set() or bool(self.left)
            self.report.num_not_started += sum(not work.attempts for work in self.left)
            self.progress.close()
            # What is in flight commits nothing; no commit will name the files it leaves.
            for actor in self.actors:
                ray.kill(actor.handle)

    def _in_flight(self) -> int:
        return sum(len(actor.calls) for actor in self.actors)

    def _keep_limits(self) -> None:
        """Put aside what this run may not start; what is in flight goes on to its end."""
        hours, most = self.runner.max_hours, self.runner.max_shards
        is_late = hours is not None and time.monotonic() - self.started_at >= hours * 3600
        if not is_late and (most is None or self.num_begun < most):
            return
        # Before its hours are over a shard that was begun is tried again: it counts already.
        left = [work for work in self.todo if is_late or not work.attempts]
        if left and not self.left:
            limit = f"max_hours={hours}" if is_late else f"max_shards={most}"
            logger.warning("runner.%s: nothing more is started; the same command resumes", limit)
        self.left += left
        self.todo = deque(work for work in self.todo if work.attempts and not is_late)

    def _replace_actors(self) -> None:
        wanted = min(self.num_actors, len(self.todo) + self._in_flight())
        while len(self.actors) < wanted:
            handle = self.actor_class.remote(self.job_ref)
            loading = handle.load.options(concurrency_group="carve").remote()
            self.actors.append(_Actor(handle=handle, loading=loading))

    def _hand_out(self) -> None:
        if self._is_hopeless():
            return
        for depth in range(_SHARDS_IN_FLIGHT):
            for actor in self.actors:
                if self.todo and len(actor.calls) <= depth and actor.room > 0:
                    if self.todo[0].attempts and actor.calls:
                        continue
                    self._start(actor, self.todo.popleft())
                    self._keep_limits()

    def _start(self, actor: _Actor, work: _Work) -> None:
        self.num_begun += not work.attempts
        work.attempts += 1
        carve = actor.handle.carve.options(concurrency_group="carve")
        actor.calls[carve.remote(work.shard, self.batch_size)] = work
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
            self.has_loaded, self.num_lost_loading = True, 0
            logger.info("actor ready on %s", answer)
        elif call is actor.status:
            actor.status = None
            self._take_status(actor, *answer)
        else:
            actor.calls.pop(call)
            actor.images_settled += answer.num_written
            actor.moved_at = time.monotonic()
            self.report.add(answer)

    def _settle_error(self, actor: _Actor, call: Any, cause: Exception) -> None:  # noqa: ANN401
        if call is actor.loading:
            if not self.has_loaded:
                raise ConfigError(f"the encoder cannot be loaded: {_line(cause)}") from cause
            self._lose(actor, "actor_not_ready", cause)
            return
        work = actor.calls.pop(call)
        if not actor.calls:
            actor.images_settled = actor.num_images
        if isinstance(cause, ConfigError):
            raise cause
        if isinstance(cause, ShardError):
            self._give_up(work, cause.reason, cause)
        elif isinstance(cause, StorageError):
            self._retry(work, "storage", cause)
        elif isinstance(cause, torch.OutOfMemoryError) and self.batch_size > 1:
            self._halve_batch(work)
        else:
            # Unknown: the process may be spoiled (a CUDA fault, say), so it is replaced.
            self._retry(work, type(cause).__name__, cause)
            self._lose(actor, "actor_replaced", cause)

    def _halve_batch(self, work: _Work) -> None:
        """Try again with less; not an attempt, since the shard is not to blame."""
        work.attempts -= 1
        self.report.retries["out_of_memory"] += 1
        self.batch_size = max(1, self.batch_size // 2)
        logger.warning("out of memory: batches of %d images from now on", self.batch_size)
        self.todo.appendleft(work)

    def _lose(self, actor: _Actor, reason: str, cause: Exception) -> None:
        """Forget an actor and try its shards elsewhere."""
        logger.warning("%s: %s", reason, _line(cause))
        self.actors.remove(actor)
        ray.kill(actor.handle)
        for work in actor.calls.values():
            self._retry(work, reason, cause)
        if actor.loading is not None:
            self.num_lost_loading += 1
            if self.num_lost_loading >= self.runner.max_attempts * self.num_actors:
                raise ConfigError(
                    f"{self.num_lost_loading} actors ended before they could work, the last with: "
                    f"{_line(cause)}"
                ) from cause

    def _retry(self, work: _Work, reason: str, cause: Exception) -> None:
        if work.attempts >= self.runner.max_attempts:
            self._give_up(work, reason, cause)
            return
        self.stumbled.add(work.shard.url)
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

    def _give_up(self, work: _Work, reason: str, cause: Exception | str) -> None:
        message = cause if isinstance(cause, str) else _line(cause)
        logger.error("shard %s failed (%s): %s", work.shard.url, reason, message)
        self.stumbled.add(work.shard.url)
        self.report.failed.append(
            FailedShard(
                shard=work.shard.url, reason=reason, message=message, attempts=work.attempts
            )
        )

    def _is_hopeless(self) -> bool:
        """Tell whether the first shards all failed; nothing new is started then.

        The run ends when what is in flight has failed too; if that commits, it goes on.
        """
        done = self.report.num_committed + self.report.num_done_before
        return not done and len(self.stumbled) >= self.runner.fail_fast_after

    def _give_up_all(self, message: str) -> None:
        """End the run: shards that were tried have failed, the others were not started."""
        logger.error("stopping: %s", message)
        waiting = [*self.todo, *(w for actor in self.actors for w in actor.calls.values())]
        for work in waiting:
            if work.attempts:
                self._give_up(work, "stopped", message)
        self.report.num_not_started = sum(not work.attempts for work in waiting)
        self.todo.clear()
        for actor in self.actors:
            actor.calls.clear()

    def _take_status(self, actor: _Actor, num_images: int, peak_rss: int) -> None:
        if num_images != actor.num_images:
            actor.num_images, actor.moved_at = num_images, time.monotonic()
        self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, peak_rss)

    def _watch(self) -> None:
        """Ask the actors how they are, show it, and end those that do not move."""
        for actor in list(self.actors):
            self._watch_actor(actor, time.monotonic())
        in_flight = sum(max(0, a.num_images - a.images_settled) for a in self.actors)
        at_work = sum(a.loading is None for a in self.actors)
        self.progress.update(
            self.report,
            images_in_flight=in_flight,
            actors=f"{at_work} of {self.num_actors} actors",
        )

    def _watch_actor(self, actor: _Actor, now: float) -> None:
        still_s = now - actor.moved_at
        if actor.loading is not None:
            if still_s > self.runner.actor_start_s:
                self._lose_late(actor)
            return
        if actor.status is None and now - actor.asked_at >= _STATUS_S:
            actor.asked_at = now
            status = actor.handle.status.options(concurrency_group="control")
            actor.status = status.remote()
        if actor.calls and still_s > self.runner.heartbeat_s:
            cause = TimeoutError(f"no image in {self.runner.heartbeat_s:.0f} s")
            self._lose(actor, "actor_hung", cause)

    def _lose_late(self, actor: _Actor) -> None:
        cause = TimeoutError(
            f"not ready after {self.runner.actor_start_s:.0f} s (runner.actor_start_s): the "
            "cluster has no room for it, or the weights load too slowly"
        )
        if not self.has_loaded:
            raise ConfigError(f"no actor is ready: {cause}")
        # The run can do without it.
        self.num_actors = max(1, self.num_actors - 1)
        self._lose(actor, "actor_not_ready", cause)


def _line(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= 500 else text[:497] + "..."

"""The driver's loop: hand out shards, settle what comes back, replace lost actors."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from pipeline import run_log
from pipeline.cache.commit import Commit
from pipeline.error_budget import ErrorBudget
from pipeline.errors import ConfigError, ShardAbandonedError
from pipeline.job import Job
from pipeline.progress import RunProgress
from pipeline.ray_runner._backlog import Backlog
from pipeline.ray_runner._failure import OUT_OF_MEMORY, Remedy, diagnose, one_line
from pipeline.ray_runner._fleet import SHARDS_IN_FLIGHT, Call, Fleet, Member, Work
from pipeline.ray_runner._metrics import RunMetrics
from pipeline.ray_runner._tail import Pace, latest_shard
from pipeline.run_log import about
from pipeline.run_report import FailedShard, RunReport
from pipeline.stop_signal import StopSignals
from pipeline.types import ShardRef

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_LOST = frozenset({"actor_lost", "actor_hung", "actor_replaced"})  # with other shards, perhaps
_ABANDON_S = 10.0  # for actors to remove what they have written, at the end of a run
_HURRY_S = 1.0  # the same after a signal: `ray job stop` kills 3 s after it


class Driver:
    """Works off the shards of one run.

    Args:
        job: what to do.
        todo: the shards, in the order to start them.
        report: counts what happens.
        signals: end the run early.
    """

    def __init__(
        self, *, job: Job, todo: Sequence[ShardRef], report: RunReport, signals: StopSignals
    ) -> None:
        self.runner = job.config.runner
        self.report = report
        self.signals = signals
        self.backlog = Backlog((Work(shard=shard) for shard in todo), self.runner)
        self.batch_size = self.runner.batch_size  # lowered for good where memory does not do
        self.fleet = Fleet(job=job, run_id=report.run_id, num_shards=len(todo))
        self.budget = ErrorBudget(
            max_ratio=self.runner.max_bad_ratio_run, total_bytes=sum(s.size for s in todo)
        )
        self.pace = Pace()
        self.stumbled: dict[str, tuple[str, str]] = {}  # shards that have failed, and at what last
        self.stop_message = ""  # why the run gives up
        self.drain_until: float | None = None  # set by the first look at a signal
        # A bar would tear lines of JSON apart.
        is_terminal = None if self.runner.log_format == "text" else False
        console = Console(stderr=True, force_terminal=is_terminal)
        self.progress = RunProgress(interval_s=self.runner.progress_s, console=console)
        self.metrics = RunMetrics(report)

    def run(self) -> None:
        """Work until all shards are settled, or a signal, a limit or an error budget ends the run.

        Raises:
            ConfigError: no actor can start or load the encoder, and nothing is committed.
        """
        try:
            while self._goes_on():
                self.backlog.keep_limits()
                self._hand_out()
                self._settle_ready()
                self._watch()
                self._judge()
        except ConfigError as err:
            if not self.report.num_committed:
                raise
            self._stop(str(err), "config")
        finally:
            self._end()

    def _goes_on(self) -> bool:
        if self.stop_message:
            return False
        in_flight = self._num_in_flight() > 0
        if not self.signals.requested:
            return in_flight or bool(self.backlog.waiting)
        if self.drain_until is None:
            self.drain_until = time.monotonic() + self.runner.drain_s
            self.backlog.close()
        return in_flight and time.monotonic() < self.drain_until

    def _num_in_flight(self) -> int:
        return len({id(call.work) for _, call in self.fleet.calls()})

    def _end(self) -> None:
        """End the actors, and count what has become of the shards that are not settled."""
        in_flight = {id(call.work): call.work for _, call in self.fleet.calls()}
        left = [*self.backlog.waiting, *self.backlog.aside, *in_flight.values()]
        self.report.interrupted = self.signals.requested or bool(self.backlog.aside)
        self.progress.close()
        hurry = self.signals.requested
        for work, commit in self.fleet.close(within_s=_HURRY_S if hurry else _ABANDON_S):
            if not work.settled:
                work.settled = True
                self._count(commit)
        for work in left:
            if work.begun and self.stop_message:
                reason, message = work.failure or ("stopped", self.stop_message)
                self._give_up(work, reason, message)
        self.report.num_not_started += sum(not work.begun for work in left)
        self.report.num_abandoned += sum(work.begun and not work.settled for work in left)
        self.report.num_in_flight = 0
        self.report.batch_size = self.batch_size
        self.metrics.update(self.fleet, self.batch_size, at_end=True)

    def _hand_out(self) -> None:
        """Keep actors at work; where nothing is left to begin, double what is late."""
        waiting = self.backlog.waiting
        self.fleet.grow(len(waiting) + self._num_in_flight())
        if self._is_hopeless() or self.signals.requested:
            return
        for depth in range(SHARDS_IN_FLIGHT):
            for actor in self.fleet.members:
                if self.backlog.waiting and len(actor.calls) <= depth and actor.room > 0:
                    if self.backlog.waiting[0].attempts and actor.calls:
                        continue
                    actor.carve(self.backlog.take(), batch_size=self.batch_size)
        if not self.backlog.waiting and self.runner.duplicate_tail is not None:
            self._double_the_tail(self.runner.duplicate_tail)

    def _double_the_tail(self, times_usual: float) -> None:
        """Begin late shards a second time on idle actors: the first attempt to commit counts."""
        most = self.runner.max_attempts
        for idle in [actor for actor in self.fleet.members if actor.is_idle]:
            late = latest_shard(self.fleet, self.pace, times_usual=times_usual, max_attempts=most)
            if late is None:
                return
            url = late.work.shard.url
            logger.warning(
                "shard %s: at work for %.1f s where %.1f s are usual: begun a second time",
                url,
                late.seconds,
                late.usual_s,
                extra=about(shard=url, attempt=late.work.attempts + 1),
            )
            self.report.num_doubled += 1
            idle.carve(late.work, batch_size=self.batch_size, is_duplicate=True)

    def _settle_ready(self) -> None:
        waiting: dict[Any, Member] = {}
        for actor in self.fleet.members:
            waiting.update(dict.fromkeys(actor.calls, actor))
            for call in (actor.loading, actor.status):
                if call is not None:
                    waiting[call] = actor
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
        for call in ready:
            if waiting[call] in self.fleet.members:
                self._settle(waiting[call], call)

    def _settle(self, actor: Member, reference: Any) -> None:  # noqa: ANN401  (an ObjectRef)
        """Take the answer of one call: a load, a status or a shard."""
        try:
            answer = ray.get(reference)
        except RayTaskError as err:
            self._settle_error(actor, reference, err.cause if err.cause is not None else err)
            return
        except RayError as err:
            self._lose(actor, "actor_lost", err)
            return
        if reference is actor.loading:
            host, place = answer
            self.fleet.loaded(actor, host)
            logger.info("%s ready on %s", actor.name, place)
        elif reference is actor.status:
            actor.status = None
            actor.tell(answer)
            run_log.replay(answer.log)
            self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, answer.peak_rss_bytes)
        else:
            self._settle_commit(actor, actor.take(reference), answer)

    def _settle_commit(self, actor: Member, call: Call, commit: Commit) -> None:
        actor.images_settled += commit.num_written
        actor.moved_at = time.monotonic()
        work = call.work
        if work.settled:  # the other attempt was first: this is its record
            return
        work.settled = True
        self.report.num_doubled_won += call.is_duplicate
        self.pace.record(work.shard.size, time.monotonic() - call.started_at)
        self._count(commit)
        if work.num_calls:
            self.fleet.superseded(work)

    def _count(self, commit: Commit) -> None:
        self.report.add(commit)
        lost = (commit.num_read - commit.num_written) / commit.num_read if commit.num_read else 0.0
        self.budget.settle(commit.shard.size, lost_ratio=lost)

    def _settle_error(self, actor: Member, reference: Any, cause: Exception) -> None:  # noqa: ANN401
        if reference is actor.loading:
            if not self.fleet.has_loaded:
                raise ConfigError(f"the encoder cannot be loaded: {one_line(cause)}") from cause
            self._lose(actor, "actor_not_ready", cause)
            return
        if reference is actor.status:
            self._lose(actor, "actor_lost", cause)
            return
        call = actor.take(reference)
        if not actor.calls:
            actor.images_settled = actor.latest.num_images
        if isinstance(cause, ShardAbandonedError):
            return
        remedy, reason = diagnose(cause, batch_size=call.batch_size)
        if remedy is Remedy.STOP:
            call.work.failure = reason, one_line(cause)  # it is counted at the end
            self._put_back(call.work)
            raise cause
        if remedy is Remedy.GIVE_UP:
            self._give_up(call.work, reason, cause)
        elif remedy is Remedy.RETRY:
            self._retry(call.work, reason, cause)
        elif remedy is Remedy.SMALLER_BATCH:
            self._halve_batch(call)
        else:
            self._retry(call.work, reason, cause)
            self._lose(actor, "actor_replaced", cause)

    def _halve_batch(self, call: Call) -> None:
        """Try again with less; not an attempt, since the shard is not to blame."""
        self.report.retries[OUT_OF_MEMORY] += 1
        # Half of what was too much: the other shard in flight may have lowered it already.
        smaller = max(1, call.batch_size // 2)
        if smaller < self.batch_size:
            self.batch_size = smaller
            logger.warning("out of memory: batches of %d images from now on", smaller)
        call.work.attempts -= 1
        self._put_back(call.work)

    def _put_back(self, work: Work) -> None:
        """Have a shard begun again next, unless its other attempt goes on or was first."""
        if not work.settled and not work.num_calls:
            self.backlog.waiting.appendleft(work)

    def _lose(self, actor: Member, reason: str, cause: Exception) -> None:
        """Forget an actor and try its shards elsewhere."""
        logger.warning("%s of %s: %s", reason, actor.name, one_line(cause))
        self.report.actors_lost[reason] += 1
        for call in self.fleet.remove(actor, cause):
            self._retry(call.work, reason, cause)

    def _retry(self, work: Work, reason: str, cause: Exception) -> None:
        if work.settled:
            return
        work.failure = reason, one_line(cause)
        # One node that is lost takes many shards with it, which says nothing about any of them.
        if reason not in _LOST or work.attempts > 1:
            self.stumbled[work.shard.url] = work.failure
        if work.num_calls:  # its other attempt goes on
            self.report.retries[reason] += 1
            return
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
            one_line(cause),
            extra=about(shard=work.shard.url, attempt=work.attempts),
        )
        self.backlog.waiting.append(work)

    def _give_up(self, work: Work, reason: str, cause: Exception | str) -> None:
        if work.settled:
            return
        work.settled = True
        message = cause if isinstance(cause, str) else one_line(cause)
        logger.error(
            "shard %s failed (%s): %s",
            work.shard.url,
            reason,
            message,
            extra=about(shard=work.shard.url, attempt=work.attempts),
        )
        self.stumbled[work.shard.url] = reason, message
        self.budget.settle(work.shard.size, lost_ratio=1.0)
        self.report.failed.append(
            FailedShard(
                shard=work.shard.url,
                reason=reason,
                message=message,
                attempts=work.attempts,
                host=work.host,
            )
        )
        if work.num_calls:
            self.fleet.superseded(work)

    def _judge(self) -> None:
        """End the run where going on would do no good."""
        if self.budget.is_spent:
            self._stop(
                f"{self.budget.lost_ratio:.1%} of the run's input are lost (rejected samples and "
                f"failed shards), more than runner.max_bad_ratio_run="
                f"{self.runner.max_bad_ratio_run} allows: nothing more is committed",
                "error_budget",
            )
        elif self._is_hopeless() and self.backlog.waiting and not self._num_in_flight():
            reasons = Counter(reason for reason, _ in self.stumbled.values())
            counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            _, message = next(reversed(self.stumbled.values()))
            self._stop(
                f"the first {len(self.stumbled)} shards all failed ({counted}), the last with: "
                f"{message}. Repair that, or raise runner.fail_fast_after",
                "fail_fast",
            )

    def _stop(self, message: str, stopped_by: str) -> None:
        """End the run: shards that were tried have failed, the others were not started."""
        if not self.stop_message:
            logger.error("stopping: %s", message)
            self.stop_message, self.report.stopped_by = message, stopped_by

    def _is_hopeless(self) -> bool:
        """Tell whether the first shards all failed; nothing new is started then.

        The run ends when what is in flight has failed too; if that commits, it goes on.
        """
        done = self.report.num_committed + self.report.num_done_before
        return not done and len(self.stumbled) >= self.runner.fail_fast_after

    def _watch(self) -> None:
        """Ask the actors how they are, show it, and end those that do not move."""
        for actor in list(self.fleet.members):
            self._watch_actor(actor, time.monotonic())
        members = self.fleet.members
        in_flight = sum(max(0, a.latest.num_images - a.images_settled) for a in members)
        self.report.num_in_flight = in_flight
        at_work = sum(a.loading is None for a in members)
        self.progress.update(
            self.report,
            images_in_flight=in_flight,
            actors=f"{at_work} of {self.fleet.size} actors",
        )
        self.metrics.update(self.fleet, self.batch_size)

    def _watch_actor(self, actor: Member, now: float) -> None:
        still_s = now - actor.moved_at
        if actor.loading is not None:
            if still_s > self.runner.actor_start_s:
                self._lose_late(actor)
            return
        actor.ask(now)
        if actor.calls and still_s > self.runner.heartbeat_s:
            cause = TimeoutError(f"no image in {self.runner.heartbeat_s:.0f} s")
            self._lose(actor, "actor_hung", cause)

    def _lose_late(self, actor: Member) -> None:
        cause = TimeoutError(
            f"not ready after {self.runner.actor_start_s:.0f} s (runner.actor_start_s): the "
            "cluster has no room for it, or the weights load too slowly"
        )
        if not self.fleet.has_loaded:
            raise ConfigError(f"no actor is ready: {cause}")
        self.fleet.shrink()  # the run can do without it
        self._lose(actor, "actor_not_ready", cause)

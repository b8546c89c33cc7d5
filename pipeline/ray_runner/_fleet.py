"""The driver's view of its actors: started, at work, asked how they are, replaced."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline import run_log
from pipeline.cache.commit import Commit
from pipeline.config import NotifyConfig
from pipeline.errors import ConfigError
from pipeline.heap import ENVIRONMENT
from pipeline.job import Job
from pipeline.ray_runner._actor import ActorStatus, CarveActor
from pipeline.ray_runner._cluster import actor_shape
from pipeline.ray_runner._failure import one_line
from pipeline.types import ShardRef

logger = logging.getLogger(__name__)

SHARDS_IN_FLIGHT = 2  # per actor: one has the device, one reads ahead
_STATUS_S = 1.0  # between two questions to an actor; without a pause they would keep a core busy


@dataclass(kw_only=True, eq=False)
class Work:
    """One shard on its way, over all attempts."""

    shard: ShardRef
    begun: bool = False  # in this run; an attempt that ran out of memory is not counted as one
    attempts: int = 0
    num_calls: int = 0  # attempts at work now: two where the tail of a run is doubled
    settled: bool = False  # committed or given up; what still comes of it is of no interest
    host: str = ""  # where it was tried last
    failure: tuple[str, str] | None = None  # reason and message of the last attempt that failed


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One attempt at a shard."""

    work: Work
    batch_size: int
    is_duplicate: bool
    started_at: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True, eq=False)
class Member:
    """One actor."""

    handle: Any
    loading: Any  # reference to the call of `load`; None once it has answered
    name: str
    host: str = ""
    calls: dict[Any, Call] = field(default_factory=dict)  # reference -> attempt
    status: Any = None  # reference to the call of `status` under way
    asked_at: float = 0.0
    latest: ActorStatus = field(default_factory=ActorStatus)
    images_settled: int = 0
    moved_at: float = field(default_factory=time.monotonic)

    @property
    def room(self) -> int:
        """Shards it can take; a shard tried before goes alone, so that it kills no other."""
        if self.loading is not None or any(c.work.attempts > 1 for c in self.calls.values()):
            return 0
        return SHARDS_IN_FLIGHT - len(self.calls)

    @property
    def is_idle(self) -> bool:
        """Whether it has loaded and has nothing to do."""
        return self.loading is None and not self.calls

    def carve(self, work: Work, *, batch_size: int, is_duplicate: bool = False) -> None:
        """Start an attempt."""
        work.attempts += 1
        work.num_calls += 1
        work.host = self.host
        carve = self.handle.carve.options(concurrency_group="carve")
        call = Call(work=work, batch_size=batch_size, is_duplicate=is_duplicate)
        self.calls[carve.remote(work.shard, batch_size)] = call
        if len(self.calls) == 1:
            self.moved_at = time.monotonic()

    def take(self, reference: Any) -> Call:  # noqa: ANN401  (an ObjectRef)
        """Remove an attempt that has ended."""
        call = self.calls.pop(reference)
        call.work.num_calls -= 1
        return call

    def abandon(self, work: Work) -> None:
        """Ask it to end an attempt and to remove its files; it may be too late to."""
        self.handle.abandon.options(concurrency_group="control").remote(work.shard)

    def ask(self, now: float) -> None:
        """Ask how it is, unless it was asked a moment ago."""
        if self.loading is None and self.status is None and now - self.asked_at >= _STATUS_S:
            self.asked_at = now
            self.status = self.handle.status.options(concurrency_group="control").remote()

    def tell(self, status: ActorStatus) -> None:
        """Take its answer."""
        if status.num_images != self.latest.num_images:
            self.moved_at = time.monotonic()
        self.latest = status


class Fleet:
    """The actors of one run.

    Args:
        job: what they do.
        run_id: of the run, for their logs.
        num_shards: of the run; no more actors than that.
    """

    def __init__(self, *, job: Job, run_id: str, num_shards: int) -> None:
        runner = job.config.runner
        gpus, cpus, self.size = actor_shape(runner, num_shards)
        self._max_lost_loading = runner.max_attempts * self.size
        self._actor_class = ray.remote(
            num_gpus=gpus,
            num_cpus=cpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"carve": SHARDS_IN_FLIGHT, "control": 1},
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": ENVIRONMENT},
        )(CarveActor)
        # One copy in the object store, not one per actor; without what actors need not know.
        config = job.config.model_copy(update={"notify": NotifyConfig()})
        self._job = ray.put(replace(job, config=config))
        self._run_id = run_id
        self.members: list[Member] = []
        self.num_started = 0
        self.has_loaded = False
        self._num_lost_loading = 0  # since the last actor that could load

    def grow(self, wanted: int) -> None:
        """Start actors until there are as many as wanted, but not more than fit."""
        while len(self.members) < min(self.size, wanted):
            name = f"actor-{self.num_started}"
            self.num_started += 1
            handle = self._actor_class.remote(self._job, run_id=self._run_id, name=name)
            loading = handle.load.options(concurrency_group="carve").remote()
            self.members.append(Member(handle=handle, loading=loading, name=name))

    def calls(self) -> Iterator[tuple[Member, Call]]:
        """Yield the attempts in flight that matter."""
        for member in self.members:
            for call in member.calls.values():
                if not call.work.settled:
                    yield member, call

    def loaded(self, member: Member, host: str) -> None:
        """Take the answer of an actor that is ready."""
        member.loading, member.host = None, host
        member.moved_at = time.monotonic()
        self.has_loaded, self._num_lost_loading = True, 0

    def remove(self, member: Member, cause: Exception) -> list[Call]:
        """Forget an actor, end its process, and return the attempts that it had.

        Raises:
            ConfigError: so many ended before they had loaded that it is no accident.
        """
        self.members.remove(member)
        ray.kill(member.handle)
        if member.loading is not None:
            self._num_lost_loading += 1
            if self._num_lost_loading >= self._max_lost_loading:
                raise ConfigError(
                    f"{self._num_lost_loading} actors ended before they could work, the last with: "
                    f"{one_line(cause)}"
                ) from cause
        calls = list(member.calls.values())
        for call in calls:
            call.work.num_calls -= 1
        return calls

    def shrink(self) -> None:
        """Do with one actor less: the cluster has no room for it."""
        self.size = max(1, self.size - 1)

    def superseded(self, work: Work) -> None:
        """Have all attempts at a settled shard given up."""
        for member in self.members:
            if any(call.work is work for call in member.calls.values()):
                member.abandon(work)

    def close(self, *, within_s: float) -> list[tuple[Work, Commit]]:
        """Have what is in flight given up, and end all actors.

        Args:
            within_s: how long to wait for actors to remove what they have written, and half of it
                for the last lines of their logs.

        Returns:
            The shards that were committed all the same, with their records.
        """
        calls = {r: call for member in self.members for r, call in member.calls.items()}
        for member in self.members:
            for call in member.calls.values():
                member.abandon(call.work)
        answers = _answers(list(calls), within_s)
        committed = [
            (calls[reference].work, answer)
            for reference, answer in answers.items()
            if isinstance(answer, Commit)
        ]
        ready = [member for member in self.members if member.loading is None]
        # An answer that is on its way already has the lines up to then.
        words = [member.status for member in ready if member.status is not None]
        words += [m.handle.status.options(concurrency_group="control").remote() for m in ready]
        for status in _answers(words, within_s / 2).values():
            if isinstance(status, ActorStatus):
                run_log.replay(status.log)
        for member in self.members:
            ray.kill(member.handle)
        self.members.clear()
        return committed


def _answers(references: list[Any], timeout_s: float) -> dict[Any, Any]:
    """Return what calls answer in time; an error stands for itself."""
    if not references:
        return {}
    ended, _ = ray.wait(references, num_returns=len(references), timeout=timeout_s)
    answers: dict[Any, Any] = {}
    for reference in ended:
        try:
            answers[reference] = ray.get(reference)
        except RayError as err:
            answers[reference] = err
    return answers

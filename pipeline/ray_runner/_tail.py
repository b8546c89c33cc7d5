"""When nothing is left to hand out: which shard in flight is worth a second attempt."""

import statistics
import time
from dataclasses import dataclass, field

from pipeline.ray_runner._fleet import Fleet, Work

_MIN_SETTLED = 3  # shards before a usual time can be told
_MAX_KEPT = 1001  # of the last shards: a run may have millions


@dataclass(kw_only=True)
class Pace:
    """How long shards of this run take, from being handed out to their commit."""

    _seconds: list[float] = field(default_factory=list)
    _per_byte: list[float] = field(default_factory=list)

    def record(self, shard_bytes: int, seconds: float) -> None:
        """Note a committed shard."""
        for values, value in (
            (self._seconds, seconds),
            (self._per_byte, seconds / max(1, shard_bytes)),
        ):
            values.append(value)
            del values[:-_MAX_KEPT]

    def usual_s(self, shard_bytes: int) -> float | None:
        """Return what a shard of this size usually takes; None while too few are done.

        The larger of the median time and the median time per byte: a large shard may take longer,
        and a small one is not expected in no time.
        """
        if len(self._seconds) < _MIN_SETTLED:
            return None
        by_size = statistics.median(self._per_byte) * shard_bytes
        return max(statistics.median(self._seconds), by_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class LateShard:
    """One that takes longer than is usual in this run."""

    work: Work
    seconds: float  # so far
    usual_s: float


def latest_shard(
    fleet: Fleet, pace: Pace, *, times_usual: float, max_attempts: int
) -> LateShard | None:
    """Return the shard in flight that is latest and may have another attempt; None if none is.

    Args:
        fleet: has the shards.
        pace: of this run.
        times_usual: how many times the usual a shard may take before it is late.
        max_attempts: a shard that has had so many gets none more.
    """
    now, late = time.monotonic(), []
    for _, call in fleet.calls():
        usual_s = pace.usual_s(call.work.shard.size)
        if usual_s is None or call.work.num_calls > 1 or call.work.attempts >= max_attempts:
            continue
        seconds = now - call.started_at
        if seconds >= times_usual * usual_s:
            late.append(LateShard(work=call.work, seconds=seconds, usual_s=usual_s))
    return max(late, key=lambda shard: shard.seconds / shard.usual_s, default=None)

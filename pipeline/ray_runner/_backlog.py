"""The shards that wait, within the limits of one run."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence

from pipeline.config import RunnerConfig
from pipeline.ray_runner._fleet import Work

logger = logging.getLogger(__name__)


class Backlog:
    """Shards in the order to start them; those that the limits forbid are put aside.

    Args:
        works: all shards of the run.
        runner: holds the limits.
    """

    def __init__(self, works: Iterable[Work], runner: RunnerConfig) -> None:
        self.runner = runner
        self.waiting = deque(works)
        self.aside: list[Work] = []
        self._num_begun, self._began_at = 0, time.monotonic()

    def take(self) -> Work:
        """Return the next shard, to be started now."""
        work = self.waiting.popleft()
        self._num_begun += not work.begun
        work.begun = True
        self.keep_limits()
        return work

    def keep_limits(self) -> None:
        """Put aside what this run may not start; what is in flight goes on to its end."""
        most, hours = self.runner.max_shards, self.runner.max_hours
        if hours is not None and time.monotonic() - self._began_at >= hours * 3600:
            self._put_aside(list(self.waiting), f"runner.max_hours={hours}")
        elif most is not None and self._num_begun >= most:
            # A shard that was begun is tried again: it counts already.
            fresh = [work for work in self.waiting if not work.begun]
            self._put_aside(fresh, f"runner.max_shards={most}")

    def close(self) -> None:
        """Put aside all that is left."""
        self.aside += self.waiting
        self.waiting.clear()

    def _put_aside(self, works: Sequence[Work], limit: str) -> None:
        if not works:
            return
        if not self.aside:
            logger.warning("%s: nothing more is started; the same command resumes", limit)
        self.aside += works
        aside = {id(work) for work in works}
        self.waiting = deque(work for work in self.waiting if id(work) not in aside)

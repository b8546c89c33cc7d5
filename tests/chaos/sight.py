"""What can be seen of runs at work, without asking them."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos import inspection
from tests.chaos.cluster import wait_for
from tests.chaos.raw import RawFolder

_POLL_S = 0.01
_GATE_S = 120.0  # then those actors begin that are there


class Sight:
    """Counts what has appeared in a cache since the phase began, and the actors at its gate.

    Args:
        cache: of the runs.
        todo: shards that no commit covers.
        gate: a folder for the actors to meet at.
    """

    def __init__(self, cache: RawFolder, todo: int, gate: Path) -> None:
        self._cache, self.todo, self.gate = cache, todo, gate
        self._took_s = 0.0
        self._before = {kind: self._see(kind) for kind in ("commits", "attempts")}
        gate.mkdir()

    def count(self, kind: str) -> int:
        """Return how many commits or attempts there are more than at first."""
        started = time.monotonic()
        seen = self._see(kind)
        self._took_s = time.monotonic() - started
        return len(seen - self._before[kind])

    def pause(self) -> None:
        """Wait before the next look, so that looking slows nobody down."""
        time.sleep(max(_POLL_S, 2 * self._took_s))

    @property
    def is_work_left(self) -> bool:
        """Tell whether actors have begun, and shards are not committed."""
        return (self.gate / "open").exists() and self.count("commits") < self.todo

    def loaded(self) -> set[int]:
        """Return the pids of all actors that have begun, the dead among them."""
        return {int(path.stem) for path in self.gate.glob("*.ready")}

    def let_begin(self, num_actors: Callable[[], int]) -> None:
        """Open the gate once as many actors are there as will come."""
        deadline = time.monotonic() + _GATE_S

        def is_time() -> bool:
            is_late = time.monotonic() > deadline and len(self.loaded()) > 0
            return is_late or len(self.loaded()) >= num_actors()

        wait_for(is_time, what="actors at the gate", seconds=900)
        (self.gate / "open").touch()

    def _see(self, kind: str) -> set[str]:
        if kind == "commits":
            return {path for path in self._cache.list("commits/") if path.endswith(".json")}
        return inspection.attempts(set(self._cache.list("data/")))

"""One fault, done to what is there."""

import signal
import time
from dataclasses import dataclass
from typing import Any

from tests.chaos.forge import Process
from tests.chaos.plan import Fault
from tests.chaos.sight import Sight
from tests.chaos.world import RUN_S, World

_AFTER_SIGTERM = {0, 75}


@dataclass
class Strike:
    """Does a fault; each kind is a method that tells what it hit.

    Such a method returns None if there was nothing to hit, else whether what it hit was at work.
    """

    world: World
    fault: Fault
    sight: Sight
    runs: list[Process]

    def strike(self) -> dict[str, Any]:
        """Return the kind of the fault, whether it hit something, and whether that was at work."""
        result = {"kind": self.fault.kind, "landed": False, "in_flight": False}
        if not any(run.is_alive for run in self.runs):
            return result
        was_at_work = self.sight.is_work_left
        hit = getattr(self, f"_{self.fault.kind}")()
        return {**result, "landed": hit is not None, "in_flight": bool(hit) and was_at_work}

    def _pick(self, several: list[Any]) -> Any:
        return several[int(self.fault.pick * len(several))] if several else None

    def _run(self) -> Process | None:
        return self._pick([run for run in self.runs if run.is_alive])

    def _kill_actor(self) -> bool | None:
        victim = self._pick(sorted(self.world.cluster.actors(), key=lambda actor: actor.pid))
        if victim is None:
            return None
        victim.kill()
        return victim.pid in self.sight.loaded()

    def _kill_driver(self) -> bool | None:
        run = self._run()
        return True if run is not None and run.send(signal.SIGKILL) else None

    def _stop_driver(self) -> bool | None:
        run = self._run()
        if run is None or not run.send(signal.SIGTERM):
            return None
        code = run.wait(RUN_S)
        # With all said and done, the signal may find a process that is about to end anyway.
        is_over = code == -signal.SIGTERM and "shards committed" in run.output
        assert is_over or code in _AFTER_SIGTERM, f"{run.name} ended with {code} after SIGTERM"
        return True

    def _kill_node(self) -> bool | None:
        self.world.cluster.wait_until_whole()
        pids = self.world.cluster.kill_second()
        time.sleep(self.fault.lasts_s)
        self.world.cluster.add_second()
        return bool(set(pids) & self.sight.loaded())

    def _refuse(self) -> bool:
        self.world.proxy.refuse()
        return self._last()

    def _black_hole(self) -> bool:
        self.world.proxy.black_hole()
        return self._last()

    def _slow_down(self) -> bool:
        self.world.proxy.answer_503(self.fault.times)
        return self._last()

    def _lose_replies(self) -> bool:
        self.world.proxy.swallow_replies(self.fault.times, method="PUT")
        return self._last()

    def _cut_requests(self) -> bool:
        self.world.proxy.reset_requests(self.fault.times, after_bytes=900, method="PUT")
        return self._last()

    def _kill_gateway(self) -> bool:
        gateway = self.world.gateway
        gateway.kill_gateway()
        time.sleep(self.fault.lasts_s)
        gateway.start_gateway()
        return True

    def _last(self) -> bool:
        """Let it last; return whether a request was harmed."""
        before = self.world.proxy.num_faults
        time.sleep(self.fault.lasts_s)
        self.world.proxy.heal()
        return self.world.proxy.num_faults > before

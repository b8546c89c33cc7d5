"""A Ray cluster of two nodes on this machine, one of which can be killed and replaced."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from ray.exceptions import RayError

from tests.chaos.forge import ENVIRONMENT
from tests.servers.process import ServerProcess, free_ports, listens

RAY = Path(sys.executable).parent / "ray"
START_S = 600.0
_CPUS = 2  # a node; of the books, not of the machine: two jobs find room at once
_PORTS = (20000 + os.getpid() % 4000, 100)  # workers: below those that free_ports() gives
# A killed node is noticed in 1.5 s: nobody answers at its port. One that is only slow has 6 s to
# answer each time. Workers that no actor may use (they lack its environment) are not started.
_SYSTEM = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 6000,
    "health_check_failure_threshold": 3,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
    # Ray makes workers yield to everybody else; on a busy machine they would hardly start.
    "worker_niceness": 0,
}


class TwoNodes:
    """Use it in a `with` block. The head stays; jobs connect to `address`.

    Args:
        environment: of the nodes and so of all actors.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._environment = {**ENVIRONMENT, **environment, "RAY_ADDRESS": ""}
        self._second: ServerProcess | None = None
        self._num_started = 0

    def __enter__(self) -> "TwoNodes":
        gcs, client = free_ports(2)
        self.address = f"127.0.0.1:{gcs}"
        self._head = self._start(
            *("--head", f"--port={gcs}", "--include-dashboard=false"),
            *(f"--ray-client-server-port={client}", f"--system-config={json.dumps(_SYSTEM)}"),
        )
        try:
            self._head.wait_until(lambda: listens(gcs), seconds=START_S)
            self._wait_for_nodes(1)
            self.add_second()
            self.wait_until_whole()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._second is not None:
            self.kill_second()
        _kill_all(self._head)

    def add_second(self) -> None:
        """Start a new second node; returns before it has joined."""
        assert self._second is None, "there is a second node"
        self._second = self._start(f"--address={self.address}")

    def kill_second(self) -> list[int]:
        """Kill the second node, workers included; return the pids of its actors."""
        assert self._second is not None, "there is no second node"
        pids = [actor.pid for actor in _actors(self._second)]
        _kill_all(self._second)
        self._second = None
        return pids

    def actors(self) -> list[psutil.Process]:
        """Return the processes of all actors that carve."""
        nodes = [self._head] if self._second is None else [self._head, self._second]
        return [actor for node in nodes for actor in _actors(node)]

    def wait_until_whole(self) -> None:
        """Return once both nodes are there and no other."""
        if self._second is None:
            self.add_second()
        self._wait_for_nodes(2)

    def wait_until_idle(self) -> None:
        """Return once no actor is left."""
        wait_for(lambda: not self.actors(), what="the end of all actors")

    def _start(self, *options: str) -> ServerProcess:
        agent, metrics = free_ports(2)
        first = _PORTS[0] + self._num_started % 40 * _PORTS[1]
        self._num_started += 1
        command = [
            *(str(RAY), "start", "--block", "--node-ip-address=127.0.0.1", *options),
            *(f"--num-cpus={_CPUS}", "--num-gpus=0", "--object-store-memory=100000000"),
            *(f"--temp-dir={self.folder}", "--disable-usage-stats", "--include-log-monitor=false"),
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
            *(f"--min-worker-port={first}", f"--max-worker-port={first + _PORTS[1] - 1}"),
        ]
        log = self.folder / f"node-{self._num_started}.log"
        return ServerProcess(command, log=log, environment=self._environment)

    def _wait_for_nodes(self, count: int) -> None:
        wait_for(lambda: self._num_alive() == count, what=f"{count} nodes")

    def _num_alive(self) -> int:
        from ray._raylet import GcsClient

        # It may not answer yet, or for a while where the machine is busy.
        with contextlib.suppress(RayError, RuntimeError, OSError):
            nodes = GcsClient(address=self.address).get_all_node_info(timeout=10)
            return sum(node.state == 0 for node in nodes.values())
        return 0


def wait_for(is_so: Callable[[], bool], *, what: str, seconds: float = START_S) -> None:
    """Wait for an event.

    Raises:
        AssertionError: it does not come.
    """
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def _family(node: ServerProcess) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(node.pid)
        return [root, *root.children(recursive=True)]
    return []


def _actors(node: ServerProcess) -> list[psutil.Process]:
    found = []
    for process in _family(node):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = process.cmdline()
            if title and title[0].startswith("ray::CarveActor"):
                found.append(process)
    return found


def _kill_all(node: ServerProcess) -> None:
    """Kill a node as if its power went: the raylet first, then whatever it started."""
    family = _family(node)
    for process in sorted(family, key=lambda p: _name(p) != "raylet"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=30)
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.stop()


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""

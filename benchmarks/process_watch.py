"""Watch the processes of a run from outside: memory at given commits, CPU time all along."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

_MEMORY_POLL_S = 0.05
_CPU_POLL_S = 1.0  # a look costs some milliseconds of CPU time itself


@contextmanager
def watch_commits(folder: Path, marks: Sequence[int]) -> Iterator[list[dict[str, int]]]:
    """Watch the commits of one actor while the block runs.

    Args:
        folder: where the commit records appear.
        marks: numbers of commits, rising; the actor must be alive after the last.

    Yields:
        A list that gets one reading per mark: `commits`, and `peak_bytes` and `resident_bytes` of
        the process that made them.
    """
    readings: list[dict[str, int]] = []

    def look() -> None:
        found = list(folder.glob("*.json"))
        if len(readings) < len(marks) and len(found) >= marks[len(readings)]:
            pid = json.loads(found[0].read_bytes())["details"]["pid"]
            readings.append({"commits": len(found), **_memory_of(pid)})

    with _repeating(look, _MEMORY_POLL_S):
        yield readings


def _memory_of(pid: int) -> dict[str, int]:
    """Return what a process holds now and held at most, in bytes. Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS")}
    return {"peak_bytes": kib["VmHWM"] << 10, "resident_bytes": kib["VmRSS"] << 10}


@dataclass(kw_only=True)
class CpuTime:
    """CPU seconds used since some start, at several moments."""

    moments: list[float] = field(default_factory=list)  # Unix time
    own: list[float] = field(default_factory=list)  # by this process and all below it
    machine: list[float] = field(default_factory=list)  # by all processes, or stolen by the host

    def between(self, since: float, until: float) -> tuple[float, float]:
        """Return the CPU seconds that were used between two moments: by us, and by others."""
        own, machine = (
            float(np.diff(np.interp([since, until], self.moments, totals))[0])
            for totals in (self.own, self.machine)
        )
        return own, max(0.0, machine - own)


@contextmanager
def watch_cpu() -> Iterator[CpuTime]:
    """Watch the CPU time of this process and all below it while the block runs."""
    found = CpuTime()
    used: dict[tuple[int, float], float] = {}  # a process that ends keeps its last reading
    root = psutil.Process()

    def look() -> None:
        for process in (root, *root.children(recursive=True)):
            try:
                times = process.cpu_times()
                used[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        found.moments.append(time.time())
        found.own.append(sum(used.values()))
        now = psutil.cpu_times()
        found.machine.append(now.user + now.nice + now.system + now.irq + now.softirq + now.steal)

    look()
    with _repeating(look, _CPU_POLL_S):
        yield found
    look()


@contextmanager
def _repeating(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call an action every so many seconds, in a thread of its own, while the block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def memory_of(process: psutil.Process) -> dict[str, int]:
    """Return what a process holds, in bytes; what it shares counts in part.

    `own_bytes` is memory that nothing else stands for: heap, and shared memory. `mapped_bytes` is
    pages of files, which the system takes back when it needs them. Linux only.
    """
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    return {
        "own_bytes": (kib["Pss_Anon"] + kib["Pss_Shmem"]) << 10,
        "mapped_bytes": kib["Pss_File"] << 10,
    }

"""Start Python scripts as processes of their own, forked from one that has imported everything.

Importing torch and Ray takes 3 s of a core, and a storm starts a dozen processes. Each forked
process runs one script as `python SCRIPT ARGS` would: it is the leader of a session of its own,
with its output in a file.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Threads of BLAS and OpenMP would not survive the fork.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Process:
    """One script at work."""

    def __init__(self, pid: int, log: Path, name: str) -> None:
        self.pid, self.log, self.name = pid, log, name
        self.code: int | None = None  # minus the signal that ended it
        self._over = threading.Event()

    def end(self, code: int) -> None:
        self.code = code
        self._over.set()

    @property
    def is_alive(self) -> bool:
        return not self._over.is_set()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Return the exit code.

        Raises:
            AssertionError: it is still at work after so many seconds; it is killed then.
        """
        if not self._over.wait(seconds):
            self.send(signal.SIGKILL)
            self._over.wait(30)
            raise AssertionError(f"{self.name} hung for {seconds} s: {self.output[-6000:]}")
        assert self.code is not None
        return self.code

    def send(self, number: int) -> bool:
        """Send a signal; return whether there still was a process."""
        if not self.is_alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


class Forge:
    """Use it in a `with` block; what is still at work at its end is killed.

    Args:
        folder: for the output of the scripts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[int, Process] = {}
        self._started: list[int] = []
        self._changed = threading.Condition()
        self._lock = threading.Lock()  # one request at a time
        self._count = 0

    def __enter__(self) -> "Forge":
        with open(self.folder / "forge.log", "w") as log:
            self._mother = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, name="forge")
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self._processes.values()):
            process.send(signal.SIGKILL)
        self._mother.stdin.close()
        self._mother.wait(60)
        self._listener.join()
        self._mother.stdout.close()

    def start(
        self, script: Path, *args: object, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Start a script; returns once it has a pid."""
        with self._lock:
            self._count += 1
            log = self.folder / f"{self._count:04d}-{script.stem}.log"
            request = {
                "script": str(script),
                "args": [str(arg) for arg in args],
                "environment": dict(environment or {}),
                "log": str(log),
            }
            self._mother.stdin.write(json.dumps(request) + "\n")
            self._mother.stdin.flush()
            with self._changed:
                assert self._changed.wait_for(lambda: self._started, timeout=600), "no fork"
                pid = self._started.pop()
                name = " ".join([script.name, *request["args"]])
                process = self._processes[pid] = Process(pid, log, name)
            return process

    def run(self, script: Path, *args: object, seconds: float = 900, **options: Any) -> Process:
        """Start a script and wait for its end."""
        process = self.start(script, *args, **options)
        process.wait(seconds)
        return process

    def _listen(self) -> None:
        for line in self._mother.stdout:
            pid, code = json.loads(line)
            with self._changed:
                if code is None:
                    self._started.append(pid)
                    self._changed.notify_all()
            if code is not None:
                self._ended(pid, code)

    def _ended(self, pid: int, code: int) -> None:
        with self._changed:
            # It may end before `start` has taken note of it.
            self._changed.wait_for(lambda: pid in self._processes, timeout=60)
            self._processes.pop(pid).end(code)


def _say(pid: int, code: int | None) -> None:
    os.write(1, (json.dumps([pid, code]) + "\n").encode())


def _next_request(pending: bytearray) -> dict[str, Any] | None:
    """Return a request, or None at the end of the input; report children that end meanwhile."""
    while True:
        line, newline, rest = pending.partition(b"\n")
        if newline:
            pending[:] = rest
            return json.loads(line)
        if select.select([0], [], [], 0.02)[0]:
            found = os.read(0, 1 << 16)
            if not found:
                return None
            pending += found
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _say(ended[0], os.waitstatus_to_exitcode(ended[1]))


def _serve() -> dict[str, Any] | None:
    """Fork for each request; return the request in the child, and None in the mother at the end."""
    pending = bytearray()
    children = []
    while (request := _next_request(pending)) is not None:
        pid = os.fork()
        if pid == 0:
            return request
        children.append(pid)
        _say(pid, None)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            if (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _say(ended[0], os.waitstatus_to_exitcode(ended[1]))
                continue
            time.sleep(0.02)
            continue
        break
    return None


def _become(request: Mapping[str, Any]) -> None:
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(request["environment"])
    sys.argv = [request["script"], *request["args"]]
    runpy.run_path(request["script"], run_name="__main__")


def _import_everything() -> None:
    import s3fs  # noqa: F401

    import pipeline.cli
    import pipeline.ray_runner  # noqa: F401


def main(arguments: Sequence[str] = ()) -> None:
    _import_everything()
    if (request := _serve()) is not None:
        _become(request)


if __name__ == "__main__":
    main()

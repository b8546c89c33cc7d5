"""Server processes of the tests: loopback only, free ports, stopped by their own pid."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

START_S = 90.0  # far more than any takes; a machine may be busy


class ServerError(Exception):
    """A server did not start, or died."""


class MissingServerError(ServerError):
    """A server's program is not installed on this machine."""


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def require_programs(names: Sequence[str], remedy: str) -> None:
    """Check that programs are on this machine.

    Raises:
        MissingServerError: names those that are not, and the remedy.
    """
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise MissingServerError(f"{', '.join(missing)} not found; {remedy}")


def run_to_end(command: Sequence[str]) -> None:
    """Run a command that ends by itself.

    Raises:
        ServerError: it failed.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    if done.returncode:
        raise ServerError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


class ServerProcess:
    """One process in the foreground, its output in a file."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        with open(log, "ab") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the tests; they stop their servers
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, is_ready: Callable[[], bool], *, seconds: float = START_S) -> None:
        """Return once the server is ready.

        Raises:
            ServerError: it died, or is not ready in time.
        """
        deadline = time.monotonic() + seconds
        while not is_ready():
            code = self._process.poll()
            if code is not None:
                raise ServerError(f"ended with {code}: {self._last_words()}")
            if time.monotonic() > deadline:
                raise ServerError(f"not ready after {seconds:.0f} s: {self._last_words()}")
            time.sleep(0.02)

    def send(self, signal_number: int) -> None:
        """Send a signal, for example `SIGSTOP`."""
        self._process.send_signal(signal_number)

    def stop(self, *, seconds: float = 10) -> None:
        """Ask it to end; kill it if it does not."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            return
        self.kill()

    def kill(self) -> None:
        """Kill it and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:] or "(said nothing)"


def listens(port: int) -> bool:
    """Tell whether somebody takes connections at a port of loopback."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False

"""Keep stderr free of anything but log lines, whoever writes there.

Ray's core and other C libraries print to file descriptor 2 without asking Python's logging.
"""

import fcntl
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline import run_log

logger = logging.getLogger(__name__)

_PIPE_BYTES = 1 << 20
_LAST_LINES_S = 1.0  # a child process may hold the pipe open for longer


@contextmanager
def json_stderr() -> Iterator[None]:
    """Turn every line that is written to stderr in a block into a line of the log.

    The log itself goes to where stderr went before. Lines are lost rather than waited for where
    the pipe is full: whoever writes them may hold the interpreter's lock, which reading takes.
    """
    sys.stderr.flush()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    before = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=_log_lines, args=(reader,), name="stderr", daemon=True)
    thread.start()
    with os.fdopen(os.dup(before), "w", buffering=1) as target:
        run_log.write_to(target)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)  # the last end of the pipe that this process could write to
            os.close(before)
            thread.join(_LAST_LINES_S)
            run_log.write_to(None)


def _log_lines(reader: int) -> None:
    with os.fdopen(reader, "rb") as pipe:
        for line in pipe:
            logger.info("%s", line.decode(errors="replace").rstrip())

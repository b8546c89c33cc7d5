"""A temporary local file that not even a killed process leaves behind."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from pipeline.errors import StorageError

DESCRIPTORS = "/proc/self/fd"


class Spool:
    """A file in the folder for temporary files, gone when it is closed.

    On Linux it never has a name: the kernel frees it when the process ends, however that
    happens. Elsewhere it has one until `close`, and a killed process leaves it.

    Attributes:
        path: opens the file, as often as wanted, in this process and until `close`.
    """

    def __init__(self) -> None:
        self._file: IO[bytes]
        if os.path.isdir(DESCRIPTORS):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (see `close`)
            self.path = f"{DESCRIPTORS}/{self._file.fileno()}"
        else:
            named = tempfile.NamedTemporaryFile(prefix="carvecache-")  # noqa: SIM115
            self._file, self.path = cast("IO[bytes]", named), named.name

    def close(self) -> None:
        """Free the file; again does nothing."""
        self._file.close()


@contextmanager
def local_errors(what: str, folder: str) -> Iterator[None]:
    """Turn errors of the local disk (full, say) into `StorageError`.

    Args:
        what: is being written.
        folder: that it goes through.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as err:
        reason = " ".join(str(err).split())
        raise StorageError(f"cannot write {what} by way of {folder}: {reason}") from err

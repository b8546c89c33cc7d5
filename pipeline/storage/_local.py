"""Writing local files so that no reader ever sees half of one."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

TEMPORARY_SUFFIX = ".carve-tmp"  # what a killed writer may leave behind


def etag(stat: os.stat_result) -> str:
    """Return what changes when a file's content does."""
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"


def find(path: str) -> list[str]:
    """Return the paths of all files below a folder, or of the one file, sorted."""
    if os.path.isfile(path):
        return [path]
    walked = os.walk(path, onerror=_raise, followlinks=True)
    return sorted(os.path.join(folder, name) for folder, _, names in walked for name in names)


def _raise(err: OSError) -> None:
    if not isinstance(err, FileNotFoundError):  # deleted meanwhile, or never there
        raise err


def write_once(path: str, data: bytes) -> None:
    """Create a whole file, atomically, if none is there.

    Raises:
        FileExistsError: there is one.
    """
    with _temporary(path, lambda file: _write(file, data)) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS may repeat a link whose answer was lost, and then refuse its own work.
            if not os.path.samefile(temporary, path):
                raise
    _sync_folder(path)


def write(path: str, data: bytes) -> None:
    """Create or replace a whole file, atomically."""
    with _temporary(path, lambda file: _write(file, data)) as temporary:
        os.replace(temporary, path)
    _sync_folder(path)


def copy(source: str, path: str) -> None:
    """Create or replace a file with the content of another, atomically."""

    def fill(file: BinaryIO) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file, 1 << 20)

    with _temporary(path, fill) as temporary:
        os.replace(temporary, path)
    _sync_folder(path)


@contextmanager
def _temporary(path: str, fill: Callable[[BinaryIO], None]) -> Iterator[str]:
    """Give a filled file beside `path` that is on disk, and remove it if it is still there."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

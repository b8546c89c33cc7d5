"""How many bytes all processes of a machine together keep in a folder, and what has to go."""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.storage._descriptors import Descriptor

LEDGER_BYTES = 20  # decimal digits of the total
UNFINISHED_SUFFIX = ".part"
_KEPT_SHARE = 0.9  # of the limit, after an eviction
_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{38}\.(block|part)")


class SharedBudget:
    """A limit to the bytes of a folder of blocks, over all processes that write there.

    The total stands in a file that is changed under a lock; so is the folder itself, by nobody but
    the methods here. The size of a file is counted, and given to it, before it is written. A
    process that is killed at any moment can leave the total too high, never too low; the next
    eviction counts anew.

    All methods raise `OSError` where the folder cannot be written.

    Args:
        folder: holds folders of two hex digits with the files; other files are left alone.
        max_bytes: of all files, unfinished ones and the total's own included.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def reserve(self, file: Descriptor, size: int) -> bool:
        """Set the size of an unfinished file, once what was not used for long has gone for it.

        Returns:
            False where there is no room even so, since others fill it at this moment.
        """
        with self._ledger() as ledger:
            more = max(0, size - os.fstat(file.number).st_size)
            total = self._total(ledger)
            if total + more > self.max_bytes:
                total = self._evict(int(self.max_bytes * _KEPT_SHARE) - more)
            if total + more > self.max_bytes:
                _write_total(ledger, total)
                return False
            _write_total(ledger, total + more)
            try:
                os.ftruncate(file.number, size)
            except OSError:
                _write_total(ledger, total)
                raise
            return True

    def publish(self, unfinished: str, path: str) -> None:
        """Give a file that is whole its name."""
        with self._ledger():  # or one who counts meanwhile might see neither name
            os.replace(unfinished, path)

    def remove(self, file: Descriptor, path: str) -> None:
        """Delete a file, unless another one has its path by now."""
        with self._ledger() as ledger:
            if file.is_at(path):
                total = self._total(ledger)
                os.unlink(path)
                _write_total(ledger, total - os.fstat(file.number).st_size)

    @contextmanager
    def _ledger(self) -> Iterator[Descriptor]:
        ledger = Descriptor(os.path.join(self.folder, "total"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(ledger.number, fcntl.LOCK_EX)
            yield ledger
        finally:
            # To close it is not enough: a child forked meanwhile has a copy.
            fcntl.flock(ledger.number, fcntl.LOCK_UN)

    def _total(self, ledger: Descriptor) -> int:
        digits = os.pread(ledger.number, LEDGER_BYTES + 1, 0)
        if len(digits) == LEDGER_BYTES and digits.isdigit():
            return int(digits)
        os.ftruncate(ledger.number, 0)
        return _sum(self._files())

    def _evict(self, goal: int) -> int:
        """Delete abandoned files, then finished ones, the one used last at the end.

        Args:
            goal: bytes that may stay.

        Returns:
            Bytes that did.
        """
        files = [file for file in self._files() if not _remove_if_abandoned(file.path)]
        total = _sum(files)
        for file in sorted(files):
            if total <= goal:
                break
            if not file.path.endswith(UNFINISHED_SUFFIX):
                os.unlink(file.path)
                total -= file.size
        return total

    def _files(self) -> Iterator["_File"]:
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if _FOLDER.fullmatch(folder.name) and folder.is_dir():
                    yield from _files_in(folder.path)


class _File(NamedTuple):
    used: int  # ns
    path: str
    size: int


def _files_in(folder: str) -> Iterator[_File]:
    with os.scandir(folder) as files:
        for file in files:
            if _FILE.fullmatch(file.name):
                stat = file.stat()
                yield _File(stat.st_mtime_ns, file.path, stat.st_size)


def _sum(files: Iterable[_File]) -> int:
    return LEDGER_BYTES + sum(file.size for file in files)


def _remove_if_abandoned(path: str) -> bool:
    """Delete an unfinished file whose writer is no more; return whether it was one."""
    if not path.endswith(UNFINISHED_SUFFIX):
        return False
    file = Descriptor(path, os.O_RDWR)
    try:
        fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.unlink(path)
    fcntl.flock(file.number, fcntl.LOCK_UN)
    return True


def _write_total(ledger: Descriptor, total: int) -> None:
    os.pwrite(ledger.number, b"%0*d" % (LEDGER_BYTES, total), 0)

"""Blocks of remote objects, a file each, in a local folder that several processes share.

<folder>/<2 hex digits>/<38 hex digits>.block   content and trailer; whole, or damaged by a crash
<folder>/<2 hex digits>/<38 hex digits>.part    being written; whoever writes it holds its lock
<folder>/total                                  bytes of all of them

A part that nobody has locked is what a killed process left: the next one to want the block writes
it anew, and an eviction deletes it.
"""

import fcntl
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

from fastcrc import crc32

from pipeline.storage._descriptors import Descriptor
from pipeline.storage._recently_used import RecentlyUsed
from pipeline.storage._shared_budget import UNFINISHED_SUFFIX, SharedBudget
from pipeline.storage._views import cut

_TRAILER = struct.Struct("<8sQQI")  # magic, bytes of content, bytes of the object, CRC-32C
_MAGIC = b"carveblk"
TRAILER_BYTES = _TRAILER.size
_PIECE_BYTES = 1 << 20
_TOUCH_S = 60.0
_MOST_KNOWN = 1 << 16  # some 200 bytes each


class _Known:
    """What a process knows of a block that it has checked."""

    __slots__ = ("inode", "object_size", "touched")

    def __init__(self, inode: int, object_size: int) -> None:
        self.inode = inode
        self.object_size = object_size
        self.touched = -_TOUCH_S


class Block:
    """One block, open; it can be read even once it was evicted.

    Attributes:
        file: content and trailer.
        length: bytes of content.
        object_size: bytes of the object it is a part of; -1 if it is damaged.
        is_whole: whether its content is what was written.
    """

    __slots__ = ("_known", "file", "is_whole", "length")

    def __init__(self, file: Descriptor, length: int, known: _Known | None) -> None:
        self.file = file
        self.length = length
        self.is_whole = known is not None
        self._known = known or _Known(-1, -1)

    @property
    def object_size(self) -> int:
        return self._known.object_size

    def touch(self) -> None:
        """Count as used now, at most once a minute in each process."""
        now = time.monotonic()
        if now - self._known.touched >= _TOUCH_S:
            self._known.touched = now
            with suppress(OSError):  # of another user: then others keep it young, or nobody does
                os.utime(self.file.number)


class Claim:
    """The right to write one block, until it is released or the process ends."""

    __slots__ = ("file", "name", "path")

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self.file = Descriptor(path, os.O_RDWR | os.O_CREAT)

    def try_lock(self) -> bool:
        try:
            fcntl.flock(self.file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return self.file.is_at(self.path)

    def unlock(self) -> None:
        # To close it is not enough: a child forked meanwhile has a copy.
        fcntl.flock(self.file.number, fcntl.LOCK_UN)


class BlockFolder:
    """The files of a `DiskCache`. Safe to use from many threads and processes.

    All methods raise `OSError` where the folder cannot be used.

    Args:
        folder: need not exist yet.
        max_bytes: that it may hold.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder = folder
        self._budget = SharedBudget(folder, max_bytes)
        self._known: RecentlyUsed[str, _Known] = RecentlyUsed(_MOST_KNOWN)

    def open(self, name: str) -> Block | None:
        """Return a block, or None if it is not kept.

        Its checksum is compared when this process first opens it.
        """
        try:
            file = Descriptor(self.path(name))
        except FileNotFoundError:
            return None
        stat = os.fstat(file.number)
        known = self._known.get(name)
        if known is None or known.inode != stat.st_ino:
            known = _check(file, stat)
            if known is not None:
                self._known.put(name, known)
        return Block(file, stat.st_size - TRAILER_BYTES, known)

    def remove(self, name: str, block: Block) -> None:
        """Delete a damaged block, unless another process has replaced it."""
        self._known.forget(name)
        self._budget.remove(block.file, self.path(name))

    def try_claim(self, name: str) -> Claim | None:
        """Return the right to write a block, or None if it is kept or written by now."""
        unfinished = self.path(name, UNFINISHED_SUFFIX)
        try:
            claim = Claim(name, unfinished)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(unfinished), exist_ok=True)
            claim = Claim(name, unfinished)
        is_needed = False
        try:
            is_locked = claim.try_lock()
            is_needed = is_locked and not os.path.exists(self.path(name))
            if is_locked and not is_needed:
                self.release(claim)
        finally:
            if not is_needed:
                claim.unlock()
        return claim if is_needed else None

    def wait(self, name: str) -> None:
        """Wait until the one that writes a block has finished, failed, or died."""
        try:
            file = Descriptor(self.path(name, UNFINISHED_SUFFIX))
        except FileNotFoundError:
            return
        fcntl.flock(file.number, fcntl.LOCK_SH)
        fcntl.flock(file.number, fcntl.LOCK_UN)

    def keep(self, claim: Claim, content: memoryview, object_size: int) -> None:
        """Write a claimed block, if there is room.

        It is not synced: what a power failure garbles does not fit its checksum.
        """
        if not self._budget.reserve(claim.file, len(content) + TRAILER_BYTES):
            return
        trailer = _TRAILER.pack(_MAGIC, len(content), object_size, _crc32c(content))
        left: Sequence[memoryview] = [content, memoryview(trailer)]
        offset = 0
        while left:
            written = os.pwritev(claim.file.number, left, offset)
            offset, left = offset + written, cut(left, written)[1]
        self._budget.publish(claim.path, self.path(claim.name))
        self._known.put(claim.name, _Known(os.fstat(claim.file.number).st_ino, object_size))

    def release(self, claim: Claim) -> None:
        """Give up a claim, and delete what was written of a block that is not whole."""
        try:
            if claim.file.is_at(claim.path):
                self._budget.remove(claim.file, claim.path)
        finally:
            claim.unlock()

    def path(self, name: str, suffix: str = ".block") -> str:
        return os.path.join(self.folder, name[:2], name[2:] + suffix)


def _check(file: Descriptor, stat: os.stat_result) -> _Known | None:
    """Return what is known of a block if it is whole."""
    length = stat.st_size - TRAILER_BYTES
    if length < 0:
        return None
    try:
        magic, known_length, object_size, crc = _TRAILER.unpack(
            os.pread(file.number, TRAILER_BYTES, length)
        )
        is_whole = (magic, known_length) == (_MAGIC, length) and _crc32c_of(file, length) == crc
    except (OSError, struct.error):  # a sector that cannot be read, or a file cut short just now
        return None
    return _Known(stat.st_ino, object_size) if is_whole else None


def _crc32c(content: memoryview) -> int:
    crc = 0
    for start in range(0, len(content), _PIECE_BYTES):
        crc = crc32.iscsi(content[start : start + _PIECE_BYTES], crc)
    return int(crc)


def _crc32c_of(file: Descriptor, length: int) -> int:
    crc = 0
    for start in range(0, length, _PIECE_BYTES):
        piece = os.pread(file.number, min(_PIECE_BYTES, length - start), start)
        crc = crc32.iscsi(piece, crc)
    return int(crc)

"""Memory to read into, used again: fresh pages cost several times what reading into them does."""

import mmap
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from pipeline.fork_lock import ForkLock

_PAGE = 2 << 20  # bytes of a huge page on x86-64 and, as a rule, on ARM


class BufferPool:
    """Gives out arrays of bytes; one comes back when nothing refers to it any more.

    So whoever holds an array, or a view or tensor of one, holds it for good. Safe to use from many
    threads. What is free stays mapped, at most as much as was in use at once. An array of less than
    half a huge page is none of the pool's: it would take a whole one.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        # Arrays may die at any time, in the middle of `take` too: no lock there, only a queue.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = ForkLock()

    def __reduce__(self) -> tuple[type["BufferPool"], tuple[()]]:
        """Travel to another process without memory."""
        return BufferPool, ()

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return (num_bytes,) of no particular content."""
        if num_bytes < _PAGE // 2:
            return np.empty(num_bytes, np.uint8)
        region = self._region(num_bytes)
        array = np.frombuffer(region, np.uint8)
        # Views and tensors of the array refer to it, since what it stands on is no array.
        weakref.finalize(array, self._returned.append, region).atexit = False
        return array[:num_bytes]

    def _region(self, num_bytes: int) -> mmap.mmap:
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            fits = [r for r in self._free if num_bytes <= len(r) <= 2 * num_bytes + _PAGE]
            if fits:
                best = min(fits, key=len)
                self._free.remove(best)
                return best
            if self._free:  # of sizes that are not asked for any more
                self._free.pop(0)
        size = -(-num_bytes // _PAGE) * _PAGE
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        return region

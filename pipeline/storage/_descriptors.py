"""Local files that stay open between reads."""

import os

from pipeline.storage._recently_used import RecentlyUsed

_MOST_OPEN = 64


class Descriptor:
    """An open file, closed when nobody refers to it any more.

    So one that a cache forgets stays open under the thread that reads it.

    Args:
        path: of the file.
        flags: as `os.open` takes them.
        mode: of a file that is created.

    Raises:
        OSError: it cannot be opened.
    """

    __slots__ = ("number",)

    def __init__(self, path: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> None:
        self.number = -1
        self.number = os.open(path, flags | os.O_CLOEXEC, mode)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def is_at(self, path: str) -> bool:
        """Tell whether this is the file that now has this path."""
        try:
            there = os.stat(path)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self.number), there)


class Descriptors:
    """Opens files for reading and keeps the 64 used last open, in each process its own.

    A descriptor is used by `os.pread` only, so threads and forks may share it.
    """

    def __init__(self) -> None:
        self._kept: RecentlyUsed[str, Descriptor] = RecentlyUsed(_MOST_OPEN)

    def open(self, path: str) -> Descriptor:
        """Return the file that has this path now, be it another one than the last time.

        Raises:
            OSError: it cannot be opened.
        """
        kept = self._kept.get(path)
        if kept is not None:
            if kept.is_at(path):
                return kept
            self._kept.forget(path)
        opened = Descriptor(path)
        self._kept.put(path, opened)
        return opened

"""A store whose immutable objects are read through a disk cache."""

import io
from collections.abc import Callable, Sequence
from typing import BinaryIO

from pipeline.storage._disk_cache import DiskCache
from pipeline.storage._range_reader import RangeReader
from pipeline.storage._store import BUFFER_BYTES, Span, Store, open_store


def open_cached_store(
    url: str, disk_cache: DiskCache, *, is_immutable: Callable[[str], bool]
) -> Store:
    """Name a folder on a store, as `open_store` does, and keep what is read of it on a local disk.

    Args:
        url: a local store is returned as it is: it is on a disk already.
        disk_cache: where blocks are kept.
        is_immutable: tells of a path whether what is once there stays there unchanged until it is
            deleted, and nothing else ever has this path. A function that can be pickled.

    Raises:
        ConfigError: as of `open_store`.
    """
    plain = open_store(url)
    if plain.local_path("") is not None:
        return plain
    return CachedStore(plain.url, disk_cache, is_immutable)


class CachedStore(Store):
    """Reads immutable objects through a disk cache, everything else from the store itself.

    An immutable object that is deleted may be seen for longer, by those who read it before.

    Args:
        url: as `checked_url` returns it, of a remote store.
        disk_cache: where blocks are kept.
        is_immutable: as of `open_cached_store`.
    """

    def __init__(
        self, url: str, disk_cache: DiskCache, is_immutable: Callable[[str], bool]
    ) -> None:
        super().__init__(url)
        self.disk_cache = disk_cache
        self.is_immutable = is_immutable
        self._plain = Store(url)

    def __repr__(self) -> str:
        return f"CachedStore({self.url!r}, {self.disk_cache!r})"

    def read(self, path: str, *, most: int | None = None) -> bytes:
        """Return a whole object."""
        if not self.is_immutable(path):
            return super().read(path, most=most)
        size = self.size(path)
        return self.read_range(path, 0, size if most is None else min(size, most))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset` on; fewer are an error."""
        if not self.is_immutable(path):
            return super().read_range(path, offset, length)
        return self.disk_cache.read_range(self._plain, path, offset, length)

    def read_spans(self, path: str, spans: Sequence[Span]) -> None:
        """Fill views from several places of one object."""
        if not self.is_immutable(path):
            super().read_spans(path, spans)
            return
        for offset, views in spans:
            self.disk_cache.read_into(self._plain, path, offset, views)

    def size(self, path: str) -> int:
        """Return an object's size in bytes."""
        if not self.is_immutable(path):
            return super().size(path)
        return self.disk_cache.size(self._plain, path)

    def open_read(self, path: str, *, size: int | None = None) -> BinaryIO:
        """Open an object for reading from any place in it."""
        if not self.is_immutable(path):
            return super().open_read(path, size=size)
        return io.BufferedReader(RangeReader(self, path, size), BUFFER_BYTES)

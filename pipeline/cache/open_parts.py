"""Parts kept open between reads, few of them, each used by one thread at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.parquet as pq

from pipeline.storage import Store

_MAX_IDLE = 16


class OpenParts:
    """Opens the parts of a cache and keeps the 16 used last, so that their footers are read once.

    A part in use is taken out of those kept; so none is closed under its user, and two threads
    that read one part at once get a file each.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._idle: list[tuple[str, pq.ParquetFile]] = []  # the one used last at the end
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["OpenParts"], tuple[Store]]:
        """Travel to another process without open files."""
        return OpenParts, (self.store,)

    @contextmanager
    def use(self, path: str) -> Iterator[pq.ParquetFile]:
        """Give an open part for the block.

        Raises:
            FileNotFoundError: there is no such part.
        """
        part = self._take(path) or self._open(path)
        try:
            yield part
        finally:
            for unused in self._put_back(path, part):
                unused.close(force=True)

    def _open(self, path: str) -> pq.ParquetFile:
        local = self.store.local_path(path)
        source = local if local is not None else self.store.open_read(path)
        return pq.ParquetFile(source, memory_map=local is not None)

    def _take(self, path: str) -> pq.ParquetFile | None:
        with self._lock:
            for number, (known, part) in enumerate(self._idle):
                if known == path:
                    del self._idle[number]
                    return part
        return None

    def _put_back(self, path: str, part: pq.ParquetFile) -> list[pq.ParquetFile]:
        """Keep a part; return those to be closed for it."""
        with self._lock:
            self._idle.append((path, part))
            unused = self._idle[:-_MAX_IDLE]
            del self._idle[:-_MAX_IDLE]
        return [part for _, part in unused]

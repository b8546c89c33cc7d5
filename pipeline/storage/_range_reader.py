"""An object as a file that can be read from any place."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.storage._store import Store


class RangeReader(io.RawIOBase):
    """Reads an object by ranges, so that a retry can neither skip nor repeat a byte."""

    def __init__(self, store: Store, path: str, size: int | None = None) -> None:
        self._store, self._path = store, path
        self._size, self._position = store.size(path) if size is None else size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset} in {self._store.url_of(self._path)}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._position))
        buffer[:length] = self._store.read_range(self._path, self._position, length)
        self._position += length
        return length

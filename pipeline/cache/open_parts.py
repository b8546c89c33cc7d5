"""Parts and tables kept open between reads, few of them, each used by one thread at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import parquet
from pipeline.errors import CacheFormatError, NotFoundError, StorageError
from pipeline.fork_lock import ForkLock
from pipeline.storage import Store

_MAX_IDLE = 16
_TAIL_BYTES = 64 << 10  # holds most footers whole


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """What a snapshot says of a part or table; None where it does not."""

    size: int | None = None
    footer_crc32c: int | None = None
    columns: Sequence[pa.Field] | None = None  # that it must have; None for those of a part


@dataclass(frozen=True, kw_only=True, slots=True)
class _Footer:
    metadata: pq.FileMetaData
    size: int  # of the file, in bytes
    whole: bytes | None  # the file, where it is small


class OpenParts:
    """Opens the parts of a cache and keeps the 16 used last, so that their footers are read once.

    A part in use is taken out of those kept; so none is closed under its user, and two threads
    that read one part at once get a file each, of one footer.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._idle: list[tuple[str, pq.ParquetFile]] = []  # the one used last at the end
        self._footers: OrderedDict[tuple[str, int | None, int | None], _Footer] = OrderedDict()
        self._lock = ForkLock()

    def __reduce__(self) -> tuple[type["OpenParts"], tuple[Store]]:
        """Travel to another process without open files."""
        return OpenParts, (self.store,)

    @contextmanager
    def use(self, path: str, record: PartRecord) -> Iterator[pq.ParquetFile]:
        """Give an open part for the block.

        Args:
            path: of the part.
            record: what it must be like.

        Raises:
            NotFoundError: there is no such part.
            CacheFormatError: it is damaged, or another file than the one recorded.
        """
        part = self._take(path) or self._open(path, record)
        try:
            yield part
        finally:
            for unused in self._put_back(path, part):
                unused.close(force=True)

    def _open(self, path: str, record: PartRecord) -> pq.ParquetFile:
        where = self.store.url_of(path)
        known = (path, record.size, record.footer_crc32c)
        with self._lock:
            footer = self._footers.get(known)
        if footer is None:
            footer = self._read_footer(path, record)
        with self._lock:
            self._footers[known] = footer
            self._footers.move_to_end(known)
            while len(self._footers) > _MAX_IDLE:
                self._footers.popitem(last=False)
        return parquet.open_part(
            self._source(path, footer), footer.metadata, where=where, columns=record.columns
        )

    def _read_footer(self, path: str, record: PartRecord) -> _Footer:
        where = self.store.url_of(path)
        try:
            size, tail = self._tail(path, record.size)
            footer = self._footer(path, size, tail)
            _check_footer(footer, record, where)
        except NotFoundError:
            raise
        except (StorageError, CacheFormatError) as err:
            self._check_size(path, record.size, err)
            raise
        metadata = parquet.parse_footer(footer, where=where)
        return _Footer(metadata=metadata, size=size, whole=tail if len(tail) == size else None)

    def _tail(self, path: str, known: int | None) -> tuple[int, bytes]:
        """Return the size of a file, which a record says or the store, and its last bytes."""
        size = self.store.size(path) if known is None else known
        length = min(size, _TAIL_BYTES)
        return size, self.store.read_range(path, size - length, length)

    def _check_size(self, path: str, known: int | None, error: Exception) -> None:
        """Raise the error that says so if a file has another size than was recorded."""
        if known is not None and (size := self.store.size(path)) != known:
            raise CacheFormatError(
                f"{self.store.url_of(path)} has {size} bytes, not the {known} that were written"
            ) from error

    def _source(self, path: str, footer: _Footer) -> Any:  # noqa: ANN401  (a file)
        """Return what is read: not mapped, for a mapped file that is cut kills who reads it."""
        if footer.whole is not None:
            return pa.BufferReader(footer.whole)
        local = self.store.local_path(path)
        return self.store.open_read(path, size=footer.size) if local is None else pa.OSFile(local)

    def _footer(self, path: str, size: int, tail: bytes) -> bytes:
        where = self.store.url_of(path)
        footer = parquet.footer_of(tail, where=where)
        if isinstance(footer, int):
            if footer > size:
                raise CacheFormatError(f"{where} is damaged: its footer is longer than the file")
            footer = self.store.read_range(path, size - footer, footer)
        return footer

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


def _check_footer(footer: bytes, record: PartRecord, where: str) -> None:
    if record.footer_crc32c not in (None, parquet.footer_checksum(footer)):
        raise CacheFormatError(
            f"{where}: its footer does not match its checksum; the file is damaged or another"
        )

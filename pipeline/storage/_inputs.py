"""Reading objects of other people, by full URL: the input shards."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from fsspec.core import has_magic

from pipeline.errors import NotFoundError, StorageError
from pipeline.storage._backend import Backend, checked_url
from pipeline.storage._retry import BrokenAnswerError, with_retries
from pipeline.types import ShardRef

CHUNK_BYTES = 8 * 2**20
CHUNKS_AHEAD = 2  # a stream holds at most CHUNKS_AHEAD + 1 chunks


def stat_input(url: str) -> ShardRef:
    """Return an object's size and etag.

    Raises:
        NotFoundError: it does not exist, or is a folder.
        StorageError: the store fails, or does not tell the size.
        ConfigError: no such kind of store.
    """
    return _stat(Backend(checked_url(url)))


def find_inputs(url: str, *, suffix: str) -> list[ShardRef]:
    """Return one object, the matches of a glob pattern, or what a folder holds, sorted by URL.

    Args:
        url: of an object, a folder, or with `*`, `**`, `?` or `[...]` in it.
        suffix: how the names of a folder's objects must end to be returned.

    Raises:
        NotFoundError: there is neither an object nor a folder (a pattern may match nothing).
        StorageError: the store fails.
        ConfigError: no such kind of store.
    """
    backend = Backend(checked_url(url))
    if _is_pattern(backend):
        infos = with_retries("list", url, lambda: backend.fs.glob(backend.path, detail=True))
        return _refs(backend, infos)
    info = with_retries("stat", url, lambda: backend.fs.info(backend.path))
    if info["type"] != "directory":
        return [_stat(backend)]
    if backend.is_local:  # what the driver says of a file is not needed, and takes 1 kB
        names = with_retries("list", url, lambda: backend.fs.ls(backend.path, detail=False))
        unknown: dict[str, object] = {"type": "other"}
        return _refs(backend, {name: unknown for name in names if name.endswith(suffix)})
    listed = with_retries("list", url, lambda: backend.fs.ls(backend.path, detail=True))
    return _refs(backend, {i["name"]: i for i in listed if i["name"].endswith(suffix)})


def read_input(url: str) -> bytes:
    """Return a whole (small) object.

    Raises:
        NotFoundError: it does not exist.
        StorageError: the store fails.
        ConfigError: no such kind of store.
    """
    backend = Backend(checked_url(url))
    return with_retries("read", url, lambda: bytes(backend.fs.cat_file(backend.path)))


def open_input(shard: ShardRef) -> InputStream:
    """Open an object as a listing showed it.

    Raises:
        NotFoundError: it is gone.
        StorageError: it is not the one listed any more, or the store fails.
    """
    return InputStream(shard)


class InputStream:
    """One object, front to back; use it in a `with` block. Not for several threads.

    Remote objects are fetched ahead in chunks by range, so a retry can neither skip nor repeat a
    byte. What is read is what was listed: fewer bytes, or an object that was replaced meanwhile,
    raise `StorageError`.

    Attributes:
        shard: what is read.
        position: bytes read so far.
    """

    def __init__(self, shard: ShardRef) -> None:
        self.shard = shard
        self.position = 0
        self._backend = Backend(checked_url(shard.url))
        self._check_unchanged("since it was listed")
        self._chunk, self._used, self._next_offset = b"", 0, 0
        self._ahead: deque[Future[bytes]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._descriptor: int | None = None
        if self._backend.is_local:
            path = self._backend.path
            self._descriptor = with_retries(
                "read", shard.url, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            )
        elif not self._backend.is_memory:
            self._pool = ThreadPoolExecutor(CHUNKS_AHEAD, thread_name_prefix="read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; waits for requests under way."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def read(self, length: int) -> bytes:
        """Return the next `length` bytes; fewer only at the end of the object.

        Raises:
            StorageError: the store fails, gives fewer bytes than it listed, or (at the end) the
                object was replaced while it was read.
        """
        wanted = min(length, self.shard.size - self.position)
        data = self._chunk[self._used : self._used + wanted]
        self._used += len(data)
        if len(data) < wanted:
            data = self._read_on(data, wanted)
        self.position += wanted
        if wanted and self.position == self.shard.size:
            self._check_unchanged("while it was read")
        return data

    def _read_on(self, data: bytes, wanted: int) -> bytes:
        parts, missing = [data], wanted - len(data)
        while missing:
            self._chunk = self._next_chunk()
            self._used = min(missing, len(self._chunk))
            parts.append(self._chunk[: self._used])
            missing -= self._used
        return b"".join(parts)

    def _next_chunk(self) -> bytes:
        if self._pool is None:
            chunk = self._fetch(self._next_offset)
            self._next_offset += len(chunk)
            return chunk
        while len(self._ahead) < CHUNKS_AHEAD and self._next_offset < self.shard.size:
            self._ahead.append(self._pool.submit(self._fetch, self._next_offset))
            self._next_offset += CHUNK_BYTES
        # Taken out only once it is there: after an error the next call must not skip it.
        chunk = self._ahead[0].result()
        self._ahead.popleft()
        return chunk

    def _fetch(self, offset: int) -> bytes:
        length = min(CHUNK_BYTES, self.shard.size - offset)

        def fetch() -> bytes:
            if self._descriptor is not None:
                data = os.pread(self._descriptor, length, offset)
            else:
                data = self._backend.read_range(self._backend.path, offset, length)
            if len(data) != length:
                message = f"asked for {length} bytes at {offset}, got {len(data)}"
                if self._pool is None:  # no network that may have lost the rest
                    raise StorageError(f"cannot read {self.shard.url}: {message}")
                raise BrokenAnswerError(message)
            return data

        return with_retries("read", self.shard.url, fetch)

    def _check_unchanged(self, when: str) -> None:
        now = _stat(self._backend)
        if (now.size, now.etag) != (self.shard.size, self.shard.etag):
            raise StorageError(
                f"{self.shard.url} changed {when} (was {self.shard.size} bytes, etag "
                f"{self.shard.etag!r}; is {now.size} bytes, etag {now.etag!r}); plan it again"
            )


def _stat(backend: Backend) -> ShardRef:
    def stat() -> ShardRef:
        info = backend.fs.info(backend.path)
        if info["type"] == "directory":
            raise NotFoundError(f"{backend.url} is a folder, not an object")
        if info["size"] is None:
            raise StorageError(f"{backend.url}: the server does not tell its size")
        return ShardRef(url=backend.url, size=info["size"], etag=backend.etag(backend.path, info))

    return with_retries("stat", backend.url, stat)


def _is_pattern(backend: Backend) -> bool:
    if backend.is_local and os.path.exists(backend.path):
        return False  # a file may be named so
    is_http = backend.url.startswith(("http://", "https://"))  # where `?` begins a query
    return has_magic(backend.url.replace("?", "") if is_http else backend.url)


def _refs(backend: Backend, infos: dict[str, dict[str, object]]) -> list[ShardRef]:
    refs = []
    for path, info in infos.items():
        if info["type"] == "directory" or (backend.is_local and not os.path.isfile(path)):
            continue
        size = os.stat(path).st_size if backend.is_local else info["size"]
        etag = backend.etag(path, info)
        refs.append(ShardRef(url=backend.url_of(path), size=int(size), etag=etag))  # type: ignore[call-overload]
    return sorted(refs, key=lambda ref: ref.url)

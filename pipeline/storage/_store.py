"""A folder on a store."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from pipeline.errors import AlreadyExistsError, NotFoundError, StorageError
from pipeline.fork_lock import ForkLock
from pipeline.storage import _local
from pipeline.storage._backend import Backend, checked_url, modified
from pipeline.storage._descriptors import Descriptors
from pipeline.storage._driver import send
from pipeline.storage._range_reader import RangeReader
from pipeline.storage._retry import (
    BrokenAnswerError,
    is_transient,
    store_errors,
    with_retries,
)
from pipeline.storage._views import fill, flat, num_bytes, scatter
from pipeline.storage._writable import check_writable

T = TypeVar("T")
Span = tuple[int, Sequence[memoryview]]

ONCE_BYTES = 32 * 2**20  # every driver sends so much in one request
UPLOAD_CHUNK_BYTES = 16 * 2**20  # s3fs holds up to ten of these while it uploads a file
BUFFER_BYTES = 256 * 1024
_memory_lock = ForkLock()


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    path: str  # relative to the store
    size: int  # bytes
    etag: str  # changes when the content does; "" where the store gives none
    modified: float | None  # Unix time by the store's clock; None where it does not say

    @property
    def is_temporary(self) -> bool:
        """Tell what a writer had not finished."""
        return self.path.endswith(_local.TEMPORARY_SUFFIX)


def open_store(url: str) -> Store:
    """Name a folder on a store, which need not exist yet. Opens no connection.

    Args:
        url: a local path, or for example `s3://bucket/prefix`, `gs://...`, `memory://x`.

    Raises:
        ConfigError: the driver is not installed, the kind of store is unknown, or the URL
            carries credentials.
    """
    return Store(checked_url(url))


class Store:
    """A folder on a store; made by `open_store`. Picklable, safe to use from many threads.

    Paths are relative, with `/` between their parts. All methods raise `StorageError`, after the
    retries, when the store fails; `NotFoundError` when what is to be read does not exist.

    Args:
        url: as `checked_url` returns it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._backend = Backend(url)
        self._descriptors = Descriptors()

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def url_of(self, path: str) -> str:
        """Return the full URL of a path."""
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    def read(self, path: str, *, most: int | None = None) -> bytes:
        """Return a whole object, by one request.

        Args:
            path: of the object.
            most: return no more than so many bytes of it; None for all.
        """
        full = self._full(path)

        def read() -> bytes:
            reader = self._backend.s3_reader
            found = None if reader is None else reader.read(full, most)
            if found is not None:
                return found
            fs = self._backend.fs
            if self._backend.is_s3:  # s3fs asks for the size first, unless told where to begin
                try:
                    return bytes(fs.cat_file(full, start=0, end=most))
                except OSError as err:
                    if err.errno != errno.EINVAL:  # an empty object has no first byte
                        raise
                return bytes(fs.cat_file(full))[:most]
            return bytes(fs.cat_file(full, start=None if most is None else 0, end=most))

        return self._try("read", path, read)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset` on; fewer are an error."""
        self._check_range(path, offset, length)
        if not length:
            return b""
        return self._try("read", path, lambda: self._range(path, offset, length))

    def _check_range(self, path: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise StorageError(f"cannot read {length} bytes at {offset} of {self.url_of(path)}")

    def _range(self, path: str, offset: int, length: int) -> bytes:
        full = self._full(path)
        data = self._backend.read_range(full, offset, length)
        if len(data) != length:
            message = f"asked for {length} bytes at {offset}, got {len(data)}"
            size = self._backend.fs.info(full)["size"]
            if offset + length > size or self._backend.is_local or self._backend.is_memory:
                raise StorageError(f"cannot read {self.url_of(path)} ({size} bytes): {message}")
            raise BrokenAnswerError(message)
        return data

    def read_into(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        """Fill writable, contiguous views one after the other with the bytes from `offset` on.

        Fewer bytes are an error; what the views hold after one is undefined. Of local files those
        read last stay open.

        Raises:
            TypeError: a view is not contiguous or cannot be written.
        """
        self.read_spans(path, [(offset, views)])

    def read_spans(self, path: str, spans: Sequence[Span]) -> None:
        """Fill views from several places of one object: as `read_into` does, one after the other.

        Args:
            path: of the object.
            spans: the offset of each place, and the views that are filled from there.
        """
        if not self._backend.is_local or any(offset < 0 for offset, _ in spans):
            for offset, given in spans:
                self._check_range(path, offset, 0)
                self._fill(path, offset, flat(given))
            return
        full = self._full(path)

        def read() -> None:
            file = self._descriptors.open(full)
            for offset, views in spans:
                wanted, got = fill(file.number, offset, views)
                if got != wanted:
                    size = os.fstat(file.number).st_size
                    raise StorageError(
                        f"cannot read {self.url_of(path)} ({size} bytes): asked for {wanted} bytes "
                        f"at {offset}, got {got}"
                    )

        self._try("read", path, read)

    def _fill(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        """Fill flat views from a remote object."""
        full, length = self._full(path), num_bytes(views)

        def read() -> None:
            reader = self._backend.s3_reader
            if reader is None or not reader.read_into(full, offset, views):
                scatter(memoryview(self._range(path, offset, length)), views)

        if length:
            self._try("read", path, read)

    def put(self, path: str, data: bytes) -> None:
        """Create or replace an object."""
        full = self._full(path)
        if self._backend.is_local:
            self._try("write", path, lambda: _local.write(full, data))
        else:
            size = len(data)
            self._try("write", path, lambda: self._send("pipe_file", full, data, num_bytes=size))

    def put_once(self, path: str, data: bytes) -> None:
        """Create an object if none is there, so that of all writers exactly one succeeds.

        A remote store may do what was asked and lose the answer. So whatever it says, the object
        is read back, and if it holds exactly `data` the call has succeeded. Bytes that must tell
        writers apart therefore need something unique in them, such as an attempt id.

        Raises:
            AlreadyExistsError: there is another object.
            StorageError: also if `data` is larger than the 32 MiB that go in one request.
        """
        full = self._full(path)
        if len(data) > ONCE_BYTES:
            raise StorageError(
                f"cannot create {self.url_of(path)}: {len(data)} bytes are more than one "
                f"conditional request takes ({ONCE_BYTES})"
            )
        if self._backend.is_local:
            self._try("create", path, lambda: _local.write_once(full, data))
        elif self._backend.is_memory:
            with _memory_lock:  # its own check and write are two steps
                self._try(
                    "create", path, lambda: self._backend.fs.pipe_file(full, data, mode="create")
                )
        else:
            self._try("create", path, lambda: self._create_remote(path, data))

    def upload(self, path: str, local_path: str) -> None:
        """Create or replace an object with the content of a local file."""
        full = self._full(path)
        if self._backend.is_local:
            self._try("write", path, lambda: _local.copy(local_path, full))
            return

        options = {"chunksize": UPLOAD_CHUNK_BYTES} if self._backend.is_s3 else {}

        def upload() -> None:
            sent = os.path.getsize(local_path)
            self._send("put_file", local_path, full, num_bytes=sent, **options)
            stored = self._backend.fs.info(full)["size"]
            if sent != stored:
                raise BrokenAnswerError(f"sent {sent} bytes, the store has {stored}")

        self._try("write", path, upload)

    def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
        """Give all objects below a folder, at any depth, sorted by path.

        Args:
            prefix: the folder; nothing is given if it does not exist.
            temporary: give also what killed writers left.
        """
        full, root = self._full(prefix), self._backend.path
        if self._backend.is_local:
            yield from self._list_local(prefix, full, temporary=temporary)
            return
        infos = self._try("list", prefix, lambda: self._backend.fs.find(full, detail=True))
        for name in sorted(infos):
            if infos[name]["type"] == "directory":
                continue
            if name.endswith(_local.TEMPORARY_SUFFIX) and not temporary:
                continue
            try:
                etag = self._backend.etag(name, infos[name])
            except FileNotFoundError:  # deleted since it was listed
                continue
            path, size = name[len(root) :].lstrip("/"), infos[name]["size"]
            yield Entry(path, size, etag, modified(infos[name]))

    def _list_local(self, prefix: str, full: str, *, temporary: bool) -> Iterator[Entry]:
        """Hold the names only: what a driver says of a file takes ten times as much."""
        for name in self._try("list", prefix, lambda: _local.find(full)):
            if name.endswith(_local.TEMPORARY_SUFFIX) and not temporary:
                continue
            try:
                stat = os.stat(name)
            except FileNotFoundError:  # deleted since it was listed
                continue
            path = name[len(self._backend.path) :].lstrip("/")
            yield Entry(path, stat.st_size, _local.etag(stat), stat.st_mtime)

    def list_names(self, prefix: str = "") -> builtins.list[str]:
        """Return the names of the objects and folders directly in a folder, sorted."""
        full = self._full(prefix)

        def list_folder() -> builtins.list[str]:
            reader = self._backend.s3_reader
            listed = None if reader is None else reader.list_names(full)
            return self._backend.fs.ls(full, detail=False) if listed is None else listed

        try:
            found = self._try("list", prefix, list_folder)
        except NotFoundError:
            return []
        below = f"{full}/"
        names = {path.rstrip("/")[len(below) :] for path in found if path.startswith(below)}
        return sorted(name for name in names if name and not name.endswith(_local.TEMPORARY_SUFFIX))

    def exists(self, path: str) -> bool:
        """Tell whether there is an object (not a folder) of this path."""
        try:
            self.size(path)
        except NotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Return an object's size in bytes."""
        full = self._full(path)
        info = self._try("stat", path, lambda: self._backend.fs.info(full))
        if info["type"] == "directory":
            raise NotFoundError(f"cannot stat {self.url_of(path)}: it is a folder")
        return int(info["size"])

    def delete(self, path: str) -> None:
        """Delete an object, if it is there."""
        full = self._full(path)
        try:
            self._try("delete", path, lambda: self._backend.fs.rm_file(full))
        except NotFoundError:
            return

    def delete_tree(self, prefix: str) -> None:
        """Delete all objects below a folder, if there are any."""
        if not prefix.strip("/"):
            raise StorageError(f"refusing to delete the whole store {self.url}")
        full = self._full(prefix)
        try:
            if self._backend.is_local:
                self._try("delete", prefix, lambda: shutil.rmtree(full))
            else:
                self._try("delete", prefix, lambda: self._backend.fs.rm(full, recursive=True))
        except NotFoundError:
            return

    def open_read(self, path: str, *, size: int | None = None) -> BinaryIO:
        """Open an object for reading from any place in it.

        Args:
            path: of the object.
            size: its bytes, where they are known; None to ask the store.
        """
        full = self._full(path)
        if self._backend.is_local:
            return self._try("read", path, lambda: open(full, "rb"))
        if self._backend.is_memory:  # its files are shared, position included
            return io.BytesIO(self.read(path))
        return io.BufferedReader(RangeReader(self, path, size), BUFFER_BYTES)

    def local_path(self, path: str) -> str | None:
        """Return the path of an object in the machine's own file system, if it lives there."""
        return self._full(path) if self._backend.is_local else None

    def check_writable(self) -> None:
        """Prove that objects can be created here, and that only one of two writers wins.

        Raises:
            ConfigError: they cannot, or the store ignores put-if-absent.
        """
        check_writable(self)

    def _create_remote(self, path: str, data: bytes) -> None:
        full, size = self._full(path), len(data)
        # Some S3 servers honour the condition for single-part uploads only.
        options = {"chunksize": max(size, 1)} if self._backend.is_s3 else {}
        try:
            self._send("pipe_file", full, data, num_bytes=size, mode="create", **options)
        except store_errors() as err:
            refused = isinstance(err, FileExistsError)
            # s3fs gives EINVAL for a failed condition whose answer does not name it.
            invalid = isinstance(err, OSError) and err.errno == errno.EINVAL
            if not (refused or invalid or is_transient(err)):
                raise
            self._settle(path, data, err, refused=refused)

    def _settle(self, path: str, data: bytes, err: Exception, *, refused: bool) -> None:
        """Find out who created an object when the store's answer leaves it open."""
        try:
            stored = bytes(self._backend.fs.cat_file(self._full(path)))
        except FileNotFoundError:
            if refused:  # by a writer that has not finished, or has failed
                raise BrokenAnswerError(f"said to exist, but is not there: {err}") from err
            raise err from None
        if stored != data:
            message = f"cannot create {self.url_of(path)}: it exists already"
            raise AlreadyExistsError(message) from err

    def _send(self, operation: str, *args: object, num_bytes: int, **options: object) -> None:
        send(self._backend.fs, operation, *args, num_bytes=num_bytes, **options)

    def _full(self, path: str) -> str:
        parts = path.split("/") if path else []
        if any(part in ("", ".", "..") for part in parts):
            raise StorageError(f"path {path!r} is not a plain path below {self.url}")
        return "/".join([self._backend.path, *parts])

    def _try(self, what: str, path: str, operation: Callable[[], T]) -> T:
        return with_retries(what, self.url_of(path), operation)

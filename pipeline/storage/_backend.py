"""One fsspec filesystem, found by URL."""

import os
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, without_secrets
from pipeline.storage import _local
from pipeline.storage._driver import AZURE, GCS, S3, open_filesystem
from pipeline.storage._s3_reader import S3Reader, open_s3_reader

_EXTRAS = dict.fromkeys(S3, "s3") | dict.fromkeys(GCS, "gcs") | dict.fromkeys(AZURE, "azure")
_LOCAL = ("", "file", "local")
_SECRET = re.compile(
    r"://[^/@]*:[^/@]*@|[?&][^=&]*(sig|token|secret|credential|password|key)[^=&]*=", re.IGNORECASE
)

_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
"""What drivers call the time of the last change."""

_opening = [threading.Lock()]  # many threads may begin at once
os.register_at_fork(after_in_child=lambda: _opening.__setitem__(0, threading.Lock()))


class Backend:
    """A filesystem and the place in it that a URL names. Cheap; connects on first use.

    Args:
        url: as `checked_url` returns it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: tuple[int, Any, str] | None = None
        self._s3_reader: tuple[int, S3Reader | None] | None = None

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]

    @property
    def fs(self) -> Any:  # noqa: ANN401  (fsspec has no types)
        return self._open()[0]

    @property
    def path(self) -> str:
        """The place, as the filesystem writes it, without a slash at the end."""
        if self.is_s3:  # known without a connection
            return split_protocol(self.url)[1].rstrip("/")
        return self._open()[1]

    @property
    def s3_reader(self) -> S3Reader | None:
        """What reads it without Python's event loop, where there is something."""
        if not self.is_s3:
            return None
        known = self._s3_reader
        if known is None or known[0] != os.getpid():
            with _opening[0]:
                known = self._s3_reader
                if known is None or known[0] != os.getpid():
                    known = self._s3_reader = (os.getpid(), open_s3_reader(self.url))
        return known[1]

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, or those that there are."""
        reader = self.s3_reader
        found = None if reader is None else reader.read_range(path, offset, length)
        if found is not None:
            return found
        return bytes(self.fs.cat_file(path, start=offset, end=offset + length))

    @property
    def is_local(self) -> bool:
        return split_protocol(self.url)[0] is None

    @property
    def is_memory(self) -> bool:
        return split_protocol(self.url)[0] == "memory"

    @property
    def is_s3(self) -> bool:
        return split_protocol(self.url)[0] in S3

    def url_of(self, path: str) -> str:
        """Return the URL of a path that this filesystem listed."""
        if self.is_local or "://" in path:
            return path
        return f"{split_protocol(self.url)[0]}://{path.lstrip('/')}"

    def etag(self, path: str, info: Mapping[str, Any]) -> str:
        """Return what changes when the object's content does; "" if the store gives nothing.

        Raises:
            FileNotFoundError: a local file has just gone.
        """
        if self.is_local:
            return _local.etag(os.stat(path))
        if self.is_memory:
            created = info["created"]
            seconds = created if isinstance(created, float) else created.timestamp()
            return f"{int(seconds * 1e6):x}-{info['size']:x}"
        found = next((info[name] for name in ("ETag", "etag", "md5Hash") if info.get(name)), "")
        return str(found).strip('"')

    def _open(self) -> tuple[Any, str]:
        # Drivers do not survive a fork; a filesystem belongs to the process that opened it.
        if self._opened is None or self._opened[0] != os.getpid():
            fs, path = open_filesystem(self.url)
            self._opened = (os.getpid(), fs, path.rstrip("/"))
        return self._opened[1], self._opened[2]


def modified(info: Mapping[str, Any]) -> float | None:
    """Return the Unix time of an object's last change, if its listing says so."""
    found = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if isinstance(found, datetime):  # one without a zone is in UTC
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return float(found) if isinstance(found, int | float) else None


def checked_url(url: str) -> str:
    """Return a URL in the one form used everywhere: local ones as absolute paths.

    Raises:
        ConfigError: no driver for it, it names no place, or it carries credentials.
    """
    if _SECRET.search(url) or without_secrets(url) != url:
        raise ConfigError(
            "a URL carries credentials (not shown here); give them by the environment instead"
        )
    protocol, place = split_protocol(url)
    if not place.strip("/") and protocol != "memory" and not url.startswith("/"):
        raise ConfigError(f"{url!r} names no place in a store")
    if "::" in url:
        raise ConfigError(f"chained URL {url!r} is not supported; name the store directly")
    if (protocol or "") in _LOCAL:
        return os.path.abspath(LocalFileSystem._strip_protocol(url))
    _require_driver(protocol, url)
    return f"{protocol}://{place.rstrip('/')}"


def _require_driver(protocol: str, url: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as err:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'carvecache[{extra}]'" if extra else str(err)
        raise ConfigError(f"no driver for {url!r}; install it: {remedy}") from err
    except ValueError as err:
        raise ConfigError(f"unknown kind of store {protocol!r} in {url!r}") from err

"""Reading objects of S3 by compiled code, several times cheaper than by Python's event loop.

An addition to s3fs, never another identity: region, endpoint and credentials are those that
botocore finds, as s3fs has them from it; certificates of one's own are trusted beside those of the
system. What it cannot do as s3fs would (settings in fsspec's configuration, proxies), and refusals,
are left to s3fs and its errors; answers that break are asked for again by our retries. It writes
nothing.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec.config
from fsspec.core import split_protocol

from pipeline.storage._driver import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, S3
from pipeline.storage._retry import BrokenAnswerError
from pipeline.storage._views import cut, num_bytes, scatter

logger = logging.getLogger(__name__)
T = TypeVar("T")

SWITCH = "CARVE_S3_READS"
"""Environment variable: `s3fs` leaves all reads to s3fs."""

_NOT_FOR = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_FAILURES = 3  # one after the other: then it is not tried again in this process
_NOT_SENT = "error sending request"
_PIECE_BYTES = 1 << 20  # of a longer answer
_LONGEST_S = 3600  # of one answer; silence ends it far sooner

_first_pid: list[int] = []  # of the process in which obstore was used first: it survives no fork


class NativeReader:
    """Reads objects below one bucket. Safe to use from many threads; made by `open_native`.

    All methods return None or False where s3fs is to be asked instead, and raise `BrokenAnswerError` where
    asking again may help: that is up to our retries, the third time by s3fs.

    Args:
        store: obstore's, of a bucket.
        bucket: its name.
    """

    def __init__(self, store: Any, bucket: str) -> None:  # noqa: ANN401
        self._store = store
        self._bucket = bucket
        self._failures = 0
        self._lock = threading.Lock()

    def read_range(self, path: str, start: int, length: int) -> memoryview | None:
        """Return exactly `length` bytes of `bucket/key` from `start` on."""
        import obstore

        key = self._key(path)
        found = self._try(lambda: obstore.get_range(self._store, key, start=start, length=length))
        return None if found is None or len(found) != length else memoryview(found)

    def read_into(self, path: str, start: int, views: Sequence[memoryview]) -> bool:
        """Fill flat views from `start` on, piece by piece as they come; tell whether all are.

        Beside the views it takes the memory of a piece, and no more.
        """
        import obstore

        key, length = self._key(path), num_bytes(views)
        if length <= _PIECE_BYTES:
            found = self.read_range(path, start, length)
            if found is not None:
                scatter(found, views)
            return found is not None

        def fill() -> int:
            options: Any = {"range": (start, start + length)}
            answer = obstore.get(self._store, key, options=options)
            got, rest = 0, views
            for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
                filled, rest = cut(rest, len(piece))
                scatter(memoryview(piece), filled)
                got += len(piece)
            return got

        return self._try(fill) == length

    def read(self, path: str, most: int | None) -> memoryview | None:
        """Return a whole object, or no more than so many bytes of it."""
        import obstore

        key = self._key(path)
        options: Any = {} if most is None else {"range": (0, most)}
        found = self._try(lambda: obstore.get(self._store, key, options=options).bytes())
        return None if found is None else memoryview(found)

    def list_names(self, path: str) -> list[str] | None:
        """Return the keys, with the bucket, of objects and folders directly in a folder."""
        import obstore

        key = f"{self._key(path)}/"
        found = self._try(lambda: obstore.list_with_delimiter(self._store, key))
        if found is None:
            return None
        names = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return [f"{self._bucket}/{name}" for name in names]

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._bucket}/")

    def _try(self, read: Callable[[], T]) -> T | None:
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        if self._failures >= _FAILURES:
            return None
        try:
            found = read()
        except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError):
            return None  # s3fs says so, too
        except (BaseError, OSError, ValueError) as err:
            if "416 Range Not Satisfiable" in str(err):  # an end of a file, or an empty one
                return None
            with self._lock:
                self._failures += 1
                if self._failures == _FAILURES:
                    logger.warning(
                        "reading bucket %s by obstore failed %d times in a row (%s); this process "
                        "reads by s3fs from now on",
                        self._bucket,
                        _FAILURES,
                        type(err).__name__,
                    )
            if _NOT_SENT in str(err):  # no connection, or no trust: s3fs tells which
                return None
            raise BrokenAnswerError(" ".join(str(err).split())[:200]) from err
        self._failures = 0
        return found


def open_native(url: str) -> NativeReader | None:
    """Return what reads a URL's bucket, or None where s3fs has to.

    Args:
        url: as `checked_url` returns it.
    """
    protocol, place = split_protocol(url)
    if protocol not in S3 or os.environ.get(SWITCH) == "s3fs" or not _is_plain():
        return None
    if _first_pid and _first_pid[0] != os.getpid():
        return None
    try:
        import obstore.store
    except ImportError:
        return None
    settings = _settings()
    if settings is None:
        return None
    bundle = settings.pop("bundle")
    _first_pid[:] = [os.getpid()]
    bucket = place.partition("/")[0]
    client: Any = {
        "allow_http": True,
        "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
        "read_timeout": f"{READ_TIMEOUT_S:.0f}s",
        "timeout": f"{_LONGEST_S}s",
    }
    if bundle is not None:
        client["root_certificate"] = bundle
    store = obstore.store.S3Store(
        bucket, client_options=client, retry_config={"max_retries": 0}, **settings
    )
    return NativeReader(store, bucket)


def _is_plain() -> bool:
    """Tell whether nothing is set that only s3fs knows how to follow."""
    configured = any(fsspec.config.conf.get(protocol) for protocol in S3)
    return not configured and not any(os.environ.get(name) for name in _NOT_FOR)


def _settings() -> dict[str, Any] | None:
    """Return region, endpoint, certificates and credentials as botocore finds them.

    None without credentials, or where the file of certificates cannot be read.
    """
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider

    session = botocore.session.Session()
    credentials = session.get_credentials()
    if credentials is None:
        return None

    def current() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        expires = getattr(credentials, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires,
        }

    path = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    try:
        bundle = Path(path).read_bytes() if path else None
    except OSError:
        return None
    found = {
        "bundle": bundle,
        "region": session.get_config_variable("region") or "us-east-1",
        "credential_provider": current,
    }
    ignored = session.get_config_variable("ignore_configured_endpoint_urls")
    endpoint = ConfiguredEndpointProvider(
        full_config=session.full_config,
        scoped_config=session.get_scoped_config(),
        client_name="s3",
    ).provide()
    if endpoint and not ignored:
        found["endpoint"] = endpoint
    return found

"""Reading objects of S3 by plain HTTP, for less than half of the processor's time of s3fs.

An addition to s3fs, never another identity: credentials, region and endpoint are those that
botocore finds, as s3fs has them from it, and botocore signs; certificates of one's own are trusted
beside those of the system. What it cannot do as s3fs would (proxies, other kinds of addresses,
settings in fsspec's configuration), and refusals, are left to s3fs and its errors; answers that
break are asked for again by our retries. It writes nothing.

Bytes go from the socket to where they are wanted without another copy, which no library does that
was tried: for 16 MiB obstore takes nearly twice the processor's time, and it survives no fork
(`benchmarks/s3_reads.md`).
"""

import logging
import os
import re
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

import fsspec.config
from fsspec.core import split_protocol

from pipeline.storage import _driver
from pipeline.storage._driver import S3
from pipeline.storage._http import Connections, NotConnectedError
from pipeline.storage._retry import BrokenAnswerError
from pipeline.storage._views import num_bytes

logger = logging.getLogger(__name__)
T = TypeVar("T")

SWITCH = "CARVE_S3_READS"
"""Environment variable: `s3fs` leaves all reads to s3fs."""

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_ADDRESSES = ("use_fips_endpoint", "use_dualstack_endpoint", "s3")  # settings of botocore
_FAILURES = 3  # one after the other: then s3fs reads for a while
_PAUSE_S = 60
_SIGNED_S = 300  # a signature is used for so long; S3 takes it for 900 s
_MAX_SIGNED = 1024
_MAX_REFUSAL_BYTES = 64 << 10  # read, so that the connection can be used again


class _LeftToDriver(Exception):  # noqa: N818  (no error: s3fs says what it is)
    """The server refused. It may serve s3fs; if not, s3fs has the words for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A bucket on a server.

    Attributes:
        endpoint: URL of the server.
        bucket: its name.
        region: that requests are signed for.
        credentials: botocore's, which renew themselves.
        bundle: file of certificates that are trusted beside those of the system.
    """

    endpoint: str
    bucket: str
    region: str
    credentials: Any
    bundle: str | None


class S3Reader:
    """Reads objects of one bucket. Safe to use from many threads; made by `open_s3_reader`.

    Methods return None or False where s3fs is to be asked instead, and raise `BrokenAnswerError`
    where asking again may help: that is up to our retries.

    Args:
        place: the bucket.
    """

    def __init__(self, place: _Place) -> None:
        context = None
        if place.endpoint.startswith("https:"):
            context = ssl.create_default_context()
            if place.bundle is not None:
                context.load_verify_locations(place.bundle)
        self._place = place
        self._connections = Connections(
            place.endpoint,
            connect_timeout_s=_driver.CONNECT_TIMEOUT_S,
            read_timeout_s=_driver.READ_TIMEOUT_S,
            context=context,
        )
        self._signed: OrderedDict[str, tuple[float, Mapping[str, str]]] = OrderedDict()
        self._failures = 0
        self._paused_until = 0.0
        self._lock = threading.Lock()

    def read_range(self, path: str, start: int, length: int) -> bytes | None:
        """Return exactly `length` bytes of `bucket/key` from `start` on."""
        span = (start, length)
        found = self._try(lambda: self._ask(path, lambda answer: answer.read(length), span=span))
        return None if found is None or len(found) != length else found

    def read_into(self, path: str, start: int, views: Sequence[memoryview]) -> bool:
        """Fill flat views from `start` on; tell whether all are filled."""
        length = num_bytes(views)

        def fill(answer: HTTPResponse) -> bool:
            if answer.length not in (None, length):  # the object ends before
                raise _LeftToDriver
            for view in views:
                at = 0
                while at < len(view):
                    count = answer.readinto(view[at:])
                    if not count:
                        raise ConnectionError("the answer broke off")
                    at += count
            return True

        return self._try(lambda: self._ask(path, fill, span=(start, length))) or False

    def read(self, path: str, most: int | None) -> bytes | None:
        """Return a whole object, or no more than so many bytes of it."""
        span = None if most is None else (0, most)
        return self._try(lambda: self._ask(path, _whole, span=span))

    def list_names(self, path: str) -> list[str] | None:
        """Return the keys, with the bucket, of objects and folders directly in a folder."""
        bucket = self._place.bucket
        query = {"delimiter": "/", "list-type": "2"}
        if key := path.partition("/")[2]:
            query["prefix"] = f"{key}/"
        found: list[str] = []
        while True:
            page = self._try(lambda: self._ask(bucket, _whole, query=query))
            root = None if page is None else _parsed(page)
            if root is None:
                return None
            for kind in ("CommonPrefixes/{*}Prefix", "Contents/{*}Key"):
                found += [f"{bucket}/{name.text}" for name in root.iterfind(f"{{*}}{kind}")]
            rest = root.findtext("{*}NextContinuationToken")
            if not rest:
                return found
            query["continuation-token"] = rest

    def _try(self, ask: Callable[[], T]) -> T | None:
        """Return what was asked for, or None where s3fs has to ask."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            found = ask()
        except _LeftToDriver:
            return None
        except BrokenAnswerError:
            raise
        except (OSError, HTTPException) as err:
            self._failed(_line(err))
            if isinstance(err, NotConnectedError):
                return None  # s3fs says why
            raise BrokenAnswerError(_line(err)) from err
        self._failures = 0
        return found

    def _ask(
        self,
        path: str,
        read: Callable[[HTTPResponse], T],
        *,
        span: tuple[int, int] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> T:
        """Return what `read` makes of the answer.

        Args:
            path: bucket and key.
            read: is given the answer, its status and head read.
            span: first byte, and number of bytes, of the range that is wanted; None for all.
            query: of the request.
        """
        url = f"{self._place.endpoint}/{quote(path, safe='/~')}"
        if query:
            url += f"?{urlencode(query, quote_via=quote, safe='~')}"
        headers = dict(self._sign(url))
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{sum(span) - 1}"
        target = f"/{url.split('/', 3)[3]}"
        with self._connections.get(target, headers) as answer:
            status = answer.status
            if status == (200 if span is None else 206):
                return read(answer)
            reason = _refusal(status, answer.read(_MAX_REFUSAL_BYTES))
        if status in (408, 429) or status >= 500:
            raise BrokenAnswerError(reason)
        if status not in (404, 416):  # no such object, or not so long
            self._failed(reason)
        raise _LeftToDriver

    def _failed(self, reason: str) -> None:
        with self._lock:
            self._failures += 1
            if self._failures < _FAILURES:
                return
            self._failures, self._paused_until = 0, time.monotonic() + _PAUSE_S
        logger.warning(
            "reading bucket %s failed %d times in a row (%s); s3fs reads it for the next %d s",
            self._place.bucket,
            _FAILURES,
            reason,
            _PAUSE_S,
        )

    def _sign(self, url: str) -> Mapping[str, str]:
        """Return signed headers; the range is not signed, so they do for many of an object."""
        now = time.monotonic()
        with self._lock:
            made, headers = self._signed.get(url, (now - _SIGNED_S, {}))
        if now - made < _SIGNED_S:
            return headers
        headers = self._signature(url)
        with self._lock:
            self._signed[url] = (now, headers)
            while len(self._signed) > _MAX_SIGNED:
                self._signed.popitem(last=False)
        return headers

    def _signature(self, url: str) -> Mapping[str, str]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest(method="GET", url=url)
        frozen = self._place.credentials.get_frozen_credentials()
        S3SigV4Auth(frozen, "s3", self._place.region).add_auth(request)
        return dict(request.headers.items())


def open_s3_reader(url: str) -> S3Reader | None:
    """Return what reads a URL's bucket, or None where s3fs has to.

    Args:
        url: as `checked_url` returns it.
    """
    protocol, place = split_protocol(url)
    if protocol not in S3 or os.environ.get(SWITCH) == "s3fs" or not _is_plain():
        return None
    try:
        import botocore.auth  # noqa: F401
    except ImportError:
        return None
    found = _find(place.partition("/")[0])
    if found is None:
        return None
    try:
        return S3Reader(found)
    except (OSError, ValueError):  # certificates that cannot be read, an address that is none
        return None


def _is_plain() -> bool:
    """Tell whether nothing is set that only s3fs knows how to follow."""
    configured = any(fsspec.config.conf.get(protocol) for protocol in S3)
    return not configured and not any(os.environ.get(name) for name in _PROXIES)


def _find(bucket: str) -> _Place | None:
    """Return a bucket with what botocore finds for it; None for what takes more than that."""
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider

    if ":" in bucket or bucket.endswith("--x-s3"):  # an access point; a bucket with sessions
        return None
    session = botocore.session.Session()
    credentials = session.get_credentials()
    if credentials is None or any(session.get_config_variable(name) for name in _ADDRESSES):
        return None
    region = session.get_config_variable("region") or "us-east-1"
    endpoint = None
    if not session.get_config_variable("ignore_configured_endpoint_urls"):
        endpoint = ConfiguredEndpointProvider(
            full_config=session.full_config,
            scoped_config=session.get_scoped_config(),
            client_name="s3",
        ).provide()
    if endpoint is None:
        if "iso" in region:  # of other domains
            return None
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        endpoint = f"https://s3.{region}.{domain}"
    return _Place(
        endpoint=endpoint.rstrip("/"),
        bucket=bucket,
        region=region,
        credentials=credentials,
        bundle=session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE"),
    )


def _whole(answer: HTTPResponse) -> bytes:
    return answer.read()


def _refusal(status: int, body: bytes) -> str:
    """Tell what a server answered, without the signature and key that it may repeat."""
    code = re.search(rb"<Code>(\w{1,80})</Code>", body)
    return f"{status} {code[1].decode() if code else 'without a code'}"


def _parsed(page: bytes) -> ElementTree.Element | None:
    with suppress(ElementTree.ParseError):
        return ElementTree.fromstring(page)
    return None


def _line(err: object) -> str:
    return " ".join(str(err).split())[:200] or type(err).__name__

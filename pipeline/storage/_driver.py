"""Opening fsspec's drivers so that none waits without end and none retries on its own.

Left as they are, s3fs and botocore make up to 25 requests where one was asked for (a minute of
silence before the first error), azure-storage up to 4 with 15 s between, gcsfs 6 and with no limit
to any of them. Multiplied with our own retries a store that is down would hold an actor for hours.
So every driver is told to ask once and to give up in bounded time; `_retry` does the rest.
"""

import os
from types import MethodType
from typing import Any

import fsspec.config
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import split_protocol, url_to_fs

from pipeline.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # of silence; an answer that goes on may take as long as it needs
SLOWEST_SEND = 2**20  # bytes/s; what takes longer than at this speed is given up

S3 = ("s3", "s3a")
GCS = ("gs", "gcs")
AZURE = ("az", "abfs", "abfss", "adl")


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of a URL and the place in it.

    Raises:
        ConfigError: the driver lacks something it needs, for example credentials.
    """
    protocol = split_protocol(url)[0]
    try:
        fs, path = url_to_fs(url, **_options(protocol))
    except ValueError as err:
        raise ConfigError(f"cannot open {url}: {err}; see docs/stores.md") from err
    if protocol in S3:
        fs.retries = 1
    elif protocol in GCS:
        _bind_gcs(fs)
    elif protocol in AZURE:
        _bind_azure(fs)
    return fs, path


def send(fs: Any, operation: str, *args: object, num_bytes: int, **options: object) -> None:  # noqa: ANN401
    """Do an operation that sends bytes, for example `pipe_file`, in bounded time.

    The drivers' limits are for silence after a request; aiohttp, below all of them, waits without
    end while a server takes no bytes or does not say `100 Continue`.

    Raises:
        TimeoutError: it took too long; whether it was done is not known.
    """
    if not isinstance(fs, AsyncFileSystem):
        getattr(fs, operation)(*args, **options)
        return
    limit_s = CONNECT_TIMEOUT_S + READ_TIMEOUT_S + num_bytes / SLOWEST_SEND
    act = getattr(fs, f"_{operation}")
    try:
        sync(fs.loop, act, *args, timeout=limit_s, **options)
    except TimeoutError as err:
        raise TimeoutError(f"no answer within {limit_s:.0f} s") from err


def _options(protocol: str | None) -> dict[str, Any]:
    if protocol is None:
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}  # it would hide what others write
    if protocol in S3:
        options["config_kwargs"] = {**_botocore_settings(), **_configured(S3, "config_kwargs")}
    return options


def _botocore_settings() -> dict[str, Any]:
    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }
    # botocore's own choice, `when_supported`, appends checksums to what it sends over TLS, which
    # older servers refuse (Ceph 16: 411 MissingContentLength), and takes the checksum of a whole
    # object for that of a part (rclone). The cache has checksums of its own.
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        if f"AWS_{name.upper()}" not in os.environ:
            settings[name] = "when_required"
    return settings


def _configured(protocols: tuple[str, ...], option: str) -> dict[str, Any]:
    """Return what the user's fsspec configuration gives for an option."""
    found: dict[str, Any] = {}
    for protocol in protocols:
        found |= fsspec.config.conf.get(protocol, {}).get(option, {})
    return found


def _bind_gcs(fs: Any) -> None:  # noqa: ANN401  (fsspec has no types)
    """Undo gcsfs' retries, which have no option, and set limits, of which it has none."""
    import aiohttp

    fs._request = MethodType(type(fs)._request.__wrapped__, fs)
    fs.requests_timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
    )


def _bind_azure(fs: Any) -> None:  # noqa: ANN401
    """Set azure-storage's retries and limits, which adlfs gives access to for some requests only.

    Its other retry counters do not matter once the total is 0.
    """
    service = fs.service_client
    service._config.retry_policy.total_retries = 0
    connection = service._pipeline._transport.connection_config
    connection.timeout, connection.read_timeout = CONNECT_TIMEOUT_S, READ_TIMEOUT_S

"""Which errors of a store pass by themselves, and trying again until they do."""

import errno
import itertools
import logging
import random
import ssl
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import (
    AlreadyExistsError,
    NotFoundError,
    PipelineError,
    StorageError,
    without_secrets,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 8  # pauses of 18 to 36 s in all
PATIENCE_S = 120.0  # no attempt begins later than this after the first
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0

_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,  # s3fs: SlowDown, ServiceUnavailable, 409
        errno.EINTR,
        errno.EIO,  # s3fs: any code it does not know, 502 for one
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EREMOTEIO,  # s3fs: InternalError
        errno.ESTALE,
    }
)
# Drivers also raise errors that are no OSError. A driver that is not loaded cannot have raised.
_DRIVER_ERRORS = {
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError", "ChecksumError"),
    "google.auth.exceptions": ("GoogleAuthError",),
}
_TRANSIENT_DRIVER_ERRORS = {
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "azure.core.exceptions": (
        "ServiceRequestError",
        "ServiceResponseError",
        "IncompleteReadError",
    ),
    "botocore.exceptions": (
        "ConnectionError",
        "HTTPClientError",
        "IncompleteReadError",
        "FlexibleChecksumError",
    ),
    "gcsfs.retry": ("ChecksumError",),
    "google.auth.exceptions": ("TransportError",),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
}


class BrokenAnswerError(ConnectionError):
    """A store answered, but not with what was asked for; asking again may help."""


def store_errors() -> tuple[type[Exception], ...]:
    """Return every class of error that a store is known to raise."""
    # gcsfs gives ValueError for a request that the server calls invalid.
    return (OSError, ValueError, *_loaded(_DRIVER_ERRORS))


def is_transient(err: BaseException) -> bool:
    """Tell whether the same request may succeed a moment later."""
    if _is_misconfigured(err):
        return False
    if isinstance(err, (TimeoutError, ConnectionError, *_loaded(_TRANSIENT_DRIVER_ERRORS))):
        return True
    if isinstance(err, OSError) and err.errno is not None:
        return err.errno in _TRANSIENT_ERRNOS
    statuses = (getattr(err, name, None) for name in ("status", "status_code", "code"))
    return any(_is_transient_status(status) for status in statuses)


def is_not_implemented(err: BaseException) -> bool:
    """Tell whether a store says that it cannot do such a thing at all (501)."""
    status = getattr(err, "status_code", None)
    return status == 501 or (isinstance(err, OSError) and err.errno == errno.ENOSYS)


def with_retries(what: str, url: str, operation: Callable[[], T]) -> T:
    """Return what an operation returns, trying again while its errors are transient.

    Args:
        what: the operation as a verb, for messages.
        url: what it is done to, for messages.
        operation: safe to repeat.

    Raises:
        StorageError: or its subclass that fits, after the last attempt or a permanent error.
    """
    last_start = time.monotonic() + PATIENCE_S
    for attempt in itertools.count(1):
        try:
            return operation()
        except PipelineError:  # ours already: a decision, not an accident
            raise
        except store_errors() as err:
            is_last = attempt == ATTEMPTS or time.monotonic() > last_start
            if is_last or not is_transient(err):
                raise as_storage_error(what, url, err, attempts=attempt) from err
            longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))
            pause_s = longest_s * random.uniform(0.5, 1)
            reason = without_secrets(str(err))
            logger.warning("cannot %s %s (%s); trying again in %.1f s", what, url, reason, pause_s)
            time.sleep(pause_s)
    raise AssertionError("counting never ends")


def as_storage_error(what: str, url: str, err: BaseException, *, attempts: int = 1) -> StorageError:
    """Return our error for one of a store, in one line."""
    tried = f" ({attempts} attempts)" if attempts > 1 else ""
    reason = " ".join(str(err).split()) or type(err).__name__
    if isinstance(err, FileNotFoundError):
        missing = "its bucket or folder" if what in ("create", "write") else "it"
        return NotFoundError(f"cannot {what} {url}: {missing} does not exist")
    if isinstance(err, FileExistsError):
        return AlreadyExistsError(f"cannot {what} {url}: it exists already")
    if isinstance(err, PermissionError):
        reason = f"permission denied: {reason}"
    return StorageError(f"cannot {what} {url}: {reason}{tried}")


def _is_misconfigured(err: BaseException) -> bool:
    """Tell whether a file of certificates is missing, or does not fit the server.

    botocore wraps what happens on the way to a request in errors that it also gives for
    connections that break.
    """
    given = getattr(err, "kwargs", None)
    reason = given.get("error") if isinstance(given, dict) else None
    certificate = getattr(reason, "certificate_error", None)
    return isinstance(reason, FileNotFoundError) or isinstance(
        certificate, ssl.SSLCertVerificationError
    )


def _is_transient_status(status: object) -> bool:
    if not isinstance(status, int):
        return False
    return status in (408, 429) or (500 <= status < 600 and status != 501)


def _loaded(table: dict[str, tuple[str, ...]]) -> tuple[type[Exception], ...]:
    modules = ((sys.modules.get(name), names) for name, names in table.items())
    return tuple(getattr(module, name) for module, names in modules if module for name in names)

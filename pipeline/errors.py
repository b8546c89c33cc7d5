"""Every exception this project raises on purpose, and the exit codes of a run.

Each error is one of ours (`PipelineError`) and also the builtin a caller would expect, so both
`except PipelineError` and `except ValueError` work.
"""

import os
import re
from enum import IntEnum

_USER = re.compile(r"(\w://)[^/@\s'\"]*:[^/@\s'\"]*@|(https?://)[^/@\s'\"]+@")
_PARAMETER = re.compile(
    r"([?&;#][^=&\s'\"]*(?:sig|token|secret|credential|password|key)[^=&\s'\"]*=)[^&\s'\"]+",
    re.IGNORECASE,
)
_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|ACCOUNT_KEY|STORAGE_KEY|CONNECTION_STRING|SAS")
_PLACES = re.compile(r"_(FILE|PATH|DIR|DIRECTORY|HOME|CACHE|URL|URI|ENDPOINT)S?$")
_SHORTEST_SECRET = 8


class ExitCode(IntEnum):
    """Exit code of a run, also found in its `summary.json`."""

    OK = 0
    CRASHED = 1  # an error that nobody foresaw: a traceback, a bug
    CONFIG = 2  # nothing was started: the configuration, input or output is wrong
    PARTIAL = 3  # some shards failed, or committed rows hide each other (duplicate keys)
    NOTHING_COMMITTED = 4  # every shard that was tried failed
    INTERRUPTED = 75  # stopped by a signal or a limit of the run; the same command resumes


def without_secrets(text: str) -> str:
    """Return a message with `***` for what a URL's credentials are, or a secret of the environment.

    Drivers put the whole address of a request into their errors, with its signature.
    """
    text = _USER.sub(lambda found: f"{found.group(1) or found.group(2)}***@", text)
    text = _PARAMETER.sub(r"\1***", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _holds_a_secret(name.upper()):
            text = text.replace(value, "***")
    return text


def _holds_a_secret(name: str) -> bool:
    """Tell by an environment variable's name; `TOKENS_URL` names a place, whose URL was looked at.

    A value that looks like a path may be a secret: those of AWS begin with a slash now and then.
    """
    return _NAMES.search(name) is not None and _PLACES.search(name) is None


class PipelineError(Exception):
    """Base of all errors raised on purpose. Its message holds no secrets."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(a) if isinstance(a, str) else a for a in args))


class ConfigError(PipelineError, ValueError):
    """The configuration is wrong; raised before any weight is loaded."""


class MissingSignalError(ConfigError):
    """A carver asks for a signal that the encoder cannot give."""


class SampleError(PipelineError, ValueError):
    """One sample cannot be used; the rest of its shard is not affected.

    Attributes:
        key: the sample's key.
        reason: a short stable code, counted in the commit record (for example `corrupt_image`).
    """

    stage = "source"

    def __init__(self, message: str, *, key: str, reason: str) -> None:
        super().__init__(message)
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the error crosses a process boundary."""
        return (_rebuild_sample_error, (type(self), str(self), self.key, self.reason))


class DecodeError(SampleError):
    """An image cannot be decoded."""

    stage = "decode"


class EncodeError(SampleError):
    """An image cannot be brought into the shape a model takes."""

    stage = "encode"


class ShardError(PipelineError, ValueError):
    """A whole shard cannot be used and trying again would not help.

    Attributes:
        shard: URL of the shard.
        reason: a short stable code (for example `truncated`).
    """

    def __init__(self, message: str, *, shard: str, reason: str) -> None:
        super().__init__(message)
        self.shard = shard
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the error crosses a process boundary."""
        return (_rebuild_shard_error, (type(self), str(self), self.shard, self.reason))


class ShardAbandonedError(PipelineError):
    """An attempt at a shard was given up on purpose; nothing is wrong with the shard."""


class StorageError(PipelineError, OSError):
    """A store did not do what was asked, after all retries."""


class AlreadyExistsError(StorageError, FileExistsError):
    """A put-if-absent found an object in its place."""


class NotFoundError(StorageError, FileNotFoundError):
    """An object does not exist."""


class NonFiniteError(PipelineError, ValueError):
    """NaN or infinity where numbers are stored."""


class CacheFormatError(PipelineError, ValueError):
    """Stored bytes are not what the format says: damaged, foreign, or of a newer version."""


class KeyNotFoundError(PipelineError, KeyError):
    """The cache holds no image of this key."""

    def __str__(self) -> str:
        """Return the message without the quotes KeyError adds."""
        return str(self.args[0])


def _rebuild_sample_error(
    kind: type[SampleError], message: str, key: str, reason: str
) -> SampleError:
    return kind(message, key=key, reason=reason)


def _rebuild_shard_error(
    kind: type[ShardError], message: str, shard: str, reason: str
) -> ShardError:
    return kind(message, shard=shard, reason=reason)

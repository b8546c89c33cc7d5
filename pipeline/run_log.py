"""Log lines of a run, as text or as one JSON object each, and their way from actors to the driver.

A line says what it is about in fields of its own: `logger.info(..., extra=about(shard=url))`.
"""

import json
import logging
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TextIO

from pipeline.errors import without_secrets

LogFormat = Literal["text", "json"]

FIELDS = ("run_id", "actor", "host", "pid", "shard", "key", "attempt", "attempt_id")
"""What a line may say beside time, level, logger and message; one that says nothing is left out."""

MAX_WAITING = 1000
"""Lines that wait in an actor for the driver to fetch them; of more, the oldest are dropped."""

_bound: dict[str, Any] = {}  # fields of every line of this process


def about(
    *,
    shard: str | None = None,
    key: str | None = None,
    attempt: int | None = None,
    attempt_id: str | None = None,
) -> dict[str, Any]:
    """Return the `extra` of a log call.

    Args:
        shard: URL.
        key: of a sample.
        attempt: number of the attempt at the shard, in this run.
        attempt_id: name of the attempt in the cache.
    """
    given = {"shard": shard, "key": key, "attempt": attempt, "attempt_id": attempt_id}
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def bound(**fields: str) -> Iterator[None]:
    """Give every line of this process fields for the time of a block."""
    before = dict(_bound)
    bind(**fields)
    try:
        yield
    finally:
        _bound.clear()
        _bound.update(before)


def bind(**fields: str) -> None:
    """Give every line of this process fields from now on."""
    _bound.update(fields)


def log_to_stderr(log_format: LogFormat, *, level: int = logging.INFO) -> None:
    """Send this process's log to stderr; called again, it changes the format.

    Where the embedding program has handlers of its own already, they are left as they are.
    """
    root = logging.getLogger()
    ours = next((h for h in root.handlers if isinstance(h, _StderrHandler)), None)
    if ours is None and not root.handlers:
        ours = _StderrHandler()
        root.addHandler(ours)
    if ours is not None:
        ours.setFormatter(JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.getLogger("pipeline").setLevel(level)
    if log_format == "json":
        logging.captureWarnings(capture=True)
        sys.excepthook = _log_crash


def write_to(target: TextIO | None) -> None:
    """Send the log to a file in place of stderr; None for stderr again."""
    _StderrHandler.target = target


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a line says what is said nowhere else.

    When a connection breaks, aiohttp leaves asyncio with an exception that nobody fetches, and it
    logs a trace. The request has failed as well then, and that error is dealt with.
    """
    cause = record.exc_info[1] if record.exc_info else None
    return not (record.name == "asyncio" and isinstance(cause, ConnectionError))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields that are known."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            values["trace"] = self.formatException(record.exc_info)
        values = {k: without_secrets(v) if isinstance(v, str) else v for k, v in values.items()}
        return json.dumps(values)  # in ASCII: a key may hold what no terminal can show


class _TextFormatter(logging.Formatter):
    """Time, level and message; of an actor's line also which it was."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a trace behind it, without secrets."""
        return without_secrets(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        line = super().formatMessage(record)
        actor = getattr(record, "actor", None)
        return f"{line} ({actor} on {getattr(record, 'host', '?')})" if actor else line


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever stderr is when a line comes, or to what `write_to` was given."""

    target: TextIO | None = None

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.addFilter(_is_news)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = self.target or sys.stderr
        super().emit(record)


class LogBuffer(logging.Handler):
    """Keeps an actor's lines until the driver fetches them."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.addFilter(_is_news)
        self._waiting: deque[Mapping[str, Any]] = deque(maxlen=MAX_WAITING)
        self._num_dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line; the oldest goes where there is no room."""
        self._num_dropped += len(self._waiting) == MAX_WAITING
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        self._waiting.append(
            {
                "created": record.created,
                "levelno": record.levelno,
                "levelname": record.levelname,
                "name": record.name,
                "msg": message,
                **_fields(record),
            }
        )

    def drain(self) -> Sequence[Mapping[str, Any]]:
        """Return the lines that wait, and keep them no longer."""
        lines = []
        while self._waiting:
            lines.append(self._waiting.popleft())
        if self._num_dropped:
            text = f"{self._num_dropped} earlier lines of this actor were dropped"
            level = logging.WARNING
            lines.insert(
                0,
                {
                    "created": time.time(),
                    "levelno": level,
                    "levelname": logging.getLevelName(level),
                    "name": __name__,
                    "msg": text,
                    **_here(),
                },
            )
            self._num_dropped = 0
        return lines


def replay(lines: Iterable[Mapping[str, Any]]) -> None:
    """Log in this process what `LogBuffer.drain` gave in another."""
    for line in lines:
        logging.getLogger(line["name"]).handle(logging.makeLogRecord(dict(line)))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    known = {**_here(), **vars(record)}
    return {name: known[name] for name in FIELDS if known.get(name) is not None}


def _here() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), **_bound}


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def _log_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logging.getLogger("pipeline").critical("crashed: %s", error, exc_info=(kind, error, trace))

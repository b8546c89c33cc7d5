"""HTTP requests to one server, over connections that stay open between them."""

import select
import ssl
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit

_MAX_IDLE = 32


class NotConnectedError(ConnectionError):
    """There is no way to the server: nobody answers, or it is not to be trusted."""


class Connections:
    """Connections to one server. Safe to use from many threads; one request at a time on each.

    Args:
        url: whose scheme, host and port are connected to.
        connect_timeout_s: for making a connection.
        read_timeout_s: of silence, then a request is given up.
        context: for https.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        context: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server")
        self._is_safe, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._context = context
        self._idle: list[HTTPConnection] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    @contextmanager
    def get(self, target: str, headers: Mapping[str, str]) -> Iterator[HTTPResponse]:
        """Ask, and give the answer for the block; what is left unread of it costs the connection.

        Args:
            target: path and query.
            headers: of the request.

        Raises:
            NotConnectedError: no connection could be made.
            OSError: it broke, or was silent for too long.
            http.client.HTTPException: the answer is none.
        """
        connection = self._take() or self._connect()
        is_kept = False
        try:
            connection.request("GET", target, headers=headers)
            with connection.getresponse() as answer:
                yield answer
                is_kept = answer.isclosed() and not answer.will_close
        finally:
            if is_kept:
                self._put_back(connection)
            else:
                connection.close()

    def _connect(self) -> HTTPConnection:
        connection: HTTPConnection
        if self._is_safe:
            connection = HTTPSConnection(
                self._host, self._port, timeout=self._connect_timeout_s, context=self._context
            )
        else:
            connection = HTTPConnection(self._host, self._port, timeout=self._connect_timeout_s)
        try:
            connection.connect()
        except OSError as err:
            connection.close()
            raise NotConnectedError(str(err)) from err
        connection.sock.settimeout(self._read_timeout_s)
        return connection

    def _take(self) -> HTTPConnection | None:
        """Return the idle connection used last that the server has not closed."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not _has_something_to_read(connection):
                return connection
            connection.close()

    def _put_back(self, connection: HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()


def _close_all(connections: list[HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _has_something_to_read(connection: HTTPConnection) -> bool:
    """Tell whether an idle connection was closed by its server, or is out of step with it."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))

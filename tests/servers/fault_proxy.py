"""An HTTP proxy between a client and a store on loopback that fails as it is told to.

    with FaultProxy(target_port=radosgw.port) as proxy:
        proxy.answer_503(times=3)
        proxy.swallow_replies(times=1, method="PUT", path="/commits/")
        ...                                  # clients use 127.0.0.1:proxy.port
        proxy.heal()

Requests are passed on byte for byte, `Host` included, so signatures hold. Faults of requests are
used up one request each, in the order they were given; the state of the link holds for all
connections, also those already open, until it is changed.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Self

_CHUNK_BYTES = 65536
_LONGEST_HEAD = 1 << 20
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@dataclass(frozen=True, slots=True)
class Request:
    """The head of one request, as it came over the wire."""

    method: str
    target: str  # path and query
    headers: Mapping[str, str]  # names in lower case

    @property
    def has_chunks(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "")

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", 0))


@dataclass(frozen=True, slots=True)
class Link:
    """How the way to the store is at the moment."""

    is_refused: bool = False  # connections are reset as they are made; open ones too
    is_black_hole: bool = False  # connections are taken, and nothing ever comes back
    delay_s: float = 0.0  # before each request is passed on
    reply_bytes_per_s: float | None = None  # of each connection


@dataclass(slots=True)
class _Fault:
    kind: Literal["503", "swallow", "reset_request", "reset_reply"]
    times: int
    method: str
    path: str
    after_bytes: int = 0

    def fits(self, request: Request) -> bool:
        return (
            self.times > 0 and self.method in ("", request.method) and self.path in request.target
        )


class FaultProxy:
    """Use it in a `with` block; runs on a thread of its own. All methods are thread-safe.

    Args:
        target_port: of the store, on loopback.

    Attributes:
        port: where clients connect.
        requests: heads of all requests so far, in order; those answered 503 too.
        num_faults: how often a request or connection was harmed on purpose, delays aside.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.requests: list[Request] = []
        self.num_faults = 0
        self.link = Link()
        self._faults: list[_Fault] = []
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self.port}"

    def answer_503(self, times: int, *, method: str = "", path: str = "") -> None:
        """Answer requests `503 SlowDown`; the store does not see them.

        Args:
            times: how many requests.
            method: of the requests meant; "" for any.
            path: what their path and query must contain.
        """
        self._add(_Fault("503", times, method, path))

    def swallow_replies(self, times: int, *, method: str = "", path: str = "") -> None:
        """Let requests through, and reset the connection when the store's reply comes."""
        self._add(_Fault("swallow", times, method, path))

    def reset_requests(
        self, times: int, *, after_bytes: int, method: str = "", path: str = ""
    ) -> None:
        """Reset both connections once so many bytes of a request, its head included, went up."""
        self._add(_Fault("reset_request", times, method, path, after_bytes))

    def reset_replies(
        self, times: int, *, after_bytes: int, method: str = "", path: str = ""
    ) -> None:
        """Reset both connections once so many bytes of a reply, its head included, came down."""
        self._add(_Fault("reset_reply", times, method, path, after_bytes))

    def refuse(self) -> None:
        """Reset all connections, open and new, until `heal`."""
        self._set_link(replace(self.link, is_refused=True))
        self._call(self._reset_all())

    def black_hole(self) -> None:
        """Pass nothing on, either way, until `heal`; what waited then goes through."""
        self._set_link(replace(self.link, is_black_hole=True))

    def delay(self, seconds: float) -> None:
        """Hold every request back for so long."""
        self._set_link(replace(self.link, delay_s=seconds))

    def slow_replies(self, bytes_per_s: float) -> None:
        """Pass replies on at this speed, each connection by itself."""
        self._set_link(replace(self.link, reply_bytes_per_s=bytes_per_s))

    def heal(self) -> None:
        """End all faults."""
        with self._lock:
            self._faults.clear()
            self.link = Link()

    def pending(self) -> int:
        """Return how many request faults have not been used up."""
        with self._lock:
            return sum(fault.times for fault in self._faults)

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _set_link(self, link: Link) -> None:
        with self._lock:
            self.link = link

    def _arrived(self, request: Request) -> _Fault | None:
        """Note a request; return the fault that is meant for it."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.fits(request):
                    fault.times -= 1
                    return fault
        return None

    def _count_fault(self) -> None:
        with self._lock:
            self.num_faults += 1

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(
            self._serve, "127.0.0.1", 0, limit=_LONGEST_HEAD, backlog=512
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    async def _reset_all(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    async def _close(self) -> None:
        # A server that closes loses what it has just accepted, and never closes it (CPython 3.11).
        for listening in self._server.sockets:
            self._loop.remove_reader(listening.fileno())
        until = self._loop.time() + 10
        # Connections that were just accepted are known, and reset, a turn later.
        while self._loop.time() < until and (
            serving := asyncio.all_tasks() - {asyncio.current_task()}
        ):
            await self._reset_all()
            await asyncio.wait(serving, timeout=0.1)
        self._server.close()


@dataclass(eq=False, slots=True)
class _Connection:
    """One client's connection and its counterpart to the store."""

    proxy: FaultProxy
    client_reader: asyncio.StreamReader
    client: asyncio.StreamWriter
    store: asyncio.StreamWriter | None = None
    fault: _Fault | None = None  # of the request under way
    num_sent: int = 0  # bytes of that request
    num_replied: int = 0  # bytes of its reply
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def serve(self) -> None:
        if self.proxy.link.is_refused:
            self.reset()
            return
        try:
            reader, self.store = await asyncio.open_connection(
                "127.0.0.1", self.proxy.target_port, limit=_LONGEST_HEAD
            )
        except OSError:  # the store is down
            self.reset(on_purpose=False)
            return
        self.tasks = [
            asyncio.ensure_future(self._pass_requests()),
            asyncio.ensure_future(self._pass_replies(reader)),
        ]
        try:
            await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in self.tasks:
                task.cancel()
            results = await asyncio.gather(*self.tasks, return_exceptions=True)
            self.client.close()
            self.store.close()
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result

    def reset(self, *, on_purpose: bool = True) -> None:
        """Break both connections, so that the other ends see a reset."""
        if on_purpose:
            self.proxy._count_fault()
        for writer in (self.client, self.store):
            sock = writer.get_extra_info("socket") if writer else None
            if sock is not None:
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                writer.transport.abort()
        for task in self.tasks:
            task.cancel()

    async def _pass_requests(self) -> None:
        with suppress(asyncio.IncompleteReadError):  # the client has closed
            while True:
                head = await self.client_reader.readuntil(b"\r\n\r\n")
                request = _parse_head(head)
                await self._wait_for_link()
                self.fault, self.num_sent, self.num_replied = self.proxy._arrived(request), 0, 0
                if self.fault is not None and self.fault.kind == "503":
                    await self._answer_503(request)
                    return
                await asyncio.sleep(self.proxy.link.delay_s)
                await self._send(head)
                async for piece in _body(self.client_reader, request):
                    await self._send(piece)

    async def _send(self, piece: bytes) -> None:
        await self._wait_for_link()
        fault = self.fault
        if fault is not None and fault.kind == "reset_request":
            piece = piece[: max(0, fault.after_bytes - self.num_sent)]
        assert self.store is not None
        self.store.write(piece)
        await self.store.drain()
        self.num_sent += len(piece)
        is_cut = fault is not None and self.num_sent >= fault.after_bytes
        if is_cut and fault.kind == "reset_request":
            self.reset()

    async def _answer_503(self, request: Request) -> None:
        self.proxy._count_fault()
        if "expect" not in request.headers:
            async for _ in _body(self.client_reader, request):
                pass
        head = (
            "HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            f"Content-Length: {len(_SLOW_DOWN)}\r\n\r\n"
        )
        self.client.write(head.encode() + (b"" if request.method == "HEAD" else _SLOW_DOWN))
        await self.client.drain()

    async def _pass_replies(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(self._reply_chunk_bytes()):
            await self._wait_for_link()
            fault = self.fault
            if fault is not None and fault.kind == "swallow":
                data = _interim_replies(data)
                if not data:
                    self.reset()
                    return
            if fault is not None and fault.kind == "reset_reply":
                data = data[: max(0, fault.after_bytes - self.num_replied)]
            if speed := self.proxy.link.reply_bytes_per_s:
                await asyncio.sleep(len(data) / speed)
            self.client.write(data)
            await self.client.drain()
            self.num_replied += len(data)
            is_cut = fault is not None and self.num_replied >= fault.after_bytes
            if is_cut and fault.kind == "reset_reply":
                self.reset()
                return

    def _reply_chunk_bytes(self) -> int:
        speed = self.proxy.link.reply_bytes_per_s
        return _CHUNK_BYTES if speed is None else max(1, min(_CHUNK_BYTES, int(speed / 10)))

    async def _wait_for_link(self) -> None:
        if self.proxy.link.is_black_hole:
            self.proxy._count_fault()
        while self.proxy.link.is_black_hole:
            await asyncio.sleep(0.02)


def _parse_head(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return Request(method, target, headers)


async def _body(reader: asyncio.StreamReader, request: Request) -> AsyncIterator[bytes]:
    """Yield a request's body as it stands on the wire."""
    if not request.has_chunks:
        async for piece in _exactly(reader, request.length):
            yield piece
        return
    size = 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        yield line
        if size:
            async for piece in _exactly(reader, size + 2):
                yield piece
    line = b""
    while line != b"\r\n":  # trailers, and the empty line that ends them
        line = await reader.readuntil(b"\r\n")
        yield line


async def _exactly(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    while length:
        piece = await reader.read(min(length, _CHUNK_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", length)
        length -= len(piece)
        yield piece


def _interim_replies(data: bytes) -> bytes:
    """Return the replies `100 Continue` at the start of what a store sent."""
    interim = b""
    while data.startswith(b"HTTP/1.1 1"):
        head, end, data = data.partition(b"\r\n\r\n")
        interim += head + end
    return interim

"""The proxy harms what it is told to, and nothing else."""

import gc
import http.client
import http.server
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from tests.servers.fault_proxy import FaultProxy

BODY = bytes(range(256)) * 400


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stored: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self):
        self._reply(BODY)

    def do_PUT(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored[self.path] = body
        self._reply(b"stored")

    def _reply(self, body):  # the client may be gone
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def proxy(monkeypatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(Handler, "stored", {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with FaultProxy(server.server_port) as proxy:
            yield proxy
        server.shutdown()
        thread.join()


def connect(proxy):
    return closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30))


def get(proxy, path="/x", timeout=30):
    with urllib.request.urlopen(f"{proxy.url}{path}", timeout=timeout) as reply:
        return reply.read()


def put(proxy, path, body):
    with connect(proxy) as connection:
        return put_on(connection, path, body)


def put_on(connection, path, body, **headers):
    connection.request("PUT", path, body, headers, encode_chunked="Transfer-Encoding" in headers)
    return connection.getresponse().read()


def test_without_faults_requests_of_one_connection_pass_unchanged(proxy):
    with connect(proxy) as connection:
        assert put_on(connection, "/a", BODY) == b"stored"
        chunks = {"Transfer-Encoding": "chunked"}
        assert put_on(connection, "/b", iter([BODY, b"x"]), **chunks) == b"stored"
        connection.request("GET", "/c?d=e")
        assert connection.getresponse().read() == BODY

    assert Handler.stored == {"/a": BODY, "/b": BODY + b"x"}
    sent = [(request.method, request.target) for request in proxy.requests]
    assert sent == [("PUT", "/a"), ("PUT", "/b"), ("GET", "/c?d=e")]
    assert proxy.num_faults == 0


def test_so_many_requests_are_answered_503_and_the_store_sees_none(proxy):
    proxy.answer_503(2, method="PUT", path="/commits/")

    for _ in range(2):
        assert b"SlowDown" in put(proxy, "/commits/a", b"1")
        assert get(proxy) == BODY
    assert Handler.stored == {}
    assert proxy.pending() == 0
    assert put(proxy, "/commits/a", b"1") == b"stored"


def test_a_swallowed_reply_leaves_the_request_done(proxy):
    proxy.swallow_replies(1, method="PUT")
    get(proxy)

    with pytest.raises(ConnectionError):
        put(proxy, "/a", b"1")

    assert Handler.stored == {"/a": b"1"}
    assert put(proxy, "/a", b"2") == b"stored"


def test_a_reply_is_cut_after_so_many_bytes(proxy):
    proxy.reset_replies(1, after_bytes=5000)

    with connect(proxy) as connection:
        connection.request("GET", "/x")
        with pytest.raises((ConnectionError, http.client.IncompleteRead)):
            connection.getresponse().read()
    assert get(proxy) == BODY


def test_a_request_is_cut_after_so_many_bytes(proxy):
    proxy.reset_requests(1, after_bytes=5000)

    with pytest.raises(ConnectionError):
        put(proxy, "/a", BODY)

    assert Handler.stored == {}
    assert put(proxy, "/a", BODY) == b"stored"


def test_a_black_hole_gives_nothing_until_it_is_healed(proxy):
    with connect(proxy) as connection:
        assert put_on(connection, "/a", b"1") == b"stored"
        proxy.black_hole()
        with pytest.raises(TimeoutError):
            get(proxy, timeout=0.3)
        connection.request("GET", "/x")  # waits in the hole
        proxy.heal()

        assert connection.getresponse().read() == BODY


def test_a_refusing_proxy_breaks_open_connections_too(proxy):
    with connect(proxy) as connection:
        assert put_on(connection, "/a", b"1") == b"stored"
        proxy.refuse()
        with pytest.raises(ConnectionError):
            put_on(connection, "/a", b"2")
    with pytest.raises(OSError, match="reset"):
        get(proxy)
    proxy.heal()

    assert get(proxy) == BODY
    assert Handler.stored == {"/a": b"1"}


def test_delayed_and_slow_replies_arrive_whole(proxy):
    proxy.delay(0.1)
    proxy.slow_replies(len(BODY) * 5)
    start = time.monotonic()

    assert get(proxy) == BODY
    assert time.monotonic() - start > 0.2


def test_a_store_that_is_down_resets_connections():
    with FaultProxy(1) as proxy, pytest.raises(OSError, match="reset"):
        get(proxy)


def test_what_connects_while_it_ends_is_closed():
    with socket.create_server(("127.0.0.1", 0)) as store:
        for _ in range(3):
            with FaultProxy(store.getsockname()[1]) as proxy:
                clients = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(40)]
            for client in clients:
                client.close()
            del proxy
            gc.collect()  # of a connection that was left open pytest makes an error

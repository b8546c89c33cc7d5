"""Connections to a server: kept while they are good, and given up when they are not."""

import threading
from collections.abc import Iterator
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.storage._http import Connections, NotConnectedError

BODY = bytes(range(256)) * 100


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_GET(self) -> None:
        self.server.ports.append(self.client_address[1])
        if self.path == "/silence":
            self.server.over.wait(20)
            return
        if self.path == "/nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
            self.close_connection = True
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("Asked", self.headers["Asked"])
        self.end_headers()
        self.wfile.write(BODY)
        self.close_connection = self.path == "/last"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ports: list[int] = []  # of the connection of each request
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def connections(server: Server) -> Connections:
    return Connections(server.url, connect_timeout_s=5, read_timeout_s=0.5)


def get(connections: Connections, target: str = "/x") -> bytes:
    with connections.get(target, {"Asked": target}) as answer:
        assert answer.headers["Asked"] == target
        return answer.read()


def test_one_connection_does_for_many_requests(server: Server, connections: Connections) -> None:
    for _ in range(5):
        assert get(connections) == BODY
        assert get(connections, "/missing") == BODY

    assert len(set(server.ports)) == 1


def test_requests_at_once_have_a_connection_each(server: Server, connections: Connections) -> None:
    with connections.get("/x", {"Asked": "a"}) as one, connections.get("/x", {"Asked": "b"}) as two:
        assert (one.read(), two.read()) == (BODY, BODY)

    assert len(set(server.ports)) == 2


def test_an_answer_left_unread_is_not_taken_for_that_of_the_next(
    server: Server, connections: Connections
) -> None:
    with connections.get("/x", {"Asked": "a"}) as answer:
        assert answer.read(10) == BODY[:10]
    with pytest.raises(KeyError), connections.get("/x", {"Asked": "a"}):
        raise KeyError

    assert get(connections) == BODY
    assert len(set(server.ports)) == 3


@pytest.mark.parametrize("target", ["/last", "/x"])
def test_a_connection_that_the_server_has_closed_is_not_used_again(
    server: Server, connections: Connections, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "/x":  # closed for having been idle, later than its answer
        monkeypatch.setattr(Handler, "timeout", 0.05)
    get(connections, target)
    server.over.wait(0.3)

    assert get(connections) == BODY
    assert len(set(server.ports)) == 2


def test_a_silent_server_is_given_up_and_its_connection_too(
    server: Server, connections: Connections
) -> None:
    get(connections)
    with pytest.raises(TimeoutError), connections.get("/silence", {"Asked": "a"}):
        pass

    assert get(connections) == BODY
    assert len(set(server.ports)) == 2


def test_an_answer_that_is_none_is_an_error(connections: Connections) -> None:
    with pytest.raises(HTTPException), connections.get("/nonsense", {"Asked": "a"}):
        pass


def test_where_nobody_answers_there_is_no_connection() -> None:
    with Server() as server:
        url = server.url
    connections = Connections(url, connect_timeout_s=5, read_timeout_s=5)

    with pytest.raises(NotConnectedError, match="refused"), connections.get("/", {}):
        pass


@pytest.mark.parametrize("url", ["ftp://host", "host:80", "http://"])
def test_what_is_no_address_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        Connections(url, connect_timeout_s=1, read_timeout_s=1)

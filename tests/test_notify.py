"""Who is told how a run ended: real programs, and a real HTTP server on loopback."""

import json
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import notify
from pipeline.config import NotifyConfig, parse_config
from pipeline.errors import ConfigError
from pipeline.notify import Notifier

SUMMARY = {"run_id": "r1", "exit_code": 3, "message": "ümlaut"}
SECRET = "T0KEN-in-the-path"


class Hook(ThreadingHTTPServer):
    """Answers with one status after the other, the last one for ever; keeps what it was sent."""

    daemon_threads = True

    def __init__(self, *statuses: int, delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _HookHandler)
        self.statuses, self.delay_s = list(statuses), delay_s
        self.received: list[tuple[str, str, bytes]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook/{SECRET}?q={SECRET}"


class _HookHandler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], body))
        if self.server.delay_s:
            self.server.released.wait(self.server.delay_s)
        statuses = self.server.statuses
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815  (http.server's name)

    def log_message(self, *_: object) -> None:
        """Keep stderr clean."""


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Hook]]:
    monkeypatch.setattr(notify, "_FIRST_PAUSE_S", 0.01)
    started: list[Hook] = []
    yield started
    for hook in started:
        hook.released.set()
        hook.shutdown()
        hook.server_close()


def start(hooks: list[Hook], *statuses: int, delay_s: float = 0.0) -> Hook:
    hook = Hook(*statuses, delay_s=delay_s)
    hooks.append(hook)
    threading.Thread(target=hook.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hook


def send(**config: object) -> None:
    Notifier.from_config(NotifyConfig.model_validate(config)).send(SUMMARY)


def test_a_webhook_is_sent_the_summary_as_json(hooks: list[Hook]) -> None:
    hook = start(hooks, 200)

    send(webhook=hook.url)

    ((path, kind, body),) = hook.received
    assert (path, kind) == (f"/hook/{SECRET}?q={SECRET}", "application/json")
    assert json.loads(body) == SUMMARY


def test_its_url_may_come_from_the_environment(
    hooks: list[Hook], monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = start(hooks, 204)
    monkeypatch.setenv("CARVE_HOOK", hook.url)

    send(webhook_env="CARVE_HOOK")

    assert len(hook.received) == 1


@pytest.mark.parametrize(
    ("statuses", "num_posts", "problem"),
    [
        ((503, 429, 200), 3, None),
        ((500,), 3, "HTTP status 500 (attempt 3)"),
        ((403,), 1, "HTTP status 403 (attempt 1)"),
        ((302,), 1, "HTTP status 302 (attempt 1)"),
    ],
)
def test_what_may_pass_is_tried_again_and_nothing_else(
    hooks: list[Hook],
    caplog: pytest.LogCaptureFixture,
    statuses: tuple[int, ...],
    num_posts: int,
    problem: str | None,
) -> None:
    hook = start(hooks, *statuses)

    send(webhook=hook.url)

    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(hook.received) == num_posts
    assert errors == ([f"notify.webhook: {problem}"] if problem else [])
    assert SECRET not in caplog.text


def test_a_webhook_that_does_not_answer_holds_nobody_up(
    hooks: list[Hook], caplog: pytest.LogCaptureFixture
) -> None:
    hook = start(hooks, 200, delay_s=60)

    send(webhook=hook.url, timeout_s=0.2, max_attempts=2)

    assert len(hook.received) == 2
    assert "notify.webhook: no answer (TimeoutError) (attempt 2)" in caplog.text


def test_a_webhook_that_is_not_there_is_a_line_without_its_url(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]

    send(webhook=f"http://127.0.0.1:{port}/{SECRET}", max_attempts=1)

    assert "notify.webhook: not reachable (ConnectionRefusedError)" in caplog.text
    assert SECRET not in caplog.text


def test_a_command_reads_the_summary_and_sees_its_arguments_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    code = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read()); print('told')"
    out = tmp_path / "a b; $(x).json"

    send(command=[sys.executable, "-c", code, str(out)])

    assert json.loads(out.read_bytes()) == SUMMARY
    assert caplog.messages == [f"notify.command: {Path(sys.executable).name}: told"]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ([sys.executable, "-c", "import sys; sys.exit(7)", SECRET], "ended with 7"),
        ([sys.executable, "-c", "import time; time.sleep(60)", SECRET], "was ended after 1 s"),
        (["/nowhere/at/all", SECRET], "cannot be started: No such file or directory"),
    ],
)
def test_a_command_that_fails_is_a_line_and_no_more(
    caplog: pytest.LogCaptureFixture, command: list[str], problem: str
) -> None:
    send(command=command, timeout_s=1.0)

    assert problem in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"webhook": f"ftp://h/{SECRET}"}, "notify.webhook must hold an http"),
        ({"webhook": f"http:///{SECRET}"}, "notify.webhook must hold an http"),
        ({"webhook": f"https://h:x/{SECRET}"}, "notify.webhook must hold an http"),
        ({"webhook": f"https://h/{SECRET} x"}, "notify.webhook must hold an http"),
        ({"webhook_env": "CARVE_UNSET"}, "environment variable CARVE_UNSET .* is not set"),
        ({"webhook": f"http://h/{SECRET}", "webhook_env": "X"}, "cannot both be given"),
    ],
)
def test_a_wrong_place_is_found_before_the_run_and_not_shown(
    config: dict[str, str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        send(**config)

    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {"webhook": [SECRET]},
        {"webhook": {"url": SECRET}},
        {"command": SECRET},
        SECRET,
        {"command": [["curl", SECRET]]},
    ],
)
def test_a_wrong_type_is_named_without_its_value(section: object) -> None:
    values = {
        "input": {"shards": "in"},
        "output": {"url": "out"},
        "encoder": {"name": "vit"},
        "carver": {"name": "identity"},
        "notify": section,
    }

    with pytest.raises(ConfigError, match="notify") as caught:
        parse_config(values)

    assert SECRET not in str(caught.value)

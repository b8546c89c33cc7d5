"""Log lines as text and as JSON, and their way out of an actor."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipeline import run_log
from pipeline.run_log import JsonFormatter, LogBuffer, about, bound
from tests.conftest import ROOT


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger that writes JSON to a string, and the string."""
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("pipeline.test")
    logger.addHandler(handler)
    return logger, sink


def test_a_line_says_when_where_and_what_it_is_about(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, sink = log

    with bound(run_id="r1", actor="actor-3"):
        logger.warning("sample %r", "k\n1", extra=about(shard="s.tar", key="k\n1", attempt=2))

    (line,) = sink.getvalue().splitlines()
    values = json.loads(line)
    assert values["time"].endswith("Z")
    assert len(values["time"]) == len("2026-01-01T00:00:00.000Z")
    assert (
        values.items()
        >= {
            "level": "WARNING",
            "logger": "pipeline.test",
            "message": r"sample 'k\n1'",
            "run_id": "r1",
            "actor": "actor-3",
            "shard": "s.tar",
            "key": "k\n1",
            "attempt": 2,
        }.items()
    )
    assert {"host", "pid"} < values.keys()


def test_any_key_and_any_error_is_one_line_of_ascii(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, sink = log

    try:
        int("two\nlines")
    except ValueError:
        logger.exception("bad \udcff", extra=about(key="\udcff\u2028\u0000"))

    (line,) = sink.getvalue().split("\n")[:-1]
    assert line.isascii()
    assert json.loads(line)["key"] == "\udcff\u2028\u0000"
    assert "ValueError: invalid literal" in json.loads(line)["trace"]


def test_fields_end_with_their_block(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, sink = log

    with bound(run_id="r1"):
        pass
    logger.warning("after")

    assert "run_id" not in json.loads(sink.getvalue())


def test_what_a_buffer_kept_is_logged_with_its_own_time_and_place(
    log: tuple[logging.Logger, io.StringIO], caplog: pytest.LogCaptureFixture
) -> None:
    logger, _ = log
    buffer = LogBuffer(logging.INFO)
    logger.addHandler(buffer)
    with bound(actor="actor-1"):
        logger.debug("too little")
        logger.info("shard %s done", "a", extra=about(shard="a"))

    lines = buffer.drain()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        run_log.replay(lines)

    (record,) = caplog.records
    assert (record.getMessage(), record.shard, record.actor) == ("shard a done", "a", "actor-1")
    assert record.created == lines[0]["created"]
    assert buffer.drain() == []


def test_a_buffer_that_nobody_empties_drops_the_oldest_and_says_so(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, _ = log
    buffer = LogBuffer(logging.INFO)
    logger.addHandler(buffer)

    for number in range(run_log.MAX_WAITING + 5):
        logger.info("line %d", number)
    lines = buffer.drain()

    assert lines[0]["msg"] == "5 earlier lines of this actor were dropped"
    assert [line["msg"] for line in lines[1::500]] == ["line 5", "line 505"]


def test_with_json_a_crash_and_a_warning_are_lines_too() -> None:
    code = (
        "import warnings; from pipeline.run_log import log_to_stderr; log_to_stderr('json');"
        "warnings.warn('old'); raise RuntimeError('bug')"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["WARNING", "CRITICAL"]
    assert "RuntimeError: bug" in lines[1]["trace"]
    assert done.returncode == 1


def test_with_json_what_a_library_prints_is_a_line_too() -> None:
    code = """
import logging, os, sys
from pipeline.json_stderr import json_stderr
from pipeline.run_log import log_to_stderr
log_to_stderr("json")
with json_stderr():
    logging.getLogger("pipeline").info("ours")
    os.write(2, b"raw \\xff line" + b"\\n")
    print("printed", file=sys.stderr)
    os.system("echo from a child >&2")
logging.getLogger("pipeline").info("after")
"""

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    said = {line["message"]: line["logger"] for line in lines}
    assert list(said)[-1] == "after"
    assert said == {
        "ours": "pipeline",
        "raw \ufffd line": "pipeline.json_stderr",
        "printed": "pipeline.json_stderr",
        "from a child": "pipeline.json_stderr",
        "after": "pipeline",
    }


def test_the_trace_of_a_broken_connection_that_asyncio_finds_later_is_left_out() -> None:
    """The request that it belongs to has failed too, and was tried again; see aiohttp."""
    buffer = LogBuffer(logging.INFO)
    logger = logging.Logger("asyncio")
    logger.addHandler(buffer)

    for error in (ConnectionResetError("Cannot write to closing transport"), KeyError("a bug")):
        logger.error("Future exception was never retrieved", exc_info=error)

    (line,) = buffer.drain()
    assert "a bug" in line["msg"]

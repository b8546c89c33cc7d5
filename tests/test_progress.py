"""What a run shows while it goes on."""

import io
import logging

import pytest
from rich.console import Console

from pipeline.progress import RunProgress
from pipeline.run_report import FailedShard, RunReport


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: now[0])
    return now


def test_a_line_tells_shards_images_rate_eta_and_failures(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    progress = RunProgress(interval_s=5)
    report = RunReport(num_shards=10, num_done_before=2)
    clock[0] += 6
    progress.update(report, images_in_flight=0, actors="2 of 2 actors")
    report.num_committed, report.num_images = 4, 400
    report.failed.append(FailedShard(shard="s", reason="truncated", message="m", attempts=1))
    report.num_rejected["corrupt_image"] = 3

    clock[0] += 10
    progress.update(report, images_in_flight=50, actors="2 of 2 actors")

    assert caplog.messages == [
        "shards 2/10, images 0/?, 0.0 img/s, ETA unknown, 2 of 2 actors",
        "shards 6/10, images 450/~700, 45.0 img/s, ETA 0:05, 2 of 2 actors, failed truncated:1, "
        "rejected corrupt_image:3",
    ]


def test_lines_keep_their_distance(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = RunProgress(interval_s=5)

    for _ in range(20):
        clock[0] += 1
        progress.update(RunReport(num_shards=1), images_in_flight=0, actors="1 of 1 actors")

    assert len(caplog.messages) == 4


def test_on_a_terminal_a_bar_is_drawn(clock: list[float]) -> None:
    sink = io.StringIO()
    terminal = Console(file=sink, force_terminal=True, width=120)
    progress = RunProgress(interval_s=5, console=terminal)
    clock[0] += 1

    progress.update(RunReport(num_shards=4), images_in_flight=1, actors="1 of 1 actors")
    progress.close()

    assert "shards 0/4" in sink.getvalue()
